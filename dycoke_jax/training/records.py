"""A source of training data that reads the user's records."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np
from jaxtyping import UInt8

from dycoke_jax.errors import PromptError, RequestError, VideoError
from dycoke_jax.inputs import FrameSampling, count_frames, read_clip
from dycoke_jax.inputs.prompts import Tokenizer
from dycoke_jax.training.batches import Example, encode_part
from dycoke_jax.training.record_file import Record, raise_problems, read_records
from dycoke_jax.training.sources import BatchShape, StepData
from dycoke_jax.training.token_dropping import TokenDroppingMix

__all__ = ["Record", "RecordSource", "examples_of", "group_into_rows", "read_records"]


@dataclass(frozen=True)
class RecordSource:
    """A source (see ``sources.Source``) that reads records, in a new random order each epoch.

    Records of the same clip share rows, and so do records without a clip.

    Attributes:
        records: the records to train on, at least one.
        tokenizer: the tokenizer of the model.
        size: height and width of the input of the vision tower, in pixels.
        sampling: which frames of each clip are used.
        shape: sizes of a training step.
        dropping: shares of the steps that drop visual tokens.
        seed: seed of the order of the rows and of token dropping, 0 or more.
    """

    records: tuple[Record, ...]
    tokenizer: Tokenizer
    size: int
    sampling: FrameSampling
    shape: BatchShape
    dropping: TokenDroppingMix = field(default_factory=TokenDroppingMix)
    seed: int = 0

    @cached_property
    def rows(self) -> list[list[Record]]:
        """All records, grouped into rows, see ``group_into_rows``.

        With ``sampling.fps`` and several rows in a step, this counts the frames of all clips,
        because a step cannot hold clips that differ in their number of frames.

        Raises:
            RequestError: if a conversation is malformed, if a record alone does not fit into a row,
                or if clips of a step would differ in their number of frames.
            VideoError: if a clip cannot be read.
        """
        rows = group_into_rows(self.records, self.tokenizer, self.shape.width)
        if self.sampling.fps is not None and self.shape.examples > 1:
            self._check_frame_counts()
        return rows

    def _check_frame_counts(self) -> None:
        first: tuple[Path, int] | None = None
        clips = {record.video: record for record in self.records if record.video is not None}
        for path, record in clips.items():
            count = _count(record, self.sampling)
            if first is None:
                first = path, count
            elif count != first[1]:
                raise RequestError(
                    f"{path} gives {count} frames and {first[0]} {first[1]}; clips of a step need "
                    "equally many: leave out fps, or train on one clip a step"
                )

    def step(self, number: int) -> StepData:
        """The data of a step, see ``sources.Source.step``.

        Raises:
            RequestError: as ``rows`` does.
            VideoError: if a clip cannot be read.
        """
        count, first = self.shape.examples, number * self.shape.examples
        rows = [self._row(place) for place in range(first, first + count)]
        examples = examples_of(rows, self.sampling, self.size)
        batch = self.shape.pack(self.tokenizer, examples)
        return StepData(batch, self.dropping.choose(number, self.seed))

    def _row(self, place: int) -> list[Record]:
        """The row at a place of the endless sequence of epochs, from 0."""
        epoch, index = divmod(place, len(self.rows))
        order = np.random.default_rng([self.seed, epoch, 4]).permutation(len(self.rows))
        return self.rows[order[index]]


def group_into_rows(
    records: Sequence[Record], tokenizer: Tokenizer, width: int
) -> list[list[Record]]:
    """Groups records into rows.

    The records of a row have the same clip, or none, and the same text before it. A row holds as
    many of them as fit.

    Args:
        records: the records.
        tokenizer: the tokenizer of the model.
        width: slots of a row for questions and answers, in tokens.

    Returns:
        The rows; the records of one clip are in their order.

    Raises:
        RequestError: if conversations are malformed, or if records do not fit into a row; the
            message names the first ten of these.
    """
    rows: dict[tuple[Path | None, tuple[int, ...]], list[list[Record]]] = {}
    room: dict[tuple[Path | None, tuple[int, ...]], int] = {}
    problems = []
    for record in records:
        place = f"{record.place}: " if record.place else ""
        has_clip = record.video is not None
        try:
            part = encode_part(
                tokenizer, record.question, record.answer, record.further, has_clip=has_clip
            )
        except PromptError as error:
            problems.append(f"{place}{error}")
            continue
        used = len(part.ids)
        if used > width:
            about = f" about {record.video}" if has_clip else ""
            problems.append(
                f"{place}a question and its answer{about} take {used} tokens; width is {width}"
            )
            continue
        key = record.video, part.before
        if used > room.get(key, 0):
            rows.setdefault(key, []).append([])
            room[key] = width
        rows[key][-1].append(record)
        room[key] -= used
    raise_problems(problems)
    return [row for of_clip in rows.values() for row in of_clip]


def examples_of(
    rows: Sequence[Sequence[Record]], sampling: FrameSampling, size: int
) -> list[Example]:
    """Reads the clips of rows.

    Args:
        rows: records of one clip each, or without a clip.
        sampling: which frames of each clip are used.
        size: height and width of the input of the vision tower, in pixels.

    Returns:
        An example for each row. Those without a clip have as many black frames as the first clip
        has frames, or a single one if there is no clip at all.

    Raises:
        VideoError: if a clip cannot be read.
    """
    clips = [None if row[0].video is None else _read(row[0], sampling, size) for row in rows]
    black = np.zeros((1, size, size, 3), np.uint8)
    black = np.zeros_like(next((clip for clip in clips if clip is not None), black))
    return [
        Example(
            black if clip is None else clip,
            [record.question for record in row],
            [record.answer for record in row],
            [record.further for record in row],
            has_clip=clip is not None,
        )
        for row, clip in zip(rows, clips, strict=True)
    ]


def _read(record: Record, sampling: FrameSampling, size: int) -> UInt8[np.ndarray, "F size size 3"]:
    """The frames of a record's clip; an error names the record."""
    assert record.video is not None
    with _naming(record):
        return read_clip(record.video, sampling, size).frames


def _count(record: Record, sampling: FrameSampling) -> int:
    """The number of frames of a record's clip; an error names the record."""
    assert record.video is not None
    with _naming(record):
        return count_frames(record.video, sampling)


@contextmanager
def _naming(record: Record) -> Iterator[None]:
    """Puts the place of a record before the message of a VideoError."""
    try:
        yield
    except VideoError as error:
        place = f"{record.place}: " if record.place else ""
        raise VideoError(f"{place}{error}") from error
