"""Ways to drop visual tokens that know nothing of redundancy: what a compressor has to beat.

Random dropping keeps exactly as many tokens as temporal token merging with the same ``k`` keeps;
dropping whole frames keeps as many frames as that number holds.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from dycoke_jax.cache import Slots
from dycoke_jax.compression.dycoke import DyCoke
from dycoke_jax.config import LlavaConfig
from dycoke_jax.errors import ConfigError


def kept_by_merging(frames: int, tokens: int, k: float) -> int:
    """Tokens that DyCoke's first stage keeps of a clip (mode ``paper``)."""
    shape = jax.ShapeDtypeStruct((1, frames, tokens, 1), jnp.float32)
    kept = jax.eval_shape(DyCoke(k=k).merge, shape)
    return frames * tokens if kept is None else kept.shape[1]


@dataclass(frozen=True)
class RandomTokens:
    """Drops tokens at random places, the same ones in every clip of a length.

    Attributes:
        k: of the merging whose count is kept, in [0, 1).
        seed: of the places.
    """

    k: float = 0.7
    seed: int = 0

    def __post_init__(self) -> None:
        _check_k(self.k)

    def check(self, config: LlavaConfig, frames: int) -> None:
        """Works on every model and clip."""

    def merge(self, features: Float[Array, "B F N D"]) -> Int[Array, "B M"]:
        """Kept tokens in raster order."""
        batch, frames, tokens, _ = features.shape
        count = kept_by_merging(frames, tokens, self.k)
        random = np.random.default_rng([self.seed, frames, tokens])
        kept = np.sort(random.permutation(frames * tokens)[:count]).astype(np.int32)
        return jnp.broadcast_to(jnp.asarray(kept), (batch, count))

    def decode_pruning(self, slots: Slots, tokens: int) -> None:
        """No second stage."""


@dataclass(frozen=True)
class WholeFrames:
    """Drops whole frames, evenly over the clip.

    Attributes:
        k: of the merging whose count is not exceeded, in [0, 1).
    """

    k: float = 0.7

    def __post_init__(self) -> None:
        _check_k(self.k)

    def check(self, config: LlavaConfig, frames: int) -> None:
        """Works on every model and clip."""

    def merge(self, features: Float[Array, "B F N D"]) -> Int[Array, "B M"]:
        """All tokens of the frames that stay, the first and the last among them."""
        batch, frames, tokens, _ = features.shape
        count = max(1, kept_by_merging(frames, tokens, self.k) // tokens)
        chosen = np.linspace(0, frames - 1, count).round().astype(np.int32)
        kept = (chosen[:, None] * tokens + np.arange(tokens, dtype=np.int32)).reshape(-1)
        return jnp.broadcast_to(jnp.asarray(kept), (batch, kept.size))

    def decode_pruning(self, slots: Slots, tokens: int) -> None:
        """No second stage."""


def _check_k(k: float) -> None:
    if not 0 <= k < 1:
        raise ConfigError(f"k is {k}; it must lie in [0, 1)")
