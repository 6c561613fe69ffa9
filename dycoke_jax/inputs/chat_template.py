"""Encodes a conversation with a checkpoint's own chat template, as transformers does.

A chat template is a Jinja program that writes a conversation as one text, control tokens included.
transformers renders it in a sandbox, without access to files, and here in a process of its own
(``inputs.template_rendering``). As in ``inputs.prompts``, only the template inserts control tokens:
what a user types is never encoded as one.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from dycoke_jax.errors import PromptError, printable
from dycoke_jax.inputs.prompts import Conversation, Prompt, Tokenizer, check_prompt, encode_text
from dycoke_jax.inputs.template_rendering import RenderingError, render

_VIDEO = "<video>"
"""The token by which chat templates of the llava-hf layout mark the place of the video."""

_LONGEST_REASON = 300
"""Characters of what a template says when it fails."""

Messages = list[dict[str, Any]]
"""Messages whose contents are lists of parts, each a text or the place of the video."""


def template_of(tokenizer: Tokenizer) -> str | None:
    """Returns the chat template that transformers has loaded with a tokenizer; None if none."""
    return default_template(getattr(tokenizer, "chat_template", None))


def default_template(template: Any) -> Any:
    """Returns the default one of several templates by name, or the single template as it is."""
    return template.get("default") if isinstance(template, Mapping) else template


def check_template(template: str | None) -> str:
    """Returns a checkpoint's chat template.

    Raises:
        PromptError: if it is None.
    """
    if template is None:
        raise PromptError(
            "the checkpoint has no chat template (in chat_template.jinja, chat_template.json or "
            "tokenizer_config.json); use the prompt format llava-next"
        )
    return template


def build_prompt_by_template(
    tokenizer: Any,
    prompt: Conversation,
    *,
    template: str | None,
    system: str | None = None,
    has_video: bool,
    time_instruction: str | None = None,
) -> Prompt:
    """Encodes a question or a conversation by a chat template.

    The ids are those of transformers' processor without the placeholders of the video, except that
    control tokens in a text are encoded as text.

    Args:
        tokenizer: the checkpoint's tokenizer, of transformers.
        prompt: as for ``prompts.build_prompt``. The template decides where the video stands in its
            turn and what separates the parts of a content.
        template: source of the template; None if the checkpoint has none.
        system: text of the system turn; None for no such turn but one that the template writes by
            itself. A system message in the conversation replaces it.
        has_video: whether the request has a video.
        time_instruction: sentence about the frames' times, which becomes a text part of its own
            after the video; None for none.

    Returns:
        The ids before and after the place of the video, up to where the assistant's answer begins.

    Raises:
        PromptError: for a conversation that ``prompts.build_prompt`` refuses too; and if there is
            no template, or it cannot render the conversation, or leaves out its system turn or its
            question, or does not mark the place of the video exactly once.
    """
    if time_instruction is not None and not has_video:
        raise PromptError("a time instruction needs a video; leave it out for a text-only request")
    check_prompt(prompt, has_video=has_video)
    source = check_template(template)
    if has_video and "video" not in source:
        raise PromptError(
            "the checkpoint's chat template has no place for a video; use the prompt format "
            "llava-next"
        )
    messages = _messages(prompt, system, has_video, time_instruction)
    video = getattr(tokenizer, "video_token", None) or _VIDEO
    controls = _controls(tokenizer, video)
    # Rendered texts carry a character behind every letter that could begin a control token, so that
    # the control tokens that are found afterwards are the template's own.
    guard = _absent_from(source, messages)
    first_letters = re.compile("[" + re.escape("".join({name[0] for name in controls})) + "]")
    guarded = _with_texts(messages, lambda text: first_letters.sub(rf"\g<0>{guard}", text))
    rendered = _render(tokenizer, source, guarded)

    ids: list[int] = []
    places: list[int] = []
    longest_first = sorted(controls, key=len, reverse=True)
    pattern = "|".join(controls[name] for name in longest_first)
    for number, piece in enumerate(re.split(f"({pattern})", rendered)):
        if number % 2 == 0:  # text between two control tokens
            ids += encode_text(tokenizer, piece.replace(guard, ""))
        elif piece.strip() == video:
            places.append(len(ids))
        else:
            name = piece if piece in controls else piece.strip()
            ids.append(tokenizer.backend_tokenizer.token_to_id(name))
    if len(places) != has_video:
        raise PromptError(
            f"the checkpoint's chat template marks the place of the video ({video}) {len(places)} "
            f"times in a request with {int(has_video)} videos; use the prompt format llava-next"
        )
    place = places[0] if places else 0
    if not ids[place:]:
        raise PromptError(
            "the checkpoint's chat template writes nothing before the answer; use the prompt "
            "format llava-next"
        )
    return Prompt(tuple(ids[:place]), tuple(ids[place:]))


def _messages(
    prompt: Conversation, system: str | None, has_video: bool, time_instruction: str | None
) -> Messages:
    """Spells a conversation out: contents as lists of parts, the system turn, the video's place."""
    turns = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    messages: Messages = [
        {"role": turn["role"], "content": _parts(turn["content"])} for turn in turns
    ]
    if has_video and not any(map(_is_video, _all_parts(messages))):
        first = next(message for message in messages if message["role"] == "user")
        first["content"].insert(0, {"type": "video"})
    if time_instruction is not None:
        for message in messages:
            message["content"] = [
                part
                for given in message["content"]
                for part in (given, *([_text_part(time_instruction)] if _is_video(given) else []))
            ]
    if system is not None and messages[0]["role"] != "system":
        messages.insert(0, {"role": "system", "content": [_text_part(system)]})
    return messages


def _parts(content: str | Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    if isinstance(content, str):
        return [_text_part(content)]
    return [{"type": "video"} if _is_video(part) else _text_part(part["text"]) for part in content]


def _text_part(text: str) -> dict[str, Any]:
    return {"type": "text", "text": text}


def _is_video(part: Mapping[str, Any]) -> bool:
    return part["type"] == "video"


def _all_parts(messages: Messages) -> list[dict[str, Any]]:
    return [part for message in messages for part in message["content"]]


def _with_texts(messages: Messages, change: Callable[[str], str]) -> Messages:
    """The messages with every text changed."""
    return [
        message
        | {
            "content": [
                part if _is_video(part) else _text_part(change(part["text"]))
                for part in message["content"]
            ]
        }
        for message in messages
    ]


def _controls(tokenizer: Tokenizer, video: str) -> dict[str, str]:
    """Regular expressions that find the tokenizer's added tokens in a text, by token.

    An added token may be declared to take the white space beside it along.
    """
    added = tokenizer.backend_tokenizer.get_added_tokens_decoder().values()
    return {video: re.escape(video)} | {
        token.content: (r"\s*" if token.lstrip else "")
        + re.escape(token.content)
        + (r"\s*" if token.rstrip else "")
        for token in added
    }


def _absent_from(source: str, messages: Messages) -> str:
    """A private-use character, which no template changes, that occurs in none of the texts."""
    used = set(source).union(*(part.get("text", "") for part in _all_parts(messages)))
    return next(chr(code) for code in range(0xF0000, 0x10FFFE) if chr(code) not in used)


def _render(tokenizer: Any, source: str, messages: Messages) -> str:
    """Renders messages by a template.

    There are templates that take texts as contents, and templates that take lists of parts. What
    one of them does with the other's is to fail, or to leave the texts out.
    """
    if any(map(_is_video, _all_parts(messages))):
        return _render_whole(tokenizer, source, messages, messages)
    joined = [
        message | {"content": "".join(part["text"] for part in message["content"])}
        for message in messages
    ]
    try:
        return _render_whole(tokenizer, source, joined, messages)
    except PromptError as error:
        try:
            return _render_whole(tokenizer, source, messages, messages)
        except PromptError:
            raise error from None


def _render_whole(
    tokenizer: Any, source: str, given: Sequence[Mapping[str, Any]], messages: Messages
) -> str:
    """Renders messages in the given form, with neither the system turn nor the question left out.

    Raises:
        PromptError: if that fails.
    """
    try:
        rendered = render(source, given, tokenizer.special_tokens_map)
    except RenderingError as error:
        raise PromptError(
            "the checkpoint's chat template cannot render this conversation "
            f"({printable(str(error)[:_LONGEST_REASON])}); change the conversation or use the "
            "prompt format llava-next"
        ) from error
    for message in (messages[0], messages[-1]):
        texts = [part["text"].strip() for part in message["content"] if not _is_video(part)]
        if message["role"] != "assistant" and not all(text in rendered for text in texts):
            raise PromptError(
                f"the checkpoint's chat template leaves out a text of the {message['role']}'s "
                "turn; leave that out yourself or use the prompt format llava-next"
            )
    return rendered
