"""Conversations in the form of LLaVA's training data, ``[{"from": ..., "value": ...}, ...]``.

The rules are those of ``preprocess_multimodal`` and ``preprocess_qwen`` in ``llava/train/train.py``
of LLaVA-NeXT: the mark of the clip goes to the front of its turn, a newline follows it, and every
answer is a target. Three things differ. A newline follows the mark also where the text follows it
directly, as in every prompt of this package. A first turn from system, at which LLaVA-NeXT fails,
replaces the default system turn. A first turn from gpt, which LLaVA-NeXT leaves out, is refused.
"""

from dycoke_jax.inputs.prompts import Conversation

MARKS = ("<image>", "<video>")
"""Texts that mark the place of the clip. LLaVA-NeXT writes ``<image>`` for videos too."""


def read_conversation(
    turns: object, *, has_clip: bool
) -> tuple[Conversation, str, tuple[tuple[str, str], ...]]:
    """Checks a conversation and takes it apart.

    Args:
        turns: the value of ``conversations`` in a record: an optional turn from system, then
            alternate turns from human and gpt, of which the last is from gpt.
        has_clip: whether the record names a clip. If it does, the first human turn may hold one
            mark. The clip is placed in front of that turn with or without it.

    Returns:
        The first question as ``inputs.prompts.build_prompt`` takes it, its answer, and the further
        questions with their answers.

    Raises:
        ValueError: naming the first turn that is malformed or not supported.
    """
    if not isinstance(turns, list) or not turns:
        raise ValueError("conversations must be a list of at least two turns")
    texts = [_text(turn, number) for number, turn in enumerate(turns, start=1)]
    starts_with_system = turns[0]["from"] == "system"
    first = int(starts_with_system)
    for place, turn in enumerate(turns[first:]):
        expected = "gpt" if place % 2 else "human"
        if turn["from"] != expected:
            raise ValueError(
                f"turn {first + place + 1} is from {turn['from']}; it must be from {expected}"
            )
    if (len(turns) - first) % 2 or len(turns) == first:
        raise ValueError("the conversation must end with an answer from gpt")

    marks = [sum(text.count(mark) for mark in MARKS) for text in texts]
    if sum(marks) > 1:
        raise ValueError(
            f"the conversation holds {sum(marks)} marks ({' or '.join(MARKS)}); one is supported"
        )
    if sum(marks) and not has_clip:
        raise ValueError(
            f"turn {marks.index(1) + 1} marks a clip but the record names none; add video or image"
        )
    if sum(marks) != marks[first]:
        raise ValueError(
            f"turn {marks.index(1) + 1} marks the clip; only the first human turn may do so"
        )
    question = _without_mark(texts[first])
    if not question.strip():
        raise ValueError("the first human turn holds no question; add a text to it")
    prompt: Conversation = question
    if starts_with_system:
        prompt = [
            {"role": "system", "content": texts[0]},
            {"role": "user", "content": question},
        ]
    rest = iter(texts[first + 2 :])
    return prompt, texts[first + 1], tuple(zip(rest, rest, strict=True))


def _text(turn: object, number: int) -> str:
    """The text of a turn, after checks of the turn by itself."""
    if not isinstance(turn, dict) or not {"from", "value"} <= turn.keys():
        raise ValueError(f"turn {number} is no object with from and value")
    if turn["from"] not in ("system", "human", "gpt"):
        raise ValueError(f"turn {number}: from must be human, gpt or system")
    text = turn["value"]
    if not isinstance(text, str):
        raise ValueError(f"turn {number}: value must be a text")
    if turn["from"] != "system" and not text.strip():
        raise ValueError(f"turn {number} is empty")
    return text


def _without_mark(text: str) -> str:
    """The text that follows the clip and its newline.

    A text that begins with the mark and a newline stays as it is otherwise; any other text with a
    mark is stripped of spaces at its ends when the mark moves to the front.
    """
    for mark in MARKS:
        if text.startswith(f"{mark}\n"):
            return text.removeprefix(f"{mark}\n")
        if mark in text:
            return text.replace(mark, "").strip()
    return text
