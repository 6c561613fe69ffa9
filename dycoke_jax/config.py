"""Model configurations, and presets for the released model sizes.

``checkpoint.hf_config`` converts them from and to ``config.json``.
"""

import dataclasses
from dataclasses import dataclass
from typing import Literal, get_args

from dycoke_jax.checks import flag, number, whole_number
from dycoke_jax.errors import ConfigError

PoolMode = Literal["bilinear", "average", "max"]
Newline = Literal["one_token", "grid", "frame", "no_token"]
"""Where the learned newline vector is inserted among the visual tokens of a clip.

``one_token``: once, after the last frame. ``grid``: after every row of every frame.
``frame``: after every frame. ``no_token``: nowhere.
"""
Storage = Literal["int8"]
"""How weights or key/value caches can be stored, other than in a float dtype."""


@dataclass(frozen=True)
class VisionConfig:
    """A SigLIP vision tower without its pooling head, run for its first ``num_layers`` blocks.

    ``image_size`` and ``patch_size`` are the side of a frame and of a patch, in pixels.
    """

    hidden_size: int = 1152
    intermediate_size: int = 4304
    num_layers: int = 26
    """Number of blocks that are run; LLaVA runs all but the last of the published tower's 27."""
    num_heads: int = 16
    patch_size: int = 14
    image_size: int = 384
    layer_norm_eps: float = 1e-6

    def __post_init__(self) -> None:
        _check_sizes(self)
        if self.hidden_size % self.num_heads:
            raise ConfigError(
                f"vision: hidden_size {self.hidden_size} is not a multiple of num_heads "
                f"{self.num_heads}"
            )
        if self.image_size < self.patch_size:
            raise ConfigError(
                f"vision: image_size {self.image_size} is smaller than patch_size {self.patch_size}"
            )

    @property
    def grid(self) -> int:
        """Patches along each side of a frame: ``image_size // patch_size``, 27 for 384 and 14."""
        return self.image_size // self.patch_size


@dataclass(frozen=True)
class TextConfig:
    """A Qwen2 language model.

    ``max_positions`` is the longest sequence in tokens that the model was trained for.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    tie_word_embeddings: bool
    rope_theta: float = 1e6
    rms_norm_eps: float = 1e-6
    max_positions: int = 32768

    def __post_init__(self) -> None:
        _check_sizes(self)
        if self.num_heads % self.num_kv_heads:
            raise ConfigError(
                f"text: num_attention_heads {self.num_heads} is not a multiple of "
                f"num_key_value_heads {self.num_kv_heads}"
            )
        if self.head_dim % 2:
            raise ConfigError(f"text: head_dim {self.head_dim} must be even for rotary embedding")


@dataclass(frozen=True)
class LlavaConfig:
    """A LLaVA-OneVision or LLaVA-Video model.

    Attributes:
        vision: the vision tower.
        text: the language model.
        pool_mode: how the patch features of a frame are pooled spatially: by bilinear
            interpolation, or by the average or maximum of each window.
        pool_stride: factor by which pooling shrinks each side of the patch grid, from 1 to the
            patches along a side.
        newline: where the learned newline vector is inserted.
    """

    vision: VisionConfig
    text: TextConfig
    pool_mode: PoolMode = "bilinear"
    pool_stride: int = 2
    newline: Newline = "one_token"

    def __post_init__(self) -> None:
        _require_choice("pool mode (mm_spatial_pool_mode)", self.pool_mode, get_args(PoolMode))
        _require_choice("newline position (mm_newline_position)", self.newline, get_args(Newline))
        allowed = f"lie in 1..{self.vision.grid}, the patches along a side"
        whole_number(
            "mm_spatial_pool_stride", self.pool_stride, 1, self.vision.grid, allowed=allowed
        )

    @property
    def frame_grid(self) -> tuple[int, int]:
        """Rows and columns of a frame's visual tokens after pooling."""
        grid, stride = self.vision.grid, self.pool_stride
        # Interpolation rounds the size up; window pooling discards an incomplete last window.
        side = -(-grid // stride) if self.pool_mode == "bilinear" else grid // stride
        return side, side

    @property
    def tokens_per_frame(self) -> int:
        """N: number of visual tokens of a frame after pooling, without newline vectors."""
        rows, columns = self.frame_grid
        return rows * columns


def _check_sizes(config: VisionConfig | TextConfig) -> None:
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if field.type is int:
            whole_number(field.name, value, 1)
        elif field.type is float:
            number(field.name, value, 0, with_low=False)
        else:
            flag(field.name, value)


def _require_choice(what: str, value: str, choices: tuple[str, ...]) -> None:
    if not isinstance(value, str) or value not in choices:
        raise ConfigError(f"{what} is {value!r}; supported are {', '.join(choices)}")


_QWEN2_0_5B = TextConfig(
    vocab_size=151936,
    hidden_size=896,
    intermediate_size=4864,
    num_layers=24,
    num_heads=14,
    num_kv_heads=2,
    head_dim=64,
    tie_word_embeddings=True,
)
_QWEN2_7B = TextConfig(
    vocab_size=152064,
    hidden_size=3584,
    intermediate_size=18944,
    num_layers=28,
    num_heads=28,
    num_kv_heads=4,
    head_dim=128,
    tie_word_embeddings=False,
)
_QWEN2_72B = TextConfig(
    vocab_size=152064,
    hidden_size=8192,
    intermediate_size=29568,
    num_layers=80,
    num_heads=64,
    num_kv_heads=8,
    head_dim=128,
    tie_word_embeddings=False,
)

ONEVISION_0_5B = LlavaConfig(vision=VisionConfig(), text=_QWEN2_0_5B)
"""lmms-lab/llava-onevision-qwen2-0.5b-ov."""
ONEVISION_7B = LlavaConfig(vision=VisionConfig(), text=_QWEN2_7B)
"""lmms-lab/llava-onevision-qwen2-7b-ov."""
ONEVISION_72B = LlavaConfig(vision=VisionConfig(), text=_QWEN2_72B)
"""lmms-lab/llava-onevision-qwen2-72b-ov."""
VIDEO_7B = LlavaConfig(vision=VisionConfig(), text=_QWEN2_7B, pool_mode="average", newline="grid")
"""lmms-lab/LLaVA-Video-7B-Qwen2, with the average pooling of its published evaluation."""
VIDEO_72B = LlavaConfig(vision=VisionConfig(), text=_QWEN2_72B, pool_mode="average", newline="grid")
"""lmms-lab/LLaVA-Video-72B-Qwen2, with the average pooling of its published evaluation."""

TINY = LlavaConfig(
    vision=VisionConfig(
        hidden_size=64,
        intermediate_size=160,
        num_layers=3,
        num_heads=4,
        patch_size=8,
        image_size=64,
    ),
    text=TextConfig(
        vocab_size=512,
        hidden_size=128,
        intermediate_size=352,
        num_layers=6,
        num_heads=4,
        num_kv_heads=2,
        head_dim=32,
        tie_word_embeddings=True,
        rope_theta=1e4,
        max_positions=4096,
    ),
)
"""The tiny model included in the package: 1.3 million weights, 16 visual tokens a frame."""

PRESETS = {
    "tiny": TINY,
    "onevision-0.5b": ONEVISION_0_5B,
    "onevision-7b": ONEVISION_7B,
    "onevision-72b": ONEVISION_72B,
    "video-7b": VIDEO_7B,
    "video-72b": VIDEO_72B,
}
"""The presets by the names that the command line accepts."""
