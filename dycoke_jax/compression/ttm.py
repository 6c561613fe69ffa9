"""Temporal token merging, stage 1 of DyCoke (paper, sec. 3.2 and eq. 3)."""

from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from dycoke_jax.compression.budget import kept_of
from dycoke_jax.compression.protocol import Compression, Rows, TokenStage
from dycoke_jax.compression.similarity import cosine
from dycoke_jax.config import LlavaConfig
from dycoke_jax.errors import ConfigError

Mode = Literal["paper", "official"]


@dataclass(frozen=True)
class TokenMerging(TokenStage):
    """Temporal token merging as a token stage (``protocol.TokenStage``); see ``select``.

    Attributes:
        k: share of a compared frame's tokens that is dropped, in [0, 1).
        mode: ``paper`` or ``official``, see ``DyCoke.mode``.
    """

    k: float
    mode: Mode = "paper"

    @property
    def stages(self) -> Compression:
        """A token stage."""
        return Compression(tokens=self)

    def check(self, config: LlavaConfig, frames: int) -> None:
        """Refuses models and clips on which the published code fails, in mode ``official``."""
        if self.mode == "official" and config.newline != "one_token":
            raise ConfigError(
                "DyCoke: mode official covers the one_token newline layout only: the published "
                f"code never merges tokens in the {config.newline} layout and fails at the first "
                "decoding step; use mode paper"
            )
        if self.mode == "official" and frames < 5:
            raise ConfigError(
                f"DyCoke: mode official needs at least 5 frames, not {frames}: the published code "
                "fails on shorter clips; use mode paper"
            )

    def kept(self, tokens: int) -> int:
        """Number of tokens that a compared frame of this many tokens keeps."""
        if self.mode == "official":
            return int((1 - self.k) * tokens)  # the published expression, float rounding included
        return kept_of(tokens, self.k)

    def most_rows(self, frames: int, tokens: int) -> int:
        """Number of tokens that are kept of a clip; the largest for any clip up to this length."""
        return most_rows(frames, tokens, self.kept(tokens), official=self.mode == "official")

    def select(
        self,
        features: Float[Array, "B F N D"],
        frames: Int[Array, "B"],
        signals: tuple[Float[Array, "B F N ..."], ...] = (),
    ) -> Rows:
        """Drops the redundant tokens; see ``protocol.TokenStage`` and ``select``."""
        kept = self.kept(features.shape[2])
        return select(features, frames, kept, official=self.mode == "official")


def most_rows(frames: int, tokens: int, kept: int, *, official: bool = False) -> int:
    """The largest number of tokens that ``select`` keeps of a clip of up to this many frames.

    Args:
        frames: frames of a clip.
        tokens: visual tokens of a frame (N).
        kept: as for ``select``.
        official: as for ``select``.
    """

    def rows(frames: int) -> int:
        compared = len(_references(frames, official))
        return (_last(frames, official) - compared) * tokens + compared * kept

    # In the published code a clip may keep more than one that is a frame longer.
    return max(rows(length) for length in (range(1, frames + 1) if official else [frames]))


def select(
    features: Float[Array, "B F N D"],
    frames: Int[Array, "B"],
    kept: int,
    *,
    official: bool = False,
) -> Rows:
    """Selects the visual tokens that enter the language model.

    Frames are taken in windows of four, f0 f1 f2 f3. All tokens of f0 are kept. f1 is compared with
    f0, f3 with f2 and f2 with f0, token by token at the same place, and the ``kept`` tokens of the
    compared frame with the lowest similarity are kept. Nothing is averaged: merging means that the
    redundant copy is dropped. A short last window follows the same rules for its frames.

    It is one vectorised operation, because F alone says which frames are compared.

    Args:
        features: pooled visual tokens of B clips without newlines, of any float dtype; similarity
            is computed in float32.
        frames: number of frames of each clip, at most F; the others are empty and keep nothing.
        kept: number of tokens to keep of each compared frame, in 0..N.
        official: follow the published code instead: the kept tokens of a frame are in order of
            ascending similarity, the third frame of a last, full window is kept whole, and the
            last of an odd number of frames is dropped. A clip must have at least 5 frames.

    Returns:
        Places among the F * N tokens of each clip, frame by frame; within a frame in raster order
        (``official``: ascending similarity). Equal similarities are resolved by the lower place
        first; identical tokens have similarity exactly 1.
    """
    batch, length, tokens, _ = features.shape
    reference = _references(length, official=False)
    # In the published code the number of frames decides whether a third frame is compared or whole.
    thirds = {*range(2, length, 4)} if official else set()
    whole = np.array(sorted({*range(length)} - {*reference} | thirds), np.int32)
    compared, similarity = _compare(features, reference)
    _, places = jax.lax.top_k(-similarity, kept)
    if not official:
        places = jnp.sort(places, axis=-1)

    # Both kinds of frames side by side, then one static permutation that puts frames in order.
    of_whole = whole[:, None] * tokens + np.arange(tokens, dtype=np.int32)
    of_compared = places.astype(jnp.int32) + (compared * tokens)[None, :, None]
    candidates = jnp.concatenate(
        [
            jnp.broadcast_to(jnp.asarray(of_whole).reshape(1, -1), (batch, of_whole.size)),
            of_compared.reshape(batch, -1),
        ],
        axis=1,
    )
    frame_of = np.concatenate([np.repeat(whole, tokens), np.repeat(compared, kept)])
    is_whole = np.arange(frame_of.size) < of_whole.size
    order = np.argsort(frame_of, kind="stable")
    candidates, frame_of, is_whole = candidates[:, order], frame_of[order], is_whole[order]
    count = jnp.asarray(frames)[:, None]
    if not official:
        return Rows(candidates, jnp.asarray(frame_of) < count)

    of_its_kind = (frame_of % 4 != 2) | (is_whole == (frame_of >= count - 2))
    valid = (frame_of < _last(count, official)) & of_its_kind
    # The empty rows of each clip behind its others.
    most = most_rows(length, tokens, kept, official=True)
    first = jnp.argsort(~valid, axis=1, stable=True)[:, :most]
    candidates, valid = (jnp.take_along_axis(x, first, axis=1) for x in (candidates, valid))
    return Rows(candidates, valid)


def similarity_map(
    features: Float[Array, "B F N D"], *, official: bool = False
) -> Float[Array, "B F N"]:
    """The similarities by which ``select`` decides.

    Args:
        features: as for ``select``.
        official: as for ``select``.

    Returns:
        Cosine similarity in float32 of each token and the token that it is compared with; NaN in
        frames that are compared with none.
    """
    batch, frames, tokens, _ = features.shape
    compared, similarity = _compare(features, _references(frames, official))
    return jnp.full((batch, frames, tokens), jnp.nan).at[:, compared].set(similarity)


def _compare(
    features: Float[Array, "B F N D"], reference: dict[int, int]
) -> tuple[Int[np.ndarray, "compared"], Float[Array, "B compared N"]]:
    """The compared frames in ascending order, and the similarity of each of their tokens."""
    compared = np.array(sorted(reference), np.int32)
    others = np.array([reference[f] for f in sorted(reference)], np.int32)
    return compared, cosine(features[:, compared], features[:, others])


def _last(frames: Any, official: bool) -> Any:
    """Number of frames that are looked at."""
    return frames - frames % 2 if official else frames


def _references(frames: int, official: bool) -> dict[int, int]:
    """The frame with which each compared frame is compared."""
    odd = {f: f - 1 for f in range(1, frames, 2)}
    third = {f: f - 2 for f in range(2, frames, 4)}
    if official:
        # The published loop runs over range(0, F - 4, 4) and so misses a last, full window.
        third = {f: other for f, other in third.items() if other < frames - 4}
    return odd | third
