"""Writes a checkpoint in the llava-hf layout from weights that are not in a checkpoint."""

import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from jax.typing import DTypeLike
from tokenizers import Tokenizer

from dycoke_jax.checkpoint.conversion import with_post_norm, write_config
from dycoke_jax.checkpoint.hf_config import llava_hf_config
from dycoke_jax.checkpoint.names import llava_hf_name
from dycoke_jax.checkpoint.safetensors_writer import write_safetensors
from dycoke_jax.checkpoint.tensors import TensorInfo, Weights, weight_dtype
from dycoke_jax.config import LlavaConfig, VisionConfig
from dycoke_jax.files import absent, staged_folder
from dycoke_jax.models.llava import abstract_params
from dycoke_jax.progress import BYTES, Progress


def save_llava_hf(
    dst: str | Path,
    config: LlavaConfig,
    read: Callable[[Iterable[str]], Iterator[tuple[str, np.ndarray]]],
    save_tokenizer: Callable[[Path], None],
    *,
    dtype: DTypeLike = np.float32,
    progress: Progress | None = None,
    max_shard_bytes: int = 5_000_000_000,
) -> None:
    """Writes weights, configuration, tokenizer and processor settings.

    Args:
        dst: a folder that does not exist yet; it is created once everything is written.
        config: the model's configuration.
        read: yields path and tensor for the given paths, in the given order; any float dtype.
        save_tokenizer: writes the tokenizer's files into a folder. Processor settings that it
            writes too are not overwritten.
        dtype: dtype of the written weights: float32, float16 or bfloat16.
        progress: called after each tensor; counts bytes as written.
        max_shard_bytes: largest tensor data of a file, in bytes; beyond it the tensors are split
            into shards with an index.

    Raises:
        CheckpointError: if ``dst`` exists or cannot be written, or ``dtype`` is not supported.
    """
    destination, kind = absent(dst), weight_dtype(dtype)
    assert kind is not None
    shapes = abstract_params(config)
    infos = {path: TensorInfo(leaf.shape, kind) for path, leaf in shapes.items()}
    weights = with_post_norm(Weights(infos, {}, read))
    tensors = {**weights.params, **weights.carried}
    total = sum(info.nbytes for info in tensors.values())

    def arrays() -> Iterator[np.ndarray]:
        done = 0
        for path, array in weights.stream(tensors):
            yield array.astype(kind)
            done += tensors[path].nbytes
            if progress:
                progress("writing weights" + BYTES, done, total)

    with staged_folder(destination) as folder:
        save_tokenizer(folder)
        placeholders = _placeholder_ids(folder)
        write_config(folder, llava_hf_config(config) | placeholders | {"dtype": kind.name})
        for name, settings in _processors(config.vision).items():
            if not (folder / name).exists():
                text = json.dumps(settings, indent=2) + "\n"
                (folder / name).write_text(text, encoding="utf-8")
        names = {llava_hf_name(path): info for path, info in tensors.items()}
        write_safetensors(folder, names, arrays(), max_shard_bytes)


def _placeholder_ids(folder: Path) -> dict[str, int]:
    """Returns the tokenizer's ids of transformers' image and video placeholders, if it has any."""
    tokenizer = folder / "tokenizer.json"
    if not tokenizer.exists():
        return {}
    ids = Tokenizer.from_file(str(tokenizer)).get_vocab(with_added_tokens=True)
    names = {"image_token_index": "<image>", "video_token_index": "<video>"}
    return {key: ids[token] for key, token in names.items() if token in ids}


def _processors(vision: VisionConfig) -> dict[str, dict[str, Any]]:
    settings = {
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"height": vision.image_size, "width": vision.image_size},
        "resample": 3,  # Pillow's bicubic
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
    }
    return {
        "preprocessor_config.json": {
            "image_processor_type": "LlavaOnevisionImageProcessor",
            **settings,
        },
        "video_preprocessor_config.json": {
            "video_processor_type": "LlavaOnevisionVideoProcessor",
            **settings,
        },
    }
