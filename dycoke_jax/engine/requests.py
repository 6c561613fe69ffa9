"""What is asked and what comes back."""

from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import UInt8

from dycoke_jax.checks import flag, instance, number, whole_number
from dycoke_jax.errors import (
    ConfigError,
    DycokeError,
    PromptError,
    RequestError,
    VideoError,
    printable,
)
from dycoke_jax.inputs.any_video import Video
from dycoke_jax.inputs.prompts import Conversation, Prompt, Prompting
from dycoke_jax.inputs.sampling import FrameSampling

_INT32 = 2**31 - 1
"""The largest max_new_tokens, top_k and seed: they are int32 on the device."""

_LONGEST_TEXT = 300
"""Characters of an exception that a message repeats; those of XLA may have many lines."""


@dataclass(frozen=True)
class Decoding:
    """How one answer is generated.

    Numbers of NumPy are converted to those of Python.

    Attributes:
        max_new_tokens: number of tokens after which the answer is cut off, at least 1.
        temperature: sampling temperature, 0 or more; 0 for greedy decoding.
        top_k: number of most likely tokens to sample from; 0 for the whole vocabulary.
        top_p: sample from the fewest tokens that hold this probability, in (0, 1].
        seed: seed of sampling, 0 or more and below ``2**31``.

    Raises:
        RequestError: naming the setting and its range.
    """

    max_new_tokens: int = 128
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        checked = {
            "max_new_tokens": whole_number(
                "max_new_tokens", self.max_new_tokens, 1, _INT32, error=RequestError
            ),
            "temperature": number("temperature", self.temperature, 0, error=RequestError),
            "top_k": whole_number("top_k", self.top_k, 0, _INT32, error=RequestError),
            "top_p": number(
                "top_p", self.top_p, 0, 1, with_low=False, with_high=True, error=RequestError
            ),
            "seed": whole_number("seed", self.seed, 0, _INT32, error=RequestError),
        }
        for name, value in checked.items():
            object.__setattr__(self, name, value)


@dataclass(frozen=True, eq=False)
class Request:
    """One question or conversation, with or without a clip, as a user asks it.

    Attributes:
        prompt: a question, or the turns of a conversation.
        video: the clip; None for none.
        decoding: how the answer is generated.
        sampling: which frames of a file to use.
        prompting: how the prompt is put to the model.
        allow_damaged: use what can be decoded of a damaged file.

    Raises:
        RequestError: naming the setting of a wrong type. The prompt and the clip are checked when
            they are prepared.
    """

    prompt: Conversation
    video: Video | None = None
    decoding: Decoding = Decoding()
    sampling: FrameSampling = FrameSampling()  # noqa: RUF009 (frozen)
    prompting: Prompting = Prompting()  # noqa: RUF009 (frozen)
    allow_damaged: bool = False

    def __post_init__(self) -> None:
        """Checks the types of the settings."""
        instance("decoding", self.decoding, Decoding, error=RequestError)
        instance("sampling", self.sampling, FrameSampling, error=RequestError)
        instance("prompting", self.prompting, Prompting, error=RequestError)
        flag("allow_damaged", self.allow_damaged, error=RequestError)


@dataclass(frozen=True)
class Prepared:
    """One question with its frames, ready for the device.

    Attributes:
        prompt: token ids of the prompt.
        frames: resized frames, RGB; None without video.
        decoding: how the answer is generated.
        notes: remarks on the clip, such as damage that was accepted.
    """

    prompt: Prompt
    frames: UInt8[np.ndarray, "F height width 3"] | None
    decoding: Decoding
    notes: tuple[str, ...] = ()

    @property
    def num_frames(self) -> int:
        """Number of frames (F); 0 without video."""
        return 0 if self.frames is None else len(self.frames)


@dataclass(frozen=True)
class TokenCounts:
    """Numbers of tokens of a request, counted from its arrays and not computed from settings.

    Attributes:
        prompt: tokens of the prompt as the language model read it.
        visual: visual tokens of the clip before compression (F * N).
        merged: visual tokens that entered the language model.
        newlines: learned newline tokens in the prompt; ``merged`` does not count them.
        attended: visual tokens that the pruned layers attended to in each decode step; the first
            step makes the second token. Layers below ``DyCoke.layer`` attend to all ``merged``
            tokens. Without pruning every entry is ``merged``.
        refreshes: decode steps that chose the attended tokens anew.
        generated: tokens of the answer, its stop token included.
    """

    prompt: int
    visual: int
    merged: int
    newlines: int
    attended: tuple[int, ...]
    refreshes: int
    generated: int

    def __str__(self) -> str:
        if not self.visual:
            return f"{self.prompt} prompt, no video"
        counts = sorted(set(self.attended))
        if not counts:
            steps = "no decoding step"
        elif len(counts) == 1:
            steps = f"{counts[0]} attended per step"
        else:
            mean = sum(self.attended) / len(self.attended)
            steps = f"{counts[0]}..{counts[-1]} attended per step (mean {mean:.0f})"
        return f"{self.visual} visual -> {self.merged} after merging -> {steps}"


@dataclass(frozen=True)
class Seconds:
    """Wall time of the batch of a request in seconds; the first batch of a shape also compiles."""

    vision: float = 0.0
    prefill: float = 0.0
    decode: float = 0.0


@dataclass(frozen=True)
class Generated:
    """The answer of one row so far; final if ``finish_reason`` is set."""

    token_ids: tuple[int, ...]
    finish_reason: str | None
    """``stop`` (the last of ``token_ids`` is a stop token), ``length``, or None if it goes on."""
    tokens: TokenCounts
    seconds: Seconds


@dataclass(frozen=True)
class Answer:
    """The answer to one request.

    Attributes:
        text: the text without control tokens.
        token_ids: the generated ids, a stop token included.
        finish_reason: ``stop`` (the last id is a stop token) or ``length`` (max_new_tokens).
        tokens: numbers of tokens, counted from the arrays.
        seconds: wall time in seconds of the stages of the batch.
        notes: remarks on the clip, such as damage that was accepted.
    """

    text: str
    token_ids: tuple[int, ...]
    finish_reason: str
    tokens: TokenCounts
    seconds: Seconds
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Piece:
    """A part of an answer that is being generated.

    Attributes:
        index: number of the request in the stream, from 0.
        text: the text since the last piece. The pieces of a request joined are its answer's text.
        answer: the whole answer with the last piece of a request; None with the others.
    """

    index: int
    text: str
    answer: Answer | None = None


@dataclass(frozen=True)
class Failure:
    """What comes in place of an answer to a request that cannot be answered.

    Attributes:
        index: number of the request in the stream, from 0.
        kind: what is wrong: the clip cannot be read (``video``), the prompt cannot be encoded
            (``prompt``), the request makes no sense or is too long for the model (``request``), the
            compression cannot work on this model or clip length (``config``), or something has
            failed that should not (``internal``).
        message: what is wrong and what to do, in one line.
        error: the exception that says so; a ``DycokeError`` unless the kind is ``internal``.
    """

    index: int
    kind: Literal["video", "prompt", "request", "config", "internal"]
    message: str
    error: Exception


def failure(index: int, error: Exception) -> Failure:
    """Describes the error of one request.

    An exception that is no ``DycokeError`` is a fault of a program or of the machine that was met
    at this request, and is its failure of the kind ``internal``.

    Raises:
        DycokeError: the error itself, if it is of a kind that does not concern a single request.
    """
    match error:
        case VideoError():
            return Failure(index, "video", str(error), error)
        case PromptError():
            return Failure(index, "prompt", str(error), error)
        case RequestError():
            return Failure(index, "request", str(error), error)
        case ConfigError():
            return Failure(index, "config", str(error), error)
        case DycokeError():
            raise error
    message = (
        f"an unexpected error has ended this request ({in_one_line(error)}); ask it alone with "
        "generate to see where"
    )
    return Failure(index, "internal", message, error)


def in_one_line(error: Exception) -> str:
    """The class of an exception and the beginning of what it says."""
    text = printable(" ".join(str(error).split())[:_LONGEST_TEXT])
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


@dataclass(frozen=True)
class Likelihood:
    """How likely a model finds a given answer.

    Attributes:
        token_ids: the tokens of the answer.
        log_likelihoods: natural logarithm of the probability of each token after the prompt and the
            tokens before it.
        is_greedy: whether greedy decoding would give exactly these tokens.
        visual: visual tokens of the clip before compression (F * N).
        merged: visual tokens that entered the language model.
    """

    token_ids: tuple[int, ...]
    log_likelihoods: tuple[float, ...]
    is_greedy: bool
    visual: int
    merged: int

    @property
    def total(self) -> float:
        """Log-likelihood of the whole answer."""
        return float(np.sum(self.log_likelihoods, dtype=np.float64))
