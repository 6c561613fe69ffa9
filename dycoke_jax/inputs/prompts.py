r"""Encodes a question or a conversation as the token ids before and after the video.

The template is ChatML as Qwen2 was fine-tuned on it (``conv_templates["qwen_1_5"]`` of
LLaVA-NeXT)::

    <|im_start|>system\nYou are a helpful assistant.<|im_end|>\n
    <|im_start|>user\n<video>\n{question}<|im_end|>\n<|im_start|>assistant\n

Only the template inserts control tokens. Text is never encoded as one, so that nothing a user types
can start or end a turn. For text without control strings the ids equal those of the reference.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import EllipsisType
from typing import Any, Literal, Protocol, get_args, runtime_checkable

from dycoke_jax.checks import choice, flag, sequence, shown, text, whole_number
from dycoke_jax.errors import PromptError, RequestError

Conversation = str | Sequence[Mapping[str, Any]]
"""A question, or the turns of a conversation in the form that ``build_prompt`` describes."""

DEFAULT_SYSTEM = "You are a helpful assistant."
"""The default text of the system turn."""

System = str | EllipsisType | None
"""Text of the system turn; None for no such turn; ``...`` for the default of the prompt format."""

PromptFormat = Literal["llava-next", "checkpoint"]
"""``llava-next``: the conversation format of LLaVA-NeXT, which ``build_prompt`` encodes.
``checkpoint``: the checkpoint's own chat template, see ``inputs.chat_template``."""


_TURN_START = "<|im_start|>"
_TURN_END = "<|im_end|>"


@dataclass(frozen=True)
class Prompting:
    """How a question or conversation is put to the model.

    Attributes:
        system: text of the system turn; None, or an empty text on the command line, omits it.
            Default (``...``): "You are a helpful assistant." in the format llava-next, no such turn
            in checkpoint.
        prompt_format: ``llava-next``: the conversation format of LLaVA-NeXT, in which the models
            were trained. ``checkpoint``: the chat template in the checkpoint's own files.
        time_text: add the times of the frames to the prompt, as LLaVA-Video does; the clip must be
            a file.
        truncate: cut a question that is too long for the model at its end, with a note, instead of
            refusing it; of a conversation, the longest text of its last turn.

    Raises:
        RequestError: naming the setting and what is allowed.
    """

    system: System = ...
    prompt_format: PromptFormat = "llava-next"
    time_text: bool = False
    truncate: bool = False

    def __post_init__(self) -> None:
        """Checks the types and values of the settings."""
        choice("prompt_format", self.prompt_format, get_args(PromptFormat), error=RequestError)
        if self.system is not None and self.system is not ...:
            text("system", self.system, error=RequestError)
        flag("time_text", self.time_text, error=RequestError)
        flag("truncate", self.truncate, error=RequestError)


@runtime_checkable
class Tokenizer(Protocol):
    """The tokenizer interface that this package needs; transformers' fast tokenizers have it.

    ``eos_token_id`` is used too but is not a member here: transformers computes the attribute
    dynamically, so an ``isinstance`` check would not find it.
    """

    @property
    def backend_tokenizer(self) -> Any:
        """The ``tokenizers.Tokenizer`` that implements this tokenizer."""


@dataclass(frozen=True)
class Prompt:
    """Token ids of one request, split where the visual tokens are inserted.

    Attributes:
        before: ids before the video; empty without a video.
        after: ids after the video; all ids without a video.
    """

    before: tuple[int, ...]
    after: tuple[int, ...]


def build_prompt(
    tokenizer: Tokenizer,
    prompt: Conversation,
    *,
    system: str | None = DEFAULT_SYSTEM,
    has_video: bool,
    time_instruction: str | None = None,
) -> Prompt:
    r"""Encodes a question or a conversation as token ids.

    Args:
        tokenizer: the checkpoint's tokenizer.
        prompt: a question, which is placed after the video and a newline; or a conversation, a
            list of ``{"role": "system" | "user" | "assistant", "content": ...}`` whose content is
            a text or a list of ``{"type": "text", "text": ...}`` and ``{"type": "video"}``. The
            last turn must be the user's. The texts of a turn are joined without a separator; a
            newline follows the video if text follows it in its turn. If no turn has a video part,
            the video is placed at the start of the first user turn.
        system: text of the system turn; None for no system turn. A system message in the
            conversation replaces it.
        has_video: whether the request has a video.
        time_instruction: sentence about the frames' times (LLaVA-Video), inserted after the video
            and a newline, and followed by a newline and the text; None for none.

    Returns:
        The ids before and after the video, up to where the assistant's answer begins.

    Raises:
        PromptError: if the conversation does not fit this template; the message names the turn
            and the remedy.
    """
    for name, words in (("system", system), ("time_instruction", time_instruction)):
        if words is not None:
            text(name, words, error=PromptError)
    if time_instruction is not None and not has_video:
        raise PromptError("a time instruction needs a video; leave it out for a text-only request")
    turns = _as_turns(prompt, has_video)
    if turns[0].role != "system" and system is not None:
        turns = [_Turn("system", system, None), *turns]

    start, end = control_ids(tokenizer)
    before: list[int] = []
    ids: list[int] = []
    for turn in turns:
        head = f"{turn.role}\n{turn.text}"
        ids.append(start)
        # All text between two control tokens, the template's included, is encoded in one call,
        # because BPE may join characters across the boundary. The reference does the same.
        ids += encode_text(tokenizer, head)
        if turn.after_video is not None:
            before, ids = ids, []
            tail = [part for part in (time_instruction, turn.after_video) if part]
            ids += encode_text(tokenizer, "".join("\n" + part for part in tail))
        ids.append(end)
        ids += encode_text(tokenizer, "\n")
    ids.append(start)
    ids += encode_text(tokenizer, "assistant\n")
    return Prompt(tuple(before), tuple(ids))


def encode_answer(tokenizer: Tokenizer, answer: str) -> tuple[int, ...]:
    """Encodes an answer as a training target: its ids, followed by the end-of-turn id.

    Raises:
        PromptError: if the answer is no text, or empty.
    """
    if not text("the answer", answer, error=PromptError).strip():
        raise PromptError("the answer is empty; give the text that the model should say")
    return (*encode_text(tokenizer, answer), control_ids(tokenizer)[1])


def encode_next_question(tokenizer: Tokenizer, question: str) -> tuple[int, ...]:
    """Encodes a further question of a conversation.

    Args:
        tokenizer: the checkpoint's tokenizer.
        question: the text of the user's turn.

    Returns:
        The ids that follow the end-of-turn id of the answer before the question, up to where the
        next answer begins.

    Raises:
        PromptError: if the question is no text, or empty.
    """
    turn = build_prompt(tokenizer, question, system=None, has_video=False)
    return (*encode_text(tokenizer, "\n"), *turn.after)


def check_prompt(prompt: Conversation, *, has_video: bool) -> None:
    """Checks the form of a question or conversation without a tokenizer.

    Args:
        prompt: as for :func:`build_prompt`.
        has_video: whether the request has a video.

    Raises:
        PromptError: as :func:`build_prompt` does for a malformed conversation.
    """
    _as_turns(prompt, has_video)


def time_instruction(clip_duration: float, times: Sequence[float]) -> str:
    """Returns the sentence that gives the model the times of its frames (LLaVA-Video).

    Args:
        clip_duration: length of the clip in seconds.
        times: time of each frame in seconds from the start of the clip.

    Returns:
        The same text as in ``process_video_with_decord`` of LLaVA-NeXT, including its missing
        space after the full stop that follows the times.
    """
    listed = ",".join(f"{time:.2f}s" for time in times)
    return (
        f"The video lasts for {clip_duration:.2f} seconds, and {len(times)} frames are uniformly "
        f"sampled from it. These frames are located at {listed}."
        "Please answer the following questions related to this video."
    )


def stop_ids(tokenizer: Tokenizer, extra: Iterable[int] = ()) -> tuple[int, ...]:
    """Returns the ids that end an answer: end of turn, the tokenizer's end of text, and ``extra``.

    Args:
        tokenizer: the checkpoint's tokenizer.
        extra: further ids, such as those in a checkpoint's generation configuration.

    Returns:
        The distinct ids in ascending order.

    Raises:
        PromptError: if the tokenizer lacks the control tokens of ChatML.
    """
    ids = {control_ids(tokenizer)[1]}
    ids |= {whole_number("a stop id", token, 0, error=PromptError) for token in extra}
    end_of_text = getattr(tokenizer, "eos_token_id", None)
    if end_of_text is not None:
        ids.add(int(end_of_text))
    return tuple(sorted(ids))


@dataclass(frozen=True)
class _Turn:
    """One turn of a conversation, its text split where the video is inserted.

    ``after_video`` is None in a turn without the video.
    """

    role: str
    text: str
    after_video: str | None


def control_ids(tokenizer: Tokenizer) -> tuple[int, int]:
    """Returns the ids of the tokens that start and end a turn.

    Raises:
        PromptError: if the tokenizer lacks one of them.
    """
    ids = [tokenizer.backend_tokenizer.token_to_id(token) for token in (_TURN_START, _TURN_END)]
    if None in ids:
        raise PromptError(
            f"the tokenizer lacks {_TURN_START} or {_TURN_END}; "
            "a Qwen2 tokenizer with its ChatML control tokens is needed"
        )
    return ids[0], ids[1]


def encode_text(tokenizer: Tokenizer, text: str) -> list[int]:
    """Encodes a text without recognising control or other added tokens in it.

    The tokenizer's stages are called one by one, which bypasses its table of added tokens. Its
    option ``encode_special_tokens`` would not do: it has no effect on added tokens that are not
    marked as special, and setting it would change a shared object.
    """
    backend = tokenizer.backend_tokenizer
    try:
        if backend.normalizer is not None:
            text = backend.normalizer.normalize_str(text)
        words = [(text, None)]
        if backend.pre_tokenizer is not None:
            words = backend.pre_tokenizer.pre_tokenize_str(text)
    except UnicodeEncodeError as error:
        raise PromptError(
            f"the prompt holds {error.object[error.start]!r}, half of a surrogate pair, which is "
            "no character; decode the text again from its source"
        ) from None
    return [token.id for word, _ in words for token in backend.model.tokenize(word)]


def _as_turns(prompt: Conversation, has_video: bool) -> list[_Turn]:
    """Checks a question or conversation and converts it to turns, with the video placed."""
    if isinstance(prompt, str):
        if not prompt.strip():
            raise PromptError("the question is empty; give a text to answer")
        turn = _Turn("user", "", prompt) if has_video else _Turn("user", prompt, None)
        return [turn]

    must = "it must be a question or a list of messages"
    prompt = sequence("the prompt", prompt, must, error=PromptError)
    if not prompt:
        raise PromptError("the conversation is empty; give at least one user turn")
    turns = [_as_turn(message, number) for number, message in enumerate(prompt, start=1)]
    for number, turn in enumerate(turns, start=1):
        if turn.role == "system" and number > 1:
            raise PromptError(f"turn {number}: a system turn can only be the first")
    if turns[-1].role != "user":
        raise PromptError(
            f"the last turn is the {turns[-1].role}'s; end the conversation with a user turn"
        )
    if not (turns[-1].text + (turns[-1].after_video or "")).strip():
        raise PromptError("the last turn holds no question; add a text to it")

    marked = [index for index, turn in enumerate(turns) if turn.after_video is not None]
    if len(marked) > 1:
        raise PromptError(_ONE_CLIP)
    if marked and not has_video:
        raise PromptError(
            f"turn {marked[0] + 1} has a video part but the request has no video; "
            "give the clip or remove the part"
        )
    if has_video and not marked:
        first = next(index for index, turn in enumerate(turns) if turn.role == "user")
        turns[first] = _Turn("user", "", turns[first].text)
    return turns


_ONE_CLIP = "the conversation has more than one video part; one clip a request is supported"


def _as_turn(message: Any, number: int) -> _Turn:
    """Converts one message to a turn; ``number`` counts from 1 and is used in error messages."""
    if not isinstance(message, Mapping) or not {"role", "content"} <= message.keys():
        raise PromptError(f"turn {number} is no message; give a role and a content")
    role, content = message["role"], message["content"]
    if not isinstance(role, str) or role not in ("system", "user", "assistant"):
        raise PromptError(
            f"turn {number}: unknown role {shown(role)}; use system, user or assistant"
        )
    parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
    must = "it is neither a text nor a list of parts"
    parts = sequence(f"turn {number}: the content", parts, must, error=PromptError)

    before_video: str = ""
    after_video: str | None = None
    for part in parts:
        kind = part.get("type") if isinstance(part, Mapping) else None
        kind = kind if isinstance(kind, str) else None
        if kind == "video":
            if role != "user":
                raise PromptError(f"turn {number}: only a user turn can hold the video")
            if after_video is not None:
                raise PromptError(_ONE_CLIP)
            if len(part) > 1:
                raise PromptError(
                    f"turn {number}: the video part only marks the place; give the clip itself "
                    "with the request and leave nothing but the type here"
                )
            after_video = ""
        elif kind != "text":
            raise PromptError(
                f"turn {number}: parts of type {kind!r} are not supported; use text, and video for "
                "the place of the clip"
            )
        elif not isinstance(part.get("text"), str):
            raise PromptError(f"turn {number}: a text part needs its text under 'text'")
        elif after_video is None:
            before_video += part["text"]
        else:
            after_video += part["text"]
    if role != "system" and after_video is None and not before_video.strip():
        raise PromptError(f"turn {number} is empty; give it a text or leave it out")
    return _Turn(role, before_video, after_video)
