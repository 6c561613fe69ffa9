"""What the token stage of a method keeps of a clip: the places of its rows, and which are merged.

    kept = kept_of_clip(model.model, clip.frames, parse_compression("vidcom2(budget=0.25)"))
    kept.places       # where each row stands among the visual tokens of the clip
    kept.is_merged    # which rows are new, made of several tokens

All of it is read off the ``Rows`` that the stage gives, whatever the method. The language model is
not run, so nothing is asked about the clip.
"""

from dataclasses import dataclass

import jax
import numpy as np
from jaxtyping import Bool, Int, UInt8

from dycoke_jax.compression.protocol import (
    Compression,
    Compressor,
    Rows,
    TokenStage,
    check_compressor,
)
from dycoke_jax.engine.batch import frame_bucket
from dycoke_jax.errors import RequestError
from dycoke_jax.generation.encode import Features, encode
from dycoke_jax.inspection.coverage import covered
from dycoke_jax.model import Model


@dataclass(frozen=True, eq=False)
class Kept:
    """The rows that a token stage lets into the language model.

    Attributes:
        frames: the part of each frame that visual tokens stand for, RGB.
        grid: numbers of rows and columns of the visual tokens of a frame.
        places: place of each row among the F * N visual tokens of the clip, in the order in which
            the language model reads them.
        is_merged: rows with an embedding of their own, which differs from that of the token at
            their place in at least one bit. Which tokens it was made of is not known.
        not_shown: what the method does later, which depends on the question, in words; None if it
            does nothing more.
    """

    frames: UInt8[np.ndarray, "F height width 3"]
    grid: tuple[int, int]
    places: Int[np.ndarray, "M"]
    is_merged: Bool[np.ndarray, "M"]
    not_shown: str | None

    @property
    def visual(self) -> int:
        """Number of visual tokens of the clip before compression (F * N)."""
        return len(self.frames) * self.grid[0] * self.grid[1]

    @property
    def kept(self) -> Bool[np.ndarray, "F N"]:
        """Tokens at whose place a row stands, merged or not; the others are dropped."""
        return self._marks(self.places)

    @property
    def merged(self) -> Bool[np.ndarray, "F N"]:
        """Tokens at whose place a merged row stands."""
        return self._marks(self.places[self.is_merged])

    @property
    def numbers_of_frames(self) -> list[tuple[int, int]]:
        """Number of rows that stand in each frame, and how many of them are merged."""
        frame_of = self.places // (self.grid[0] * self.grid[1])
        rows, merged = (
            np.bincount(frames, minlength=len(self.frames)).tolist()
            for frames in (frame_of, frame_of[self.is_merged])
        )
        return list(zip(rows, merged, strict=True))

    def counts(self) -> str:
        """The numbers of the whole clip, as text: ``40 of 128, 3 merged``."""
        return _in_words(len(self.places), self.visual, int(self.is_merged.sum()))

    def counts_of_frames(self) -> list[str]:
        """The numbers of each frame, as text."""
        tokens = self.grid[0] * self.grid[1]
        return [_in_words(rows, tokens, merged) for rows, merged in self.numbers_of_frames]

    def _marks(self, places: Int[np.ndarray, "places"]) -> Bool[np.ndarray, "F N"]:
        marks = np.zeros(self.visual, bool)
        marks[places] = True
        return marks.reshape(len(self.frames), -1)


def with_token_stage(compression: Compressor | None, name: str) -> Compressor:
    """Refuses a method without a token stage, and gives back any other.

    Args:
        compression: the method; None is the plain model.
        name: what the message calls it.

    Raises:
        RequestError: if ``compression`` is no compressor or has no token stage.
    """
    check_compressor(compression)
    if compression is None or compression.stages.tokens is None:
        raise RequestError(
            f"{name} neither drops nor merges tokens before the language model, so there is "
            "nothing to show; what acts later depends on the question: `dycoke-jax demo --video "
            "... --prompt ... --compress ...` draws which tokens are attended to"
        )
    return compression


def kept_of_clip(
    model: Model, frames: UInt8[np.ndarray, "F size size 3"], compression: Compressor
) -> Kept:
    """Encodes a clip, and runs the token stage of a method on it.

    The vision tower runs as it does for an answer, padded to the same number of frames, so that the
    stage sees the same values.

    Args:
        model: the model, on a single device.
        frames: at least one frame, resized to the model's input, RGB.
        compression: a method with a token stage. Only this stage is looked at.

    Raises:
        RequestError: if ``compression`` is no compressor or has no token stage.
        ConfigError: if the token stage cannot work on this model or clip length.
    """
    stage = with_token_stage(compression, repr(compression)).stages.tokens
    assert stage is not None
    stage.check(model.config, len(frames))
    features = encode(model, [frames], 1, frame_bucket(len(frames)), stage.signals)
    tokens, rows = jax.device_get((features.tokens[0], _select(stage, features)))
    places = rows.places[0]
    is_merged = np.zeros(len(places), bool)
    if rows.embeds is not None:
        of_places = tokens.reshape(-1, tokens.shape[-1])[places]
        is_merged = _differ(rows.embeds[0].astype(tokens.dtype), of_places)
    if rows.valid is not None:
        places, is_merged = places[rows.valid[0]], is_merged[rows.valid[0]]
    return Kept(
        frames=covered(frames, model.config),
        grid=model.config.frame_grid,
        places=places,
        is_merged=is_merged,
        not_shown=_later(compression.stages),
    )


@jax.jit(static_argnames="stage")
def _select(stage: TokenStage, features: Features) -> Rows:
    return stage.select(features.tokens, features.frames, features.signals)


# The dtype may be bfloat16, which jaxtyping does not find among the floats of NumPy.
def _differ(a: np.ndarray, b: np.ndarray) -> Bool[np.ndarray, "rows"]:
    """Which rows of two arrays of one shape and dtype differ in at least one bit."""
    return (np.ascontiguousarray(a).view(np.uint8) != b.view(np.uint8)).any(-1)


def _in_words(rows: int, tokens: int, merged: int) -> str:
    return f"{rows} of {tokens}, {merged} merged" if merged else f"{rows} of {tokens}"


def _later(stages: Compression) -> str | None:
    """What the stages do that come after the token stage, in words."""
    later = [("inside prefill", stages.prompt), ("while decoding", stages.cache)]
    where = [words for words, stage in later if stage is not None]
    return f"what it does {' and '.join(where)}" if where else None
