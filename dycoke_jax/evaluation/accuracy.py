"""Accuracy of a model on the built-in task, by kind of question and setting of compression."""

import math
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from dycoke_jax.compression.protocol import Compressor
from dycoke_jax.llava_video import Answer, LlavaVideo, Video
from dycoke_jax.progress import Progress
from dycoke_jax.tasks.clip_files import write_clip
from dycoke_jax.tasks.pictures import draw
from dycoke_jax.tasks.task import TaskClip

FILE_SIZE = 256
"""Pixels a side of clips that are written as files."""


@dataclass
class Tally:
    """Right answers of those asked."""

    right: int = 0
    asked: int = 0

    @property
    def accuracy(self) -> float:
        """Share of right answers."""
        return self.right / self.asked

    @property
    def interval(self) -> tuple[float, float]:
        """Wilson's 95 % confidence interval of the accuracy."""
        z, n, p = 1.959964, self.asked, self.accuracy
        middle = (p + z * z / (2 * n)) / (1 + z * z / n)
        half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
        return middle - half, middle + half


@dataclass
class Result:
    """What one setting scored.

    Attributes:
        name: of the setting.
        kinds: tally of each kind of question.
        visual: visual tokens of a clip.
        merged: those that entered the language model.
        attended: mean number that pruned layers attended to in a decoding step.
    """

    name: str
    kinds: dict[str, Tally] = field(default_factory=lambda: defaultdict(Tally))
    visual: float = 0.0
    merged: float = 0.0
    attended: float = 0.0

    @property
    def whole(self) -> Tally:
        """All questions together."""
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
    """Asks all questions of all clips; an answer is right if it is the known one, word for word.

    Args:
        model: to be asked.
        clips: of the test split, all of the same length.
        name: of the setting.
        compression: the setting.
        through_files: write each clip as an H.264 file and let the model read that.
        batch_size: questions that run together.
        progress: told of questions answered after each batch, under the setting's name.
    """
    frames = clips[0].scene.frames
    asked = [(index, question) for index, clip in enumerate(clips) for question in clip.questions]
    # Answers of a kind are about equally long: a batch waits for its longest.
    asked.sort(key=lambda entry: entry[1].kind)
    result = Result(name)
    attended: list[int] = []
    with _videos(model, clips, through_files) as video_of:
        for first in range(0, len(asked), batch_size):
            part = asked[first : first + batch_size]
            answers: list[Answer] = model.generate(
                [video_of(index) for index, _ in part],
                [question.text for _, question in part],
                compression=compression,
                frames=frames,
                batch_size=batch_size,
                max_new_tokens=96,
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
    """Gives the clip of a number, as frames or as a file that lasts as long as the block."""
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
