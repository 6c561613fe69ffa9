"""Baselines that drop visual tokens without looking at them.

Random dropping keeps exactly as many tokens as temporal token merging with the same ``k``. Dropping
whole frames keeps as many frames as fit into that number of tokens.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from dycoke_jax.cache import Slots
from dycoke_jax.checks import number, whole_number
from dycoke_jax.compression.dycoke import DyCoke
from dycoke_jax.config import LlavaConfig


def kept_by_merging(frames: int, tokens: int, k: float) -> int:
    """Number of tokens that temporal token merging (mode ``paper``) keeps of a clip.

    Args:
        frames: frames of the clip (F).
        tokens: visual tokens of a frame (N).
        k: as ``DyCoke.k``.
    """
    shape = jax.ShapeDtypeStruct((1, frames, tokens, 1), jnp.float32)
    kept = jax.eval_shape(DyCoke(k=k).select, shape)
    return frames * tokens if kept is None else kept.shape[1]


@dataclass(frozen=True)
class RandomTokens:
    """Drops tokens at random places, which are the same in every clip of the same length.

    Attributes:
        k: keeps as many tokens as ``DyCoke(k=k)`` does, in [0, 1).
        seed: seed of the random places, 0 or more.

    Raises:
        ConfigError: naming the setting and its range.
    """

    k: float = 0.7
    seed: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "k", number("RandomTokens: k", self.k, 0, 1))
        object.__setattr__(self, "seed", whole_number("RandomTokens: seed", self.seed, 0))

    def check(self, config: LlavaConfig, frames: int) -> None:
        """Accepts every model and clip length."""

    def select(self, features: Float[Array, "B F N D"]) -> Int[Array, "B M"]:
        """Indices of the kept tokens in raster order."""
        batch, frames, tokens, _ = features.shape
        count = kept_by_merging(frames, tokens, self.k)
        random = np.random.default_rng([self.seed, frames, tokens])
        kept = np.sort(random.permutation(frames * tokens)[:count]).astype(np.int32)
        return jnp.broadcast_to(jnp.asarray(kept), (batch, count))

    def decode_pruning(self, slots: Slots, tokens: int) -> None:
        """Prunes nothing while decoding."""


@dataclass(frozen=True)
class WholeFrames:
    """Drops whole frames, so that the kept ones lie evenly over the clip.

    Attributes:
        k: keeps at most as many tokens as ``DyCoke(k=k)`` does, but a frame at least, in [0, 1).

    Raises:
        ConfigError: naming the setting and its range.
    """

    k: float = 0.7

    def __post_init__(self) -> None:
        object.__setattr__(self, "k", number("WholeFrames: k", self.k, 0, 1))

    def check(self, config: LlavaConfig, frames: int) -> None:
        """Accepts every model and clip length."""

    def select(self, features: Float[Array, "B F N D"]) -> Int[Array, "B M"]:
        """Indices of all tokens of the kept frames, among them the first and the last frame."""
        batch, frames, tokens, _ = features.shape
        count = max(1, kept_by_merging(frames, tokens, self.k) // tokens)
        chosen = np.linspace(0, frames - 1, count).round().astype(np.int32)
        kept = (chosen[:, None] * tokens + np.arange(tokens, dtype=np.int32)).reshape(-1)
        return jnp.broadcast_to(jnp.asarray(kept), (batch, kept.size))

    def decode_pruning(self, slots: Slots, tokens: int) -> None:
        """Prunes nothing while decoding."""
