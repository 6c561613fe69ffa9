"""The user's training data: a JSONL file of clips, questions and answers."""

import json
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np

from dycoke_jax.errors import RequestError
from dycoke_jax.inputs.prompts import Conversation, Tokenizer
from dycoke_jax.inputs.sampling import FrameSampling
from dycoke_jax.inputs.video import check_clip, read_clip
from dycoke_jax.training.batches import Example, token_count
from dycoke_jax.training.sources import BatchShape, StepData
from dycoke_jax.training.token_dropping import TokenDroppingMix


@dataclass(frozen=True)
class Record:
    """One line of a training file.

    Attributes:
        video: path of the clip.
        question: the question as a text, or the turns of a conversation before the answer.
        answer: the right answer.
    """

    video: Path
    question: Conversation
    answer: str


def read_records(path: Path) -> list[Record]:
    """Reads a JSONL file whose lines are ``{"video": ..., "question": ..., "answer": ...}``.

    Empty lines are ignored. ``question`` is a text, or a conversation as
    ``inputs.prompts.build_prompt`` takes it.

    Args:
        path: the file, in UTF-8. Relative paths of videos start at its folder.

    Returns:
        At least one record, in the order of the lines.

    Raises:
        RequestError: if the file cannot be read, holds no record, or has faulty lines; the message
            names the first ten of these.
        VideoError: if a clip cannot be opened.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise RequestError(f"{path} cannot be read ({error})") from None
    records, problems = [], []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            records.append(_record(json.loads(line), path.parent))
        except ValueError as error:
            problems.append(f"line {number}: {error}")
    if problems:
        more = f" (and {len(problems) - 10} more)" if len(problems) > 10 else ""
        raise RequestError(f"{path}: " + "; ".join(problems[:10]) + more)
    if not records:
        raise RequestError(f"{path} holds no record")
    for video in dict.fromkeys(record.video for record in records):
        check_clip(video)
    return records


def _record(values: object, folder: Path) -> Record:
    if not isinstance(values, dict):
        raise ValueError("not an object")
    for key in ("video", "question", "answer"):
        if key not in values:
            raise ValueError(f"has no {key}")
    if not isinstance(values["video"], str) or not isinstance(values["answer"], str):
        raise ValueError("video and answer must be texts")
    return Record(folder / values["video"], values["question"], values["answer"])


@dataclass(frozen=True)
class RecordSource:
    """A source (see ``sources.Source``) that reads records, in a new random order each epoch.

    Records of the same clip share rows.

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
        """All records, grouped into rows: each holds as many records of one clip as fit.

        Raises:
            RequestError: if a record alone does not fit into a row.
            PromptError: if a conversation is malformed or an answer is empty.
        """
        rows: dict[Path, list[list[Record]]] = {}
        room: dict[Path, int] = {}
        for record in self.records:
            used = token_count(self.tokenizer, record.question, record.answer)
            if used > self.shape.width:
                raise RequestError(
                    f"a question and its answer about {record.video} take {used} tokens; "
                    f"width is {self.shape.width}"
                )
            if used > room.get(record.video, 0):
                rows.setdefault(record.video, []).append([])
                room[record.video] = self.shape.width
            rows[record.video][-1].append(record)
            room[record.video] -= used
        return [row for of_clip in rows.values() for row in of_clip]

    def step(self, number: int) -> StepData:
        """The data of a step, see ``sources.Source.step``.

        Raises:
            RequestError: if the clips of the step differ in their number of frames, which can
                happen if ``sampling.fps`` is set; or as ``rows`` does.
            PromptError: as ``rows`` does.
            VideoError: if a clip cannot be read.
        """
        count, first = self.shape.examples, number * self.shape.examples
        rows = [self._row(place) for place in range(first, first + count)]
        examples = [self._example(row) for row in rows]
        for row, example in zip(rows, examples, strict=True):
            if len(example.frames) != len(examples[0].frames):
                raise RequestError(
                    f"{row[0].video} gives {len(example.frames)} frames and {rows[0][0].video} "
                    f"{len(examples[0].frames)}; clips of a step need equally many: leave out "
                    "fps, or train on one clip a step"
                )
        batch = self.shape.pack(self.tokenizer, examples)
        return StepData(batch, self.dropping.choose(number, self.seed))

    def _row(self, place: int) -> list[Record]:
        """The row at a place of the endless sequence of epochs, from 0."""
        epoch, index = divmod(place, len(self.rows))
        order = np.random.default_rng([self.seed, epoch, 4]).permutation(len(self.rows))
        return self.rows[order[index]]

    def _example(self, row: list[Record]) -> Example:
        clip = read_clip(row[0].video, self.sampling, self.size)
        return Example(clip.frames, [r.question for r in row], [r.answer for r in row])
