"""The user's training data: a file of clips, questions and answers."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dycoke_jax.errors import DycokeError, PromptError, RequestError, VideoError, printable
from dycoke_jax.inputs.prompts import Conversation, check_prompt
from dycoke_jax.inputs.video import check_clip
from dycoke_jax.training.conversations import read_conversation
from dycoke_jax.training.json_records import read_json_records


@dataclass(frozen=True)
class Record:
    """A question or conversation with its answers.

    Attributes:
        video: path of the clip or picture. None: there is no clip.
        question: the question as a text, or the turns of a conversation before the answer.
        answer: the right answer.
        further: the further questions of the conversation with their answers, in order.
        place: where the record is, for messages, such as "line 3 of records.jsonl". It does not
            count in comparisons.
    """

    video: Path | None
    question: Conversation
    answer: str
    further: tuple[tuple[str, str], ...] = ()
    place: str = field(default="", compare=False)


def read_records(path: Path) -> list[Record]:
    """Reads records of a JSON Lines file, or of a file with one JSON array.

    A record has one of two forms, and its other keys are ignored:

    - ``{"video": ..., "question": ..., "answer": ...}``, in which ``question`` is a text, or a
      conversation as ``inputs.prompts.build_prompt`` takes it;
    - ``{"video": ..., "conversations": [{"from": ..., "value": ...}, ...]}``, LLaVA's form, see
      ``conversations.read_conversation``. Without a clip it is a record of text alone.

    In both, ``image`` may stand in the place of ``video``. A picture is a clip of one frame, which
    is sampled as often as the frames of a clip.

    Args:
        path: the file, see ``json_records.read_json_records``. Relative paths of clips start at its
            folder.

    Returns:
        At least one record, in the order of the file.

    Raises:
        RequestError: if the file cannot be read, holds no record, or has faulty records; the
            message names the first ten of these.
        VideoError: if clips cannot be opened or pictures cannot be decoded; the message names the
            first ten records with such.
    """
    records: list[Record] = []
    problems: list[str] = []
    for place, values in read_json_records(path):
        try:
            record = _record(values, path.parent)
        except (ValueError, PromptError) as error:
            problems.append(f"{place}: {error}")
        else:
            records.append(dataclasses.replace(record, place=f"{place} of {path.name}"))
    raise_problems(problems, RequestError, f"{path}: ")
    if not records:
        raise RequestError(f"{path} holds no record")
    checked: set[Path] = set()
    for record in records:
        if record.video is None or record.video in checked:
            continue
        checked.add(record.video)
        try:
            check_clip(record.video)
        except VideoError as error:
            problems.append(f"{record.place}: {error}")
    raise_problems(problems, VideoError)
    return records


def raise_problems(
    problems: Sequence[str], error: type[DycokeError] = RequestError, start: str = ""
) -> None:
    """Raises one error of one line for the first ten of the problems, if there are any.

    Args:
        problems: messages, which may hold control characters of the user's data.
        error: the class of exception to raise.
        start: beginning of the message.

    Raises:
        DycokeError: of class ``error``.
    """
    if problems:
        more = f" (and {len(problems) - 10} more)" if len(problems) > 10 else ""
        raise error(printable(start + "; ".join(problems[:10])) + more)


def _record(values: object, folder: Path) -> Record:
    """Takes a record apart.

    Raises:
        ValueError: if the record is faulty; or PromptError, if its question is.
    """
    if isinstance(values, ValueError):
        raise values
    if not isinstance(values, dict):
        raise ValueError("not an object")
    if "conversations" in values:
        clip = _clip(values, folder)
        turns = values["conversations"]
        question, answer, further = read_conversation(turns, has_clip=clip is not None)
        return Record(clip, question, answer, further)
    for key in ("question", "answer"):
        if key not in values:
            raise ValueError(f"has no {key}")
    clip = _clip(values, folder)
    if clip is None:
        raise ValueError("has no video")
    question, answer = values["question"], values["answer"]
    if not isinstance(answer, str):
        raise ValueError("video and answer must be texts")
    if not answer.strip():
        raise ValueError("the answer is empty; give the text that the model should say")
    is_turns = isinstance(question, list) and all(isinstance(turn, dict) for turn in question)
    if not isinstance(question, str) and not is_turns:
        raise ValueError("the question must be a text, or a list of messages before the answer")
    check_prompt(question, has_video=True)
    return Record(clip, question, answer)


def _clip(values: dict[str, Any], folder: Path) -> Path | None:
    """The path of the clip or picture of a record; None if it has none."""
    named = [key for key in ("video", "image") if values.get(key) is not None]
    if not named:
        return None
    if len(named) > 1:
        raise ValueError("has a video and an image; one clip is supported")
    key = named[0]
    name = values[key]
    if isinstance(name, list):
        if len(name) != 1:
            raise ValueError(f"{key} is a list of {len(name)}; one clip is supported")
        name = name[0]
    if not isinstance(name, str):
        raise ValueError(
            "video and answer must be texts" if key == "video" else "image must be a text"
        )
    if not name.strip() or "\0" in name:
        raise ValueError(f"{key} is no path of a file: {name[:40]!r}")
    return folder / name
