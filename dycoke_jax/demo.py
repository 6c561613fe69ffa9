"""Compares answers, token counts and times with and without DyCoke, for ``dycoke-jax demo``."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from dycoke_jax.compression.protocol import Compressor
from dycoke_jax.engine.requests import Answer, Decoding, Seconds
from dycoke_jax.inputs.any_video import Video
from dycoke_jax.inputs.sampling import FrameSampling
from dycoke_jax.llava_video import LlavaVideo
from dycoke_jax.progress import Progress
from dycoke_jax.tasks.pictures import draw
from dycoke_jax.tasks.task import MONITORED, task_clip

KINDS = (
    ("colour", "direction", "describe"),
    ("count", "first", "list"),
    ("where", "brief", "describe"),
)
"""The kinds of questions that the demo asks about its first, second and third clip."""

_WIDTH = 110
"""Least width of the printed tables, in characters."""


@dataclass(frozen=True)
class Asked:
    """A question about a clip.

    Attributes:
        clip: name of the clip.
        video: the clip, as a file or as frames.
        question: text of the question.
        known: the right answer; None if it is not known.
    """

    clip: str
    video: Video
    question: str
    known: str | None = None


@dataclass(frozen=True)
class Side:
    """The answers to all questions with one compression, and their times.

    Attributes:
        answers: the answers, in the order of the questions.
        seconds: wall time of each stage of the batch: the median of all runs but the first.
        first_run: wall time of the first run in seconds; most of it is compilation.
    """

    answers: tuple[Answer, ...]
    seconds: Seconds
    first_run: float


def made_up(size: int) -> list[Asked]:
    """Questions about made-up clips of the test split, with their right answers.

    The clips are the first ones after those that training runs are evaluated on.

    Args:
        size: height and width of a frame in pixels.
    """
    asked = []
    for number, kinds in enumerate(KINDS):
        clip = task_clip("test", MONITORED + number)
        video = draw(clip.scene, size)
        for question in clip.questions:
            if question.kind in kinds:
                name = f"clip {number + 1}"
                asked.append(Asked(name, video, question.text, question.answer))
    return asked


def answer_all(
    model: LlavaVideo,
    asked: Sequence[Asked],
    compressions: dict[str, Compressor | None],
    *,
    sampling: FrameSampling,
    max_new_tokens: int = 96,
    runs: int = 3,
    progress: Progress | None = None,
) -> dict[str, Side]:
    """Answers all questions with each compression, and measures the times.

    The compressions take turns, so that a change in the load of the machine affects all of them.

    Args:
        model: the model that answers.
        asked: the questions, which run as one batch.
        compressions: compressions by name; None is the plain model.
        sampling: which frames of clips that are files to use.
        max_new_tokens: number of tokens after which an answer is cut off, at least 1.
        runs: number of timed runs with each compression, at least 1. One more run precedes them
            and compiles.
        progress: called after each run.

    Returns:
        Answers and times by the names of the compressions.
    """
    videos, prompts = [a.video for a in asked], [a.question for a in asked]
    answers: dict[str, list[Answer]] = {}
    seconds: dict[str, list[Seconds]] = {name: [] for name in compressions}
    total = (runs + 1) * len(compressions)
    for run in range(runs + 1):
        for place, (name, compression) in enumerate(compressions.items()):
            answers[name] = model.generate(
                videos,
                prompts,
                compression=compression,
                decoding=Decoding(max_new_tokens),
                sampling=sampling,
                batch_size=len(asked),
            )
            seconds[name].append(answers[name][0].seconds)
            if progress:
                progress(
                    "compiling" if run == 0 else "answering",
                    run * len(compressions) + place + 1,
                    total,
                )
    return {
        name: Side(
            tuple(answers[name]),
            Seconds(*(median(column) for column in zip(*map(_stages, timed[1:]), strict=True))),
            sum(_stages(timed[0])),
        )
        for name, timed in seconds.items()
    }


def verdict(asked: Sequence[Asked], side: Side) -> tuple[int, int]:
    """Number of right answers, and number of questions whose answer is known."""
    pairs = zip(asked, side.answers, strict=True)
    known = [answer.text.strip() == a.known for a, answer in pairs if a.known is not None]
    return sum(known), len(known)


def longest_of_each_clip(asked: Sequence[Asked]) -> list[Asked]:
    """Selects one question for each clip: the one with the longest known answer."""
    longest: dict[str, Asked] = {}
    for a in asked:
        before = longest.get(a.clip)
        if before is None or len(a.known or "") > len(before.known or ""):
            longest[a.clip] = a
    return list(longest.values())


def show(asked: Sequence[Asked], sides: dict[str, Side]) -> None:
    """Prints two tables: the answers, and the token counts, times and numbers of right answers."""
    console = Console(highlight=False)
    console.width = max(console.width, _WIDTH)
    answers = Table(show_lines=True)
    for column in ("clip", "question", "right answer", *sides):
        answers.add_column(column, overflow="fold")
    for number, a in enumerate(asked):
        texts = (_judged(side.answers[number].text, a.known) for side in sides.values())
        # Text instead of a string, because brackets in an answer would be read as markup.
        answers.add_row(a.clip, Text(a.question), Text(a.known or "unknown"), *texts)
    console.print(answers)

    costs = Table()
    for column in ("", *sides):
        costs.add_column(column, justify="right" if column else "left")
    for label, of_side in _COSTS.items():
        costs.add_row(label, *(of_side(side) for side in sides.values()))
    if any(a.known is not None for a in asked):
        rights = (verdict(asked, side) for side in sides.values())
        costs.add_row("right answers", *(f"{right} of {known}" for right, known in rights))
    console.print(costs)


def as_json(asked: Sequence[Asked], sides: dict[str, Side]) -> dict[str, Any]:
    """All answers, token counts and times as values that JSON can hold."""
    return {
        "questions": [{"clip": a.clip, "question": a.question, "known": a.known} for a in asked],
        "sides": {
            name: {
                "answers": [
                    {"text": answer.text, "tokens": asdict(answer.tokens)}
                    for answer in side.answers
                ],
                "right": verdict(asked, side)[0],
                "of": verdict(asked, side)[1],
                "seconds": asdict(side.seconds),
                "first_run": side.first_run,
            }
            for name, side in sides.items()
        },
    }


def _judged(text: str, known: str | None) -> Text:
    """The text of an answer, with a coloured mark where the right answer is known."""
    if known is None:
        return Text(text)
    is_right = text.strip() == known
    return Text(f"{text} {'✓' if is_right else '✗'}", style="green" if is_right else "red")


def _attended(side: Side) -> str:
    """Mean number of visual tokens that the pruned layers attended to in a decode step."""
    steps = [count for answer in side.answers for count in answer.tokens.attended]
    return f"{sum(steps) / len(steps):.0f}" if steps else "no step"


_COSTS: dict[str, Callable[[Side], str]] = {
    "visual tokens of a clip": lambda side: str(side.answers[0].tokens.visual),
    "after merging": lambda side: str(side.answers[0].tokens.merged),
    "attended per decode step (mean)": _attended,
    "vision, seconds": lambda side: f"{side.seconds.vision:.3f}",
    "prefill, seconds": lambda side: f"{side.seconds.prefill:.3f}",
    "decode, seconds": lambda side: f"{side.seconds.decode:.3f}",
    "first run, with compilation": lambda side: f"{side.first_run:.1f}",
}


def _stages(seconds: Seconds) -> tuple[float, float, float]:
    return seconds.vision, seconds.prefill, seconds.decode
