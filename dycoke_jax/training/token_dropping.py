"""Training with fewer visual tokens, so that a model learns to answer from what is left."""

from dataclasses import dataclass

import numpy as np

from dycoke_jax.errors import ConfigError


@dataclass(frozen=True)
class TokenDropping:
    """Which visual tokens of a training step are dropped.

    Attributes:
        k: share of a compared frame's tokens that temporal token merging drops (``DyCoke.k``).
        at_random: drop as many tokens as merging would, but at random places.
    """

    k: float
    at_random: bool = False


@dataclass(frozen=True)
class TokenDroppingMix:
    """How often training steps drop visual tokens.

    Attributes:
        merged: share of the steps that drop tokens by temporal token merging, in [0, 1].
        random: share of the steps that drop as many tokens at random, in [0, 1].
        k: share of a compared frame's tokens that is dropped, in [0, 1).
    """

    merged: float = 0.0
    random: float = 0.0
    k: float = 0.7

    def __post_init__(self) -> None:
        if min(self.merged, self.random) < 0 or self.merged + self.random > 1:
            raise ConfigError(
                f"merged is {self.merged} and random is {self.random}; the shares of training "
                "steps that drop tokens must not be negative, and their sum must not exceed 1"
            )
        if not 0 <= self.k < 1:
            raise ConfigError(f"k is {self.k}; it must lie in [0, 1)")

    def choose(self, step: int, seed: int) -> TokenDropping | None:
        """What a step drops; depends on the step and the seed alone."""
        drawn = np.random.default_rng([seed, step, 3]).random()
        if drawn >= self.merged + self.random:
            return None
        return TokenDropping(self.k, at_random=drawn >= self.merged)
