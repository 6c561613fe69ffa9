"""Keeps the text of a prompt within the tokens that the model has room for."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from dycoke_jax.errors import RequestError
from dycoke_jax.inputs.prompts import Conversation, Prompt

_CHARACTERS = 64
"""Characters for each token that there is room for; a longer text is not encoded to be counted.

Texts have about 4 a token, so that what is refused by its length alone is far too long.
"""


def encode_within(
    encode: Callable[[Conversation], Prompt],
    prompt: Conversation,
    room: int,
    *,
    truncate: bool,
    why: str,
) -> tuple[Prompt, tuple[str, ...]]:
    """Encodes a question or conversation that must have no more tokens than there is room for.

    Args:
        encode: encodes a question or conversation.
        prompt: the question or conversation, which ``prompts.check_prompt`` accepts.
        room: largest number of tokens.
        truncate: if they are more, cut the question at its end; of a conversation, the longest text
            of its last turn.
        why: what limits the room, as words for the error.

    Returns:
        The token ids, and a note if a text was cut.

    Raises:
        RequestError: if the tokens are too many, and with ``truncate`` if they still are when one
            character is left of the text.
        PromptError: as ``encode`` does.
    """
    text = _longest_text(prompt)
    others = _characters(prompt) - len(text)
    most = max(0, room) * _CHARACTERS
    found = f"has a text of {len(text) + others} characters"
    if len(text) + others <= most:
        whole = encode(prompt)
        size = _size(whole)
        if size <= room:
            return whole, ()
        found = f"has {size} tokens of text"
    allowed = f"it may have {max(0, room)} tokens, because {why}"
    if not truncate:
        raise RequestError(
            f"the prompt {found}; {allowed}; shorten the text or let it be cut (truncate)"
        )
    # White space alone is no question, so one other character must be left.
    low, high = len(text) - len(text.lstrip()) + 1, min(len(text), most - others)
    fitting: Prompt | None = None
    while low <= high:
        kept = (low + high) // 2
        part = encode(_with_longest_text(prompt, text[:kept]))
        if _size(part) <= room:
            fitting, low = part, kept + 1
        else:
            high = kept - 1
    if fitting is None:
        raise RequestError(
            f"the prompt {found}, and cutting the last turn is not enough; {allowed}; shorten the "
            "conversation"
        )
    note = f"a text of {len(text)} characters was cut to its first {high} to fit into the model"
    return fitting, (note,)


def _size(prompt: Prompt) -> int:
    return len(prompt.before) + len(prompt.after)


def _characters(prompt: Conversation) -> int:
    if isinstance(prompt, str):
        return len(prompt)
    texts = (text for turn in prompt for text in _texts(turn["content"]))
    return sum(map(len, texts))


def _texts(content: str | Sequence[Mapping[str, Any]]) -> list[str]:
    """The texts of a content, one for each part; the video's is empty."""
    return [content] if isinstance(content, str) else [part.get("text", "") for part in content]


def _longest_text(prompt: Conversation) -> str:
    return prompt if isinstance(prompt, str) else max(_texts(prompt[-1]["content"]), key=len)


def _with_longest_text(prompt: Conversation, text: str) -> Conversation:
    if isinstance(prompt, str):
        return text
    last = prompt[-1]
    content = last["content"]
    if isinstance(content, str):
        return [*prompt[:-1], {**last, "content": text}]
    texts = _texts(content)
    place = texts.index(max(texts, key=len))
    parts = [*content[:place], {**content[place], "text": text}, *content[place + 1 :]]
    return [*prompt[:-1], {**last, "content": parts}]
