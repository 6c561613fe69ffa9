"""Token dropping in training, so that a model learns to answer from the visual tokens kept."""

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from dycoke_jax.checks import number
from dycoke_jax.compression.protocol import Rows
from dycoke_jax.compression.ttm import TokenMerging
from dycoke_jax.errors import ConfigError


@runtime_checkable
class TokenSelection(Protocol):
    """Which visual tokens of a training step the language model reads.

    It is hashable, because ``train_step`` takes it as a static argument. Unlike a ``TokenStage`` it
    may draw at random, anew in each step.
    """

    def __hash__(self) -> int: ...

    def select(
        self, features: Float[Array, "B F N D"], frames: Int[Array, "B"], key: Array | None
    ) -> Rows:
        """Selects the rows that the language model reads.

        Args:
            features: visual tokens of each clip after pooling; no gradient flows into the choice.
            frames: number of frames of each clip, 0 in a row without a clip.
            key: random key of the step; None where nothing is drawn.
        """


@dataclass(frozen=True)
class TokenDropping:
    """Drops visual tokens of a training step by temporal token merging, or as many at random.

    Attributes:
        k: share of a compared frame's tokens that temporal token merging drops, in [0, 1), see
            ``DyCoke.k``.
        at_random: whether tokens are dropped at random places instead, as many as temporal token
            merging would drop.
    """

    k: float
    at_random: bool = False

    def select(
        self, features: Float[Array, "B F N D"], frames: Int[Array, "B"], key: Array | None
    ) -> Rows:
        """Selects the kept tokens, see ``TokenSelection``; ``at_random`` needs a key."""
        kept = TokenMerging(self.k).select(features, frames)
        if self.at_random and self.k > 0:
            assert key is not None
            batch, length, tokens, _ = features.shape
            drawn = jax.random.uniform(key, (batch, length * tokens))
            places = jax.lax.top_k(drawn, kept.places.shape[1])[1]
            kept = kept._replace(places=jnp.sort(places, axis=1))
        return kept


@dataclass(frozen=True)
class TokenDroppingMix:
    """Shares of the training steps that drop visual tokens; the other steps keep all of them.

    Attributes:
        merged: share of the steps that drop tokens by temporal token merging, in [0, 1].
        random: share of the steps that drop as many tokens at random, in [0, 1]; together with
            ``merged`` at most 1.
        k: share of a compared frame's tokens that these steps drop, in [0, 1).

    Raises:
        ConfigError: if a share is out of its range.
    """

    merged: float = 0.0
    random: float = 0.0
    k: float = 0.7

    def __post_init__(self) -> None:
        for name in ("merged", "random"):
            share = number(name, getattr(self, name), 0, 1, with_high=True)
            object.__setattr__(self, name, share)
        if self.merged + self.random > 1:
            raise ConfigError(
                f"merged is {self.merged} and random is {self.random}; the shares of training "
                "steps that drop tokens must not exceed 1 together"
            )
        object.__setattr__(self, "k", number("k", self.k, 0, 1))

    def choose(self, step: int, seed: int) -> TokenDropping | None:
        """Draws which visual tokens a step drops; depends on its arguments only.

        Args:
            step: number of the step, from 0.
            seed: seed of the choice, 0 or more.

        Returns:
            The setting of token dropping, or None if the step keeps all tokens.
        """
        drawn = np.random.default_rng([seed, step, 3]).random()
        if drawn >= self.merged + self.random:
            return None
        return TokenDropping(self.k, at_random=drawn >= self.merged)
