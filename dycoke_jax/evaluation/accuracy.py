"""Measures the accuracy of a model on the built-in task, by kind of question."""

import math
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

import numpy as np
from jaxtyping import UInt8

from dycoke_jax.compression.protocol import Compressor
from dycoke_jax.engine.requests import Decoding, Failure, Request, TokenCounts
from dycoke_jax.evaluation.settings import read_on_average
from dycoke_jax.inputs.any_video import Video
from dycoke_jax.inputs.sampling import FrameSampling, frame_indices
from dycoke_jax.llava_video import LlavaVideo
from dycoke_jax.progress import Progress
from dycoke_jax.tasks.clip_files import write_clip
from dycoke_jax.tasks.pictures import draw
from dycoke_jax.tasks.questions import Question
from dycoke_jax.tasks.task import TaskClip

FILE_SIZE = 256
"""Height and width in pixels of clips that are written as files."""


@dataclass
class Tally:
    """Counts answers.

    Attributes:
        right: number of right answers.
        asked: number of questions.
    """

    right: int = 0
    asked: int = 0

    @property
    def accuracy(self) -> float:
        """Share of right answers, in [0, 1]; at least one question must have been asked."""
        return self.right / self.asked

    @property
    def interval(self) -> tuple[float, float]:
        """Lower and upper end of Wilson's 95 % confidence interval of the accuracy."""
        z, n, p = 1.959964, self.asked, self.accuracy
        middle = (p + z * z / (2 * n)) / (1 + z * z / n)
        half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
        return middle - half, middle + half


@dataclass
class Result:
    """Accuracy and token counts with one compression setting.

    Attributes:
        name: name of the setting.
        kinds: numbers of right answers and questions, by kind of question.
        visual: mean number of visual tokens of a clip before compression.
        merged: mean number of visual tokens that entered the language model.
        read: mean number of visual tokens that a layer read in prefill; less than ``merged`` where
            a method drops or merges some inside prefill.
        attended: mean number of visual tokens that the pruned layers attended to in a decode step.
    """

    name: str
    kinds: dict[str, Tally] = field(default_factory=lambda: defaultdict(Tally))
    visual: float = 0.0
    merged: float = 0.0
    read: float = 0.0
    attended: float = 0.0

    @property
    def whole(self) -> Tally:
        """Numbers of right answers and questions of all kinds together."""
        tallies = self.kinds.values()
        return Tally(sum(t.right for t in tallies), sum(t.asked for t in tallies))


def evaluate(
    model: LlavaVideo,
    clips: Sequence[TaskClip],
    name: str,
    compression: Compressor | None,
    *,
    frames: int | None = None,
    through_files: bool = False,
    batch_size: int = 32,
    progress: Progress | None = None,
) -> Result:
    """Measures the accuracy with one compression setting.

    An answer is right if it equals the known one word for word.

    Args:
        model: the model that answers.
        clips: at least one clip; all have the same number of frames.
        name: name of the setting.
        compression: the compression; None is the plain model.
        frames: number of frames that are sampled of each clip, spread evenly; None for all.
        through_files: encode each clip as an H.264 file, from which the model reads it.
        batch_size: number of questions that run together, at least 1.
        progress: called after each answer with the name of the setting and the number of questions
            answered so far.
    """
    sampling = FrameSampling(clips[0].scene.frames if frames is None else frames)
    asked = list(_in_order(clips, batch_size))
    result, counts = Result(name), []
    with _videos(model, clips, through_files, sampling, batch_size) as video_of:
        requests = (
            Request(question.text, video_of(clip), Decoding(max_new_tokens=96), sampling)
            for clip, question in asked
        )
        run = model.run(requests, compression=compression, batch_size=batch_size)
        with closing(run):
            for piece in run:
                if isinstance(piece, Failure):
                    raise piece.error
                if piece.answer is None:
                    continue
                _, question = asked[piece.index]
                tally = result.kinds[question.kind]
                tally.asked += 1
                tally.right += piece.answer.text.strip() == question.answer
                counts.append(piece.answer.tokens)
                if progress:
                    progress(name, len(counts), len(asked))
    _count(result, counts, compression, model.config.text.num_layers)
    return result


def _in_order(clips: Sequence[TaskClip], batch_size: int) -> Iterator[tuple[int, Question]]:
    """The numbers of clips and their questions, in an order in which they are answered fast.

    A batch runs until its longest answer is done, and answers of a kind are about equally long, so
    questions of a kind follow each other. But those on a few clips come before those on the next,
    so that few clips are needed at a time: as many as give a batch of each kind.
    """
    for first in range(0, len(clips), batch_size):
        numbers = range(first, min(first + batch_size, len(clips)))
        asked = [(number, question) for number in numbers for question in clips[number].questions]
        yield from sorted(asked, key=lambda entry: entry[1].kind)


def _count(
    result: Result, counts: Sequence[TokenCounts], compression: Compressor | None, layers: int
) -> None:
    """Fills in the mean numbers of tokens."""
    result.visual = sum(tokens.visual for tokens in counts) / len(counts)
    result.merged = sum(tokens.merged for tokens in counts) / len(counts)
    attended = [number for tokens in counts for number in tokens.attended]
    result.attended = sum(attended) / max(len(attended), 1)
    # Where no cache is pruned, decode steps attend to what has gone on from a prompt stage.
    is_kept = compression is None or compression.stages.cache is None
    read = [
        read_on_average(
            compression,
            layers,
            tokens.merged,
            tokens.attended[0] if is_kept and tokens.attended else None,
        )
        for tokens in counts
    ]
    result.read = float(sum(read) / len(read))


@contextmanager
def _videos(
    model: LlavaVideo,
    clips: Sequence[TaskClip],
    through_files: bool,
    sampling: FrameSampling,
    most: int,
) -> Iterator[Callable[[int], Video]]:
    """Yields a function that returns a clip by its number, as sampled frames or as a file.

    The frames of ``most`` clips are kept at a time. The files are removed at the end of the block.
    """
    if not through_files:

        @lru_cache(maxsize=most)
        def drawn(number: int) -> UInt8[np.ndarray, "F side side 3"]:
            frames = draw(clips[number].scene, model.config.vision.image_size)
            return frames[frame_indices(len(frames), 1.0, sampling)]

        yield drawn
        return
    with tempfile.TemporaryDirectory() as folder:

        def file(number: int) -> Path:
            path = Path(folder) / f"{number}.mp4"
            if not path.exists():
                write_clip(path, draw(clips[number].scene, FILE_SIZE))
            return path

        yield file
