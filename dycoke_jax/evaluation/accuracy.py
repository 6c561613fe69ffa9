"""Measures the accuracy of a model on the built-in task, by kind of question."""

import math
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from dycoke_jax.compression.protocol import Compressor
from dycoke_jax.engine.requests import Decoding
from dycoke_jax.inputs.any_video import Video
from dycoke_jax.inputs.sampling import FrameSampling
from dycoke_jax.llava_video import LlavaVideo
from dycoke_jax.progress import Progress
from dycoke_jax.tasks.clip_files import write_clip
from dycoke_jax.tasks.pictures import draw
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
        attended: mean number of visual tokens that the pruned layers attended to in a decode step.
    """

    name: str
    kinds: dict[str, Tally] = field(default_factory=lambda: defaultdict(Tally))
    visual: float = 0.0
    merged: float = 0.0
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
        through_files: encode each clip as an H.264 file, from which the model reads it.
        batch_size: number of questions that run together, at least 1.
        progress: called after each batch with the name of the setting and the number of questions
            answered so far.
    """
    frames = clips[0].scene.frames
    asked = [(index, question) for index, clip in enumerate(clips) for question in clip.questions]
    # A batch runs until its longest answer is done, and answers of a kind are about equally long.
    asked.sort(key=lambda entry: entry[1].kind)
    result = Result(name)
    attended: list[int] = []
    with _videos(model, clips, through_files) as video_of:
        for first in range(0, len(asked), batch_size):
            part = asked[first : first + batch_size]
            answers = model.generate(
                [video_of(index) for index, _ in part],
                [question.text for _, question in part],
                compression=compression,
                decoding=Decoding(max_new_tokens=96),
                sampling=FrameSampling(frames),
                batch_size=batch_size,
            )
            for (_, question), answer in zip(part, answers, strict=True):
                tally = result.kinds[question.kind]
                tally.asked += 1
                tally.right += answer.text.strip() == question.answer
                result.visual += answer.tokens.visual / len(asked)
                result.merged += answer.tokens.merged / len(asked)
                attended += answer.tokens.attended
            if progress:
                progress(name, first + len(part), len(asked))
    result.attended = sum(attended) / max(len(attended), 1)
    return result


@contextmanager
def _videos(
    model: LlavaVideo, clips: Sequence[TaskClip], through_files: bool
) -> Iterator[Callable[[int], Video]]:
    """Yields a function that returns a clip by its number, as frames or as a file.

    The files are removed at the end of the block.
    """
    if not through_files:
        yield lambda index: draw(clips[index].scene, model.config.vision.image_size)
        return
    with tempfile.TemporaryDirectory() as folder:

        def file(index: int) -> Path:
            path = Path(folder) / f"{index}.mp4"
            if not path.exists():
                write_clip(path, draw(clips[index].scene, FILE_SIZE))
            return path

        yield file
