"""Token dropping in training, so that a model learns to answer from the visual tokens kept."""

from dataclasses import dataclass

import numpy as np

from dycoke_jax.checks import number
from dycoke_jax.errors import ConfigError


@dataclass(frozen=True)
class TokenDropping:
    """Which visual tokens of a training step are dropped.

    Attributes:
        k: share of a compared frame's tokens that temporal token merging drops, in [0, 1), see
            ``DyCoke.k``.
        at_random: whether tokens are dropped at random places instead, as many as temporal token
            merging would drop.
    """

    k: float
    at_random: bool = False


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
