"""Baselines that drop visual tokens without looking at them.

How many tokens they keep is set in one of two ways: by ``budget``, as with other methods, or by
``k``, for as many as DyCoke's temporal token merging keeps. Dropping whole frames keeps as many
frames as fit into that number.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from dycoke_jax.checks import number, whole_number
from dycoke_jax.compression.budget import check_budget, lookup, share_of
from dycoke_jax.compression.protocol import Compression, Rows, TokenStage
from dycoke_jax.compression.ttm import TokenMerging
from dycoke_jax.errors import ConfigError


@dataclass(frozen=True)
class RandomTokens(TokenStage):
    """Drops tokens at random places, which are the same in every clip of the same length.

    Attributes:
        k: keeps as many tokens as ``DyCoke(k=k)`` does, in [0, 1). Not looked at with a budget.
        seed: seed of the random places, 0 or more.
        budget: share of the visual tokens that go on, in (0, 1]; it takes the place of ``k``.

    Raises:
        ConfigError: naming the setting and its range.
    """

    k: float = 0.7
    seed: int = 0
    budget: float | None = None

    def __post_init__(self) -> None:
        _check_amount(self)
        object.__setattr__(self, "seed", whole_number("RandomTokens: seed", self.seed, 0))

    @property
    def stages(self) -> Compression:
        """A token stage."""
        return Compression(tokens=self)

    def most_rows(self, frames: int, tokens: int) -> int:
        """The budget in tokens, or as many tokens as temporal token merging keeps."""
        return _amount(self, frames, tokens)

    def select(
        self,
        features: Float[Array, "B F N D"],
        frames: Int[Array, "B"],
        signals: tuple[Float[Array, "B F N ..."], ...] = (),
    ) -> Rows:
        """Keeps random tokens, in raster order; see ``protocol.TokenStage``."""
        _, length, tokens, _ = features.shape
        most = self.most_rows(length, tokens)
        counts = lookup(lambda n: self.most_rows(n, tokens), length, frames)

        def of_clip(
            frames: Int[Array, ""], count: Int[Array, ""]
        ) -> tuple[Int[Array, "M"], Bool[Array, "M"]]:
            # The number of a token depends on its place alone, whatever follows the clip's frames.
            key = jax.random.fold_in(jax.random.key(self.seed), frames)
            places = jnp.arange(length * tokens)
            drawn = jax.vmap(lambda place: jax.random.uniform(jax.random.fold_in(key, place)))(
                places
            )
            _, kept = jax.lax.top_k(jnp.where(places < frames * tokens, drawn, -1.0), most)
            # Surplus places are sorted to the end.
            kept = jnp.sort(jnp.where(jnp.arange(most) < count, kept, length * tokens - 1))
            return kept.astype(jnp.int32), jnp.arange(most) < count

        return Rows(*jax.vmap(of_clip)(frames, counts))


@dataclass(frozen=True)
class WholeFrames(TokenStage):
    """Drops whole frames, so that the kept ones lie evenly over the clip.

    Attributes:
        k: keeps at most as many tokens as ``DyCoke(k=k)`` does, but a frame at least, in [0, 1).
            Not looked at with a budget.
        budget: share of the visual tokens that go on at most, but a frame at least, in (0, 1]; it
            takes the place of ``k``.

    Raises:
        ConfigError: naming the setting and its range.
    """

    k: float = 0.7
    budget: float | None = None

    def __post_init__(self) -> None:
        _check_amount(self)

    @property
    def stages(self) -> Compression:
        """A token stage."""
        return Compression(tokens=self)

    def kept_frames(self, frames: int, tokens: int) -> int:
        """Number of frames that are kept of a clip of this many."""
        return max(1, _amount(self, frames, tokens) // tokens)

    def most_rows(self, frames: int, tokens: int) -> int:
        """All tokens of the kept frames."""
        return self.kept_frames(frames, tokens) * tokens

    def select(
        self,
        features: Float[Array, "B F N D"],
        frames: Int[Array, "B"],
        signals: tuple[Float[Array, "B F N ..."], ...] = (),
    ) -> Rows:
        """Keeps whole frames, among them the first and the last; see ``protocol.TokenStage``."""
        batch, length, tokens, _ = features.shape
        most = self.kept_frames(length, tokens)
        # The kept frames of clips of each length; the places of empty rows are those of the last.
        chosen = np.full((length + 1, most), length - 1, np.int32)
        valid = np.zeros((length + 1, most), bool)
        for clip in range(1, length + 1):
            count = self.kept_frames(clip, tokens)
            chosen[clip, :count] = np.linspace(0, clip - 1, count).round()
            valid[clip, :count] = True
        first = jnp.asarray(chosen)[frames][:, :, None] * tokens
        places = (first + jnp.arange(tokens)).reshape(batch, -1)
        return Rows(places, jnp.repeat(jnp.asarray(valid)[frames], tokens, axis=1))


def _check_amount(baseline: RandomTokens | WholeFrames) -> None:
    """Checks ``k`` and ``budget``, of which one alone may differ from its default."""
    name = type(baseline).__name__
    k = number(f"{name}: k", baseline.k, 0, 1)
    object.__setattr__(baseline, "k", k)
    if baseline.budget is None:
        return
    object.__setattr__(baseline, "budget", check_budget(name, baseline.budget))
    if k != type(baseline).k:
        raise ConfigError(
            f"{name}: k is {k} and budget is {baseline.budget}; give one of them, because each "
            "says how many tokens are kept"
        )


def _amount(baseline: RandomTokens | WholeFrames, frames: int, tokens: int) -> int:
    """Number of tokens that may be kept of a clip."""
    if baseline.budget is None:
        return TokenMerging(baseline.k).most_rows(frames, tokens)
    return share_of(frames * tokens, baseline.budget)
