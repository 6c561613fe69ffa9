"""The same weights and inputs through transformers' torch model, for comparison.

The plain model alone is compared: transformers has no DyCoke. Attention is torch's SDPA, in
float32, on as many threads as this process may use cores. Clips are encoded one by one and given as
normalised pixels. Decoding is a loop of one forward pass a token over transformers' cache, without
the further work of ``generate``, so that the comparison is with the best that a user could write.
"""

import warnings
from collections.abc import Collection
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import jax
import numpy as np

from dycoke_jax.bench.machine import cores
from dycoke_jax.bench.measure import Run, Watch
from dycoke_jax.bench.stages import Work
from dycoke_jax.checkpoint.hf_config import llava_hf_config
from dycoke_jax.checkpoint.names import POST_NORM, llava_hf_name
from dycoke_jax.config import LlavaConfig
from dycoke_jax.errors import ConfigError
from dycoke_jax.model import Model

STAGES = ("vision", "prefill", "decode")


def check_against(config: LlavaConfig, dtype: str) -> None:
    """Checks, before anything is measured, that a model can be compared with transformers.

    Raises:
        ConfigError: if torch or transformers' model is missing, or does not compute the same.
    """
    try:
        import torch  # noqa: F401
        from transformers import LlavaOnevisionForConditionalGeneration  # noqa: F401
    except ImportError as error:
        raise ConfigError(
            f"--against transformers needs torch and its model of LLaVA-OneVision ({error}); "
            "install them: pip install torch"
        ) from error
    if (config.pool_mode, config.pool_stride, config.newline) != ("bilinear", 2, "one_token"):
        raise ConfigError(
            f"--against transformers: transformers has no model with {config.pool_mode} pooling "
            f"and newlines {config.newline}; choose a LLaVA-OneVision model"
        )
    if dtype != "float32":
        raise ConfigError(f"--against transformers compares in float32, not in {dtype}")
    platform = jax.devices()[0].platform
    if platform != "cpu":
        raise ConfigError(
            f"--against transformers compares on the CPU, not on {platform}; set JAX_PLATFORMS=cpu"
        )


def torch_model(model: Model) -> Any:
    """Transformers' model with the weights of a model, which both share in memory.

    Args:
        model: a model that ``check_against`` accepts.

    Raises:
        ConfigError: if weights are stored in another dtype.
    """
    stored = {weight.dtype.name for weight in model.params.values()} - {"float32"}
    if stored:
        raise ConfigError(
            f"--against transformers compares float32 weights, not {', '.join(sorted(stored))}; "
            "give a checkpoint that is not quantised, and --dtype float32"
        )
    import torch
    from transformers import LlavaOnevisionConfig, LlavaOnevisionForConditionalGeneration
    from transformers.utils import logging

    torch.set_num_threads(cores())
    weights = {
        llava_hf_name(path): torch.from_dlpack(jax.device_put(weight, jax.devices()[0]))
        for path, weight in model.params.items()
    }
    # The norm behind the tower is computed by transformers, and nothing reads it.
    for path, value in zip(POST_NORM, (1.0, 0.0), strict=True):
        weights[llava_hf_name(path)] = torch.full((model.config.vision.hidden_size,), value)
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        network = LlavaOnevisionForConditionalGeneration.from_pretrained(
            None,
            config=LlavaOnevisionConfig(**llava_hf_config(model.config)),
            state_dict=weights,
            attn_implementation="sdpa",
        )
    finally:
        if shown:
            logging.enable_progress_bar()
    return network.eval()


def torch_run(network: Any, work: Work, chosen: Collection[str]) -> Run:
    """A case that runs ``STAGES`` of the plain model in torch.

    Args:
        network: result of ``torch_model``.
        work: the inputs; its compression is not used.
        chosen: names of the stages that are timed; as for ``stages.stages_run``.

    Returns:
        The case; its runs return the generated ids of each request if it decodes, and else None.
    """
    import torch
    from transformers import DynamicCache

    stages = [stage for stage in STAGES if stage in chosen]
    clips = [_pixels(request.frames) for request in work.requests if request.frames is not None]
    before = torch.tensor([request.prompt.before for request in work.requests])
    after = torch.tensor([request.prompt.after for request in work.requests])
    kept: list[Any] = []

    def encode() -> Any:
        settings = {"vision_feature_layer": -1, "vision_feature_select_strategy": "full"}
        width = work.model.config.text.hidden_size
        encoded = [
            network.model.get_video_features(clip[None], **settings).pooler_output for clip in clips
        ]
        return torch.stack([features.reshape(-1, width) for features in encoded])

    def forward(ids: Any, cache: Any, embeds: Any = None) -> Any:
        # By place, because the name of the cache differs between versions of transformers.
        out = network.model.language_model(ids, None, None, cache, embeds, use_cache=True)
        return network.lm_head(out.last_hidden_state[:, -1]).argmax(-1)

    def read(visual: Any) -> tuple[Any, Any]:
        embed, cache = network.get_input_embeddings(), DynamicCache(config=network.model.config)
        prompt = torch.cat([embed(before), visual, embed(after)], dim=1)
        return forward(None, cache, prompt), cache

    def generate(first: Any, cache: Any) -> list[Any]:
        ids = [first]
        for _ in range(work.new_tokens - 1):
            ids.append(forward(ids[-1][:, None], cache))
        return ids

    def run(watch: Watch) -> tuple[tuple[int, ...], ...] | None:
        def timed(stage: str, parts: int = 1) -> AbstractContextManager[None]:
            return watch.time(stage, parts) if stage in stages else nullcontext()

        with torch.inference_mode(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # remarks of transformers on its own code
            if "vision" in stages or not kept:
                with timed("vision"):
                    kept[:] = [encode()]
            if not {"prefill", "decode"} & set(stages):
                return None
            with timed("prefill"):
                first, cache = read(kept[0])
            if "decode" not in stages:
                return None
            with timed("decode", work.new_tokens - 1):
                ids = generate(first, cache)
        return tuple(map(tuple, torch.stack(ids, dim=1).tolist()))

    return run


def _pixels(frames: np.ndarray) -> Any:
    """Frames as transformers' processors give them, [F, 3, height, width] from -1 to 1."""
    import torch

    return (torch.from_numpy(frames).float().permute(0, 3, 1, 2) / 255 - 0.5) / 0.5
