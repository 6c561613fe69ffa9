"""Small random checkpoints in the layouts that the library reads, made without it.

The llava-hf ones are saved by transformers itself; the lmms-lab ones are those renamed by a table
that is written down here a second time, so that it checks the library's.
"""

import json
from pathlib import Path

import ml_dtypes  # noqa: F401  (lets numpy read bfloat16)
import numpy as np
import torch
from safetensors import safe_open
from safetensors.numpy import save_file
from transformers import LlavaOnevisionConfig, LlavaOnevisionForConditionalGeneration

TEXT = {
    "hidden_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 96,
    "vocab_size": 320,
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-6,
}
VISION = {
    "hidden_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 80,
    "image_size": 56,
    "patch_size": 14,
}
IMAGE_TOKEN, VIDEO_TOKEN = 318, 319


def tiny_llava_hf(
    folder: Path,
    tied: bool = False,
    dtype: str = "float32",
    shards: str | None = None,
    text: dict | None = None,
    vision: dict | None = None,
    seed: int = 0,
    deviation: float = 0.1,
    **config: object,
) -> Path:
    """Saves a random model with transformers.

    Args:
        folder: where to; made if absent.
        tied: whether the head is the embedding.
        dtype: float32, float16 or bfloat16.
        shards: size limit of a file, such as "40KB"; None for one file.
        text: sizes that differ from ``TEXT``, or other keys of the Qwen2 configuration.
        vision: sizes that differ from ``VISION``, or other keys of the SigLIP configuration.
        seed: of the random weights.
        deviation: of the random weights.
        config: further keys of the LLaVA-OneVision configuration.
    """
    settings = {
        "image_token_index": IMAGE_TOKEN,
        "video_token_index": VIDEO_TOKEN,
        "tie_word_embeddings": tied,
        "text_config": {
            "model_type": "qwen2",
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
            "tie_word_embeddings": tied,
            **TEXT,
            **(text or {}),
        },
        "vision_config": {
            "model_type": "siglip_vision_model",
            "vision_use_head": False,
            **VISION,
            **(vision or {}),
        },
        **config,
    }
    model = LlavaOnevisionForConditionalGeneration(LlavaOnevisionConfig(**settings))
    randomize(model, seed, deviation)
    limit = {} if shards is None else {"max_shard_size": shards}
    model.to(getattr(torch, dtype)).save_pretrained(folder, **limit)
    return folder


def randomize(model: torch.nn.Module, seed: int = 0, deviation: float = 0.1) -> None:
    """Draws every parameter anew: norms around 1, everything else around 0.

    The deviation is larger than an untrained model's, so that logits differ visibly.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            is_norm = "norm" in name.split(".")[-2] if "." in name else False
            center = 1.0 if is_norm and name.endswith("weight") else 0.0
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(center + deviation * noise)


# What lmms-lab calls a tensor that transformers saves under the name on the left.
_LMMS_LAB = (
    ("language_model.model.", "model."),
    ("language_model.lm_head.", "lm_head."),
    ("multi_modal_projector.linear_1.", "model.mm_projector.0."),
    ("multi_modal_projector.linear_2.", "model.mm_projector.2."),
    ("image_newline", "model.image_newline"),
    ("vision_tower.", "model.vision_tower.vision_tower.vision_model."),
)


def lmms_lab_name(name: str) -> str:
    for prefix, other in _LMMS_LAB:
        if name.startswith(prefix):
            return other + name.removeprefix(prefix)
    raise AssertionError(name)


def to_lmms_lab(src: Path, dst: Path, **config: object) -> Path:
    """Rewrites a llava-hf folder in the lmms-lab layout and dialect.

    Args:
        src: what ``tiny_llava_hf`` saved.
        dst: where to; made if absent.
        config: keys of ``config.json`` that differ, such as ``mm_newline_position="grid"``.
    """
    source = json.loads((src / "config.json").read_text())
    text, vision = source["text_config"], source["vision_config"]
    settings = {
        "architectures": ["LlavaQwenForCausalLM"],
        "model_type": "llava",
        **{key: text[key] for key in TEXT},
        "hidden_act": "silu",
        "rope_theta": text["rope_parameters"]["rope_theta"],
        "tie_word_embeddings": source["tie_word_embeddings"],
        "use_sliding_window": False,
        "torch_dtype": source["dtype"],
        "image_token_index": 151646,
        "mm_hidden_size": vision["hidden_size"],
        "mm_vision_tower": "tiny-siglip",
        # lmms-lab towers are described with the last block, which their code then deletes.
        "vision_config": {
            **{key: vision[key] for key in VISION},
            "num_hidden_layers": vision["num_hidden_layers"] + 1,
            "hidden_act": "gelu_pytorch_tanh",
            "layer_norm_eps": 1e-6,
        },
        "mm_projector_type": "mlp2x_gelu",
        "mm_patch_merge_type": "spatial_unpad",
        "mm_vision_select_layer": -2,
        "mm_vision_select_feature": "patch",
        "mm_newline_position": "one_token",
        "mm_spatial_pool_mode": "bilinear",
        "mm_spatial_pool_stride": 2,
        "mm_use_im_start_end": False,
        "mm_use_im_patch_token": False,
        **config,
    }
    dst.mkdir(parents=True, exist_ok=True)
    (dst / "config.json").write_text(json.dumps(settings, indent=2))
    tensors = {lmms_lab_name(name): array for name, array in read_tensors(src).items()}
    write_tensors(dst, tensors)
    return dst


def read_tensors(folder: Path) -> dict[str, np.ndarray]:
    """Every tensor of a folder's safetensors files, by the name in the file."""
    tensors = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "numpy") as file:
            tensors.update({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118
    return tensors


def write_tensors(folder: Path, tensors: dict[str, np.ndarray]) -> None:
    """Writes them as the folder's ``model.safetensors``."""
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def same_bits(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> bool:
    """Whether two sets of tensors have the same names, shapes, dtypes and bits."""
    return a.keys() == b.keys() and all(
        (a[name].shape, a[name].dtype) == (b[name].shape, b[name].dtype)
        and a[name].tobytes() == b[name].tobytes()
        for name in a
    )
