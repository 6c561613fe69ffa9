"""The chat-completions API of OpenAI: what a body asks for, and the bodies of answers.

What the engine cannot do, such as several answers to a request or tools, is refused by name, and so
is a field that is not known. Fields of this server's own are ``top_k``, ``frames``, ``fps`` and
``compression``.
"""

import dataclasses
import json
import secrets
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from dycoke_jax.checks import shown
from dycoke_jax.compression.dycoke import DyCoke
from dycoke_jax.compression.methods import parse_compression
from dycoke_jax.compression.protocol import Compressor, check_compressor
from dycoke_jax.engine.requests import Answer, Decoding, Request
from dycoke_jax.errors import DycokeError
from dycoke_jax.inputs.any_video import Video
from dycoke_jax.inputs.prompts import Prompting
from dycoke_jax.inputs.sampling import FrameSampling
from dycoke_jax.serving.faults import Fault, bad
from dycoke_jax.serving.media import read_media
from dycoke_jax.serving.settings import Serving

_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "n": (1,),
    "stop": ([], ""),
    "logprobs": (False,),
    "top_logprobs": (0,),
    "logit_bias": ({},),
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "audio": (),
    "prediction": (),
    "web_search_options": (),
    "reasoning_effort": ("none",),
}
"""Fields of the API that are not supported, with the values that ask for nothing; so does null."""

_WITHOUT_EFFECT = (
    *("user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key"),
    "parallel_tool_calls",
)
"""Fields of the API that change no answer."""


@dataclass(frozen=True)
class Defaults:
    """What a request gets that does not say otherwise.

    Attributes:
        model: name of the model in the API.
        decoding: how answers are generated.
        sampling: which frames of files are used.
        prompting: how prompts are put to the model.
        compression: method and settings; None for the plain model.
        allow_damaged: use what can be decoded of damaged files.
    """

    model: str
    decoding: Decoding = Decoding()  # noqa: RUF009 (frozen)
    sampling: FrameSampling = FrameSampling()  # noqa: RUF009 (frozen)
    prompting: Prompting = Prompting()  # noqa: RUF009 (frozen)
    compression: Compressor | None = DyCoke()  # noqa: RUF009 (frozen)
    allow_damaged: bool = False


@dataclass(frozen=True, eq=False)
class Asked:
    """What a body asks for.

    Attributes:
        request: the request for the engine.
        compression: what it is answered with; None for the plain model.
        stream: whether the answer is sent while it is generated.
        include_usage: whether the stream ends with the numbers of tokens.
    """

    request: Request
    compression: Compressor | None
    stream: bool
    include_usage: bool


class _Form(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")


class _Url(_Form):
    url: str
    detail: Literal["auto", "low", "high"] | None = None


class _TextPart(_Form):
    type: Literal["text"]
    text: str


class _VideoPart(_Form):
    type: Literal["video_url"]
    video_url: _Url


class _ImagePart(_Form):
    type: Literal["image_url"]
    image_url: _Url


_Part = Annotated[_TextPart | _VideoPart | _ImagePart, Field(discriminator="type")]


def _as_parts(content: Any) -> Any:
    return [{"type": "text", "text": content}] if isinstance(content, str) else content


class _Message(_Form):
    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[list[_Part], BeforeValidator(_as_parts)]


class _StreamOptions(_Form):
    include_usage: bool = False
    include_obfuscation: bool = False


class _Body(BaseModel):
    model_config = ConfigDict(strict=True, extra="allow")

    model: str
    messages: list[_Message]
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    seed: int | None = None
    stream: bool | None = None
    stream_options: _StreamOptions | None = None
    frames: int | None = None
    fps: float | None = None
    compression: str | None = None


def read_body(body: bytes, defaults: Defaults, settings: Serving) -> Asked:
    """Reads the body of a request, and the clip in it.

    Args:
        body: JSON in UTF-8.
        defaults: what it does not say.
        settings: what is allowed.

    Raises:
        Fault: saying which field is wrong.
    """
    try:
        asked = _Body.model_validate_json(body)
    except ValidationError as error:
        raise _fault(error) from None
    _check_fields(asked)
    if asked.model != defaults.model:
        raise Fault(
            404,
            f"there is no model {shown(asked.model)}; this server has {defaults.model}",
            param="model",
            code="model_not_found",
        )
    if asked.stream_options is not None and not asked.stream:
        raise bad("stream_options go with stream", "stream_options")
    try:
        compression = defaults.compression
        if asked.compression is not None:
            compression = parse_compression(asked.compression)
            check_compressor(compression)
        decoding = _decoding(asked, defaults, settings)
        sampling = _sampling(asked, defaults, settings)
    except DycokeError as error:
        raise bad(str(error)) from None
    turns, video = _conversation(asked.messages, settings)
    return Asked(
        Request(turns, video, decoding, sampling, defaults.prompting, defaults.allow_damaged),
        compression,
        bool(asked.stream),
        asked.stream_options is not None and asked.stream_options.include_usage,
    )


def _fault(error: ValidationError) -> Fault:
    """The first of the faults that pydantic has found."""
    first = error.errors(include_url=False, include_input=False, include_context=False)[0]
    if first["type"] == "json_invalid":
        return bad(f"the body is no valid JSON ({first['msg']})", code="invalid_json")
    place = ".".join(map(str, first["loc"]))
    return bad(f"{place or 'the body'}: {first['msg']}", place or None)


def _check_fields(asked: _Body) -> None:
    """Refuses fields that ask for what this server cannot do."""
    for name, value in (asked.model_extra or {}).items():
        if name in _WITHOUT_EFFECT or (name in _NEUTRAL and value in (None, *_NEUTRAL[name])):
            continue
        if name in _NEUTRAL:
            raise bad(
                f"this server does not support {name}={shown(value)}; leave it out",
                name,
                "unsupported_parameter",
            )
        raise bad(f"there is no field {shown(name)}", name[:64], "unknown_parameter")


def _decoding(asked: _Body, defaults: Defaults, settings: Serving) -> Decoding:
    tokens = asked.max_completion_tokens
    given: dict[str, Any] = {
        "max_new_tokens": asked.max_tokens if tokens is None else tokens,
        "temperature": asked.temperature,
        "top_p": asked.top_p,
        "top_k": asked.top_k,
        # Each answer that is sampled is another one, unless a seed is given.
        "seed": secrets.randbelow(2**31) if asked.seed is None else asked.seed,
    }
    decoding = dataclasses.replace(
        defaults.decoding, **{name: value for name, value in given.items() if value is not None}
    )
    if decoding.max_new_tokens > settings.max_tokens:
        raise bad(f"this server's answers have at most {settings.max_tokens} tokens", "max_tokens")
    return decoding


def _sampling(asked: _Body, defaults: Defaults, settings: Serving) -> FrameSampling:
    given: dict[str, Any] = {"frames": asked.frames, "fps": asked.fps}
    sampling = dataclasses.replace(
        defaults.sampling, **{name: value for name, value in given.items() if value is not None}
    )
    if sampling.frames > settings.max_frames:
        raise bad(f"this server uses at most {settings.max_frames} frames of a clip", "frames")
    return sampling


def _conversation(
    messages: list[_Message], settings: Serving
) -> tuple[list[dict[str, Any]], Video | None]:
    """The turns of a conversation as the engine takes them, and its clip."""
    turns: list[dict[str, Any]] = []
    urls: list[str] = []
    for message in messages:
        parts: list[dict[str, str]] = []
        for part in message.content:
            if isinstance(part, _TextPart):
                parts.append({"type": "text", "text": part.text})
            else:
                of_part = part.video_url if isinstance(part, _VideoPart) else part.image_url
                urls.append(of_part.url)
                parts.append({"type": "video"})
        role = "system" if message.role == "developer" else message.role
        turns.append({"role": role, "content": parts})
    if len(urls) > 1:
        raise bad(f"there are {len(urls)} clips and pictures; a request may have one", "messages")
    return turns, read_media(urls[0], settings) if urls else None


def usage(answer: Answer) -> dict[str, Any]:
    """The numbers of tokens of an answer.

    ``visual_tokens`` and ``merged_tokens`` are those of the clip before and after token merging;
    ``attended_tokens`` is the mean over decode steps, null if there was none.
    """
    tokens = answer.tokens
    mean = sum(tokens.attended) / len(tokens.attended) if tokens.attended else None
    return {
        "prompt_tokens": tokens.prompt,
        "completion_tokens": tokens.generated,
        "total_tokens": tokens.prompt + tokens.generated,
        "visual_tokens": tokens.visual,
        "merged_tokens": tokens.merged,
        "attended_tokens": mean,
    }


@dataclass(frozen=True)
class Writer:
    """Writes the bodies of the answer to one request.

    Attributes:
        id: id of the answer.
        created: time at which the request came, in seconds since 1970.
        model: name of the model.
        include_usage: whether a stream ends with the numbers of tokens.
    """

    id: str
    created: int
    model: str
    include_usage: bool = False

    def whole(self, answer: Answer) -> dict[str, Any]:
        """The body of a whole answer."""
        choice = {
            "index": 0,
            "message": {"role": "assistant", "content": answer.text, "refusal": None},
            "logprobs": None,
            "finish_reason": answer.finish_reason,
        }
        return self._object("chat.completion", [choice]) | {
            "usage": usage(answer),
            "notes": [*answer.notes],
        }

    def begin(self) -> str:
        """The first event of a stream."""
        return self._chunk({"role": "assistant", "content": ""})

    def text(self, text: str) -> str:
        """An event with a piece of the text."""
        return self._chunk({"content": text})

    def end(self, answer: Answer) -> str:
        """The last events of a stream."""
        events = self._chunk({}, answer.finish_reason)
        if self.include_usage:
            events += event(
                self._object("chat.completion.chunk", [])
                | {"usage": usage(answer), "notes": [*answer.notes]}
            )
        return events + "data: [DONE]\n\n"

    def _chunk(self, delta: dict[str, str], finish_reason: str | None = None) -> str:
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish_reason}
        chunk = self._object("chat.completion.chunk", [choice])
        return event(chunk | {"usage": None} if self.include_usage else chunk)

    def _object(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        head = {"id": self.id, "object": kind, "created": self.created, "model": self.model}
        return head | {"choices": choices}


def event(value: dict[str, Any]) -> str:
    """A server-sent event that holds a JSON object."""
    return f"data: {json.dumps(value)}\n\n"
