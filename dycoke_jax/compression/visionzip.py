"""VisionZip (Yang et al., CVPR 2025, arXiv 2412.04467): keeps what is attended to, merges the rest.

The paper is about pictures and a vision tower with a class token. This is the form for videos and
SigLIP that later papers compare with, from the port in github.com/cokeshao/HoliTom at e9b2972
(Apache-2.0, as VisionZip itself at 3151f6d), of which no code is used.
"""

from dataclasses import dataclass
from fractions import Fraction
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from dycoke_jax.checks import number
from dycoke_jax.compression.budget import check_budget, share_of
from dycoke_jax.compression.protocol import Compression, Rows, TokenStage
from dycoke_jax.compression.ranking import rank_in_row
from dycoke_jax.compression.similarity import most_similar
from dycoke_jax.models.signals import Signal


@dataclass(frozen=True)
class VisionZip(TokenStage):
    """Keeps the most attended tokens of each frame, and merges the others into evenly spaced ones.

    1. The budget is shared evenly over the frames. Of a frame's part, the share ``dominant``,
       rounded down, is for dominant tokens and the rest for contextual ones.
    2. The dominant tokens of a frame are those that receive the most attention in the last layer of
       the vision tower, as the mean over heads and queries.
    3. Of the other tokens of a frame, in raster order, every s-th from the first on is a target,
       where s is their number divided by that of contextual tokens, rounded down. All but the
       targets go to the target with the most similar key: the cosine of the keys of the tower's
       last layer, as their mean over heads.
    4. A contextual token is its target plus the mean of the tokens that went to it: a sum, as in
       the published code, about twice as long as a token.

    It merges tokens: contextual rows are new and stand at the place of their target, dominant ones
    are as they were. Each frame is treated for itself; the cost of a clip is the attention of one
    layer of the tower, and sums of order contextual * N * D for each frame.

    The published port keeps the same whole number of tokens in each frame, and so not exactly a
    budget; here some frames keep one token more than others. It orders the tokens of a frame by
    kind where the model has one newline; here they are in raster order.

    Attributes:
        budget: share of the visual tokens that go on, in (0, 1]. Exactly as many go on.
        dominant: share of these that are dominant tokens, in [0, 1). 54 of 64 in the paper.

    Raises:
        ConfigError: naming the setting and its range.
    """

    budget: float = 0.25
    dominant: float = 54 / 64

    def __post_init__(self) -> None:
        object.__setattr__(self, "budget", check_budget("VisionZip", self.budget))
        object.__setattr__(self, "dominant", number("VisionZip: dominant", self.dominant, 0, 1))

    @property
    def stages(self) -> Compression:
        """A token stage."""
        return Compression(tokens=self)

    @property
    def signals(self) -> tuple[Signal, ...]:
        """What ranks tokens, and what they are compared by."""
        return (Signal("attention"), Signal("mean_keys"))

    def most_rows(self, frames: int, tokens: int) -> int:
        """The budget of a clip in tokens, at least 1."""
        return share_of(frames * tokens, self.budget)

    def select(
        self,
        features: Float[Array, "B F N D"],
        frames: Int[Array, "B"],
        signals: tuple[Float[Array, "B F N ..."], ...],
    ) -> Rows:
        """Keeps dominant and contextual tokens, in raster order.

        Args:
            features: as in ``protocol.TokenStage``.
            frames: likewise.
            signals: the attention that each token receives, and the keys.

        Returns:
            New embeddings of the dtype of ``features``; the valid rows come first.
        """
        attention, keys = signals
        batch, length, tokens, width = features.shape
        kept = self._kept_of_frames(length, tokens)
        dominant = np.array([int(Fraction(str(self.dominant)) * count) for count in kept.tolist()])
        chosen = _choose(attention, dominant, kept - dominant)
        contextual = _contextual(features, keys, chosen)

        # Which frame a row belongs to, and its number in the frame, are known before anything runs.
        frame = np.repeat(np.arange(length, dtype=np.int32), kept)
        first_row = np.cumsum(kept) - kept
        order = jnp.argsort(~chosen.is_kept, axis=-1).astype(jnp.int32)
        token = order[:, frame, np.arange(len(frame)) - first_row[frame]]
        row = jnp.arange(batch)[:, None]
        embeds = features[row, frame, token]
        # Targets that are none are written out of range, which is nowhere.
        rows = jnp.cumsum(chosen.is_kept, axis=-1) - 1 + first_row[:, None]
        rows = jnp.take_along_axis(rows, chosen.targets, axis=-1)
        rows = jnp.where(chosen.is_target, rows, len(frame)).reshape(batch, -1)
        embeds = embeds.at[row, rows].set(contextual.reshape(batch, -1, width), mode="drop")
        places = jnp.asarray(frame * tokens) + token
        return Rows(places, jnp.asarray(frame) < frames[:, None], embeds)

    def _kept_of_frames(self, frames: int, tokens: int) -> Int[np.ndarray, "F"]:
        """Tokens that each frame keeps: a clip that ends with it keeps its own budget."""
        budgets = [self.most_rows(count, tokens) for count in range(frames + 1)]
        return np.diff(np.array(budgets))


class _Chosen(NamedTuple):
    """The tokens that frames keep."""

    is_kept: Bool[Array, "B F N"]
    targets: Int[Array, "B F targets"]
    """Those that others are merged into, ascending; meaningless where there is no target."""
    is_target: Bool[np.ndarray, "F targets"]
    """Frames may have different numbers of targets."""


def _choose(
    attention: Float[Array, "B F N"],
    dominant: Int[np.ndarray, "F"],
    contextual: Int[np.ndarray, "F"],
) -> _Chosen:
    """Chooses so many dominant tokens of each frame, and so many targets. Steps 2 and 3."""
    tokens, most = attention.shape[-1], contextual.max()
    step = (tokens - dominant) // np.maximum(contextual, 1)
    is_other = rank_in_row(attention) >= dominant[:, None]
    number = jnp.cumsum(is_other, axis=-1) - 1
    is_spaced = (number % step[:, None] == 0) & (number // step[:, None] < contextual[:, None])
    is_target = is_other & is_spaced
    targets = jnp.argsort(~is_target, axis=-1)[..., :most]
    return _Chosen(
        ~is_other | is_target, targets.astype(jnp.int32), np.arange(most) < contextual[:, None]
    )


def _contextual(
    features: Float[Array, "B F N D"], keys: Float[Array, "B F N E"], chosen: _Chosen
) -> Float[Array, "B F targets D"]:
    """The contextual token of each target, in the dtype of ``features``. Steps 3 and 4."""
    is_kept, targets, is_target = chosen
    keys = keys.astype(jnp.float32)
    length = jnp.sqrt((keys * keys).sum(-1, keepdims=True))
    keys = keys / jnp.maximum(length, jnp.finfo(jnp.float32).tiny)
    of_targets = jnp.take_along_axis(keys, targets[..., None], axis=2)
    similarity = jnp.einsum("BFNE,BFtE->BFNt", keys, of_targets, precision="highest")
    nearest = most_similar(similarity, jnp.asarray(is_target))

    merged = ~is_kept[..., None] & (nearest[..., None] == jnp.arange(targets.shape[-1]))
    sums = jnp.einsum(
        "BFNt,BFND->BFtD",
        merged.astype(features.dtype),
        features,
        precision="highest",
        preferred_element_type=jnp.float32,
    )
    means = sums / jnp.maximum(merged.sum(2), 1)[..., None]
    values = jnp.take_along_axis(features, targets[..., None], axis=2)
    return (values.astype(jnp.float32) + means).astype(features.dtype)
