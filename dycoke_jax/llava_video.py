"""The main interface of the library: a model with its tokenizer answers questions about clips."""

from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from os import PathLike
from types import EllipsisType
from typing import Any, Literal, get_args, overload

import jax
import numpy as np
from jax.typing import DTypeLike
from tokenizers.decoders import DecodeStream

from dycoke_jax import checks
from dycoke_jax.checkpoint.chat_template import find_chat_template
from dycoke_jax.checkpoint.opening import Checkpoint, check_vocabulary, open_checkpoint
from dycoke_jax.checkpoint.tensors import weight_dtype
from dycoke_jax.compression.dycoke import DyCoke
from dycoke_jax.compression.protocol import Compressor, check_compressor
from dycoke_jax.config import LlavaConfig, PoolMode
from dycoke_jax.engine import (
    Decoding,
    Generated,
    Likelihood,
    Request,
    Seconds,
    TokenCounts,
    run_batch,
    score_batch,
)
from dycoke_jax.errors import CheckpointError, ConfigError, RequestError
from dycoke_jax.inputs.any_video import Video, has_times, read_video
from dycoke_jax.inputs.chat_template import build_prompt_by_template, check_template, template_of
from dycoke_jax.inputs.prompts import (
    DEFAULT_SYSTEM,
    Conversation,
    Prompt,
    PromptFormat,
    System,
    Tokenizer,
    build_prompt,
    encode_answer,
    stop_ids,
    time_instruction,
)
from dycoke_jax.inputs.sampling import FrameSampling
from dycoke_jax.model import Model
from dycoke_jax.models.llava import Params
from dycoke_jax.progress import Progress

Ints = int | Sequence[int] | np.ndarray
"""One value for all requests, or one for each request."""
Floats = float | Sequence[float] | np.ndarray

STREAM_EVERY = 4
"""Tokens between two pieces of a stream; each piece costs a transfer from the device."""

CLIP_THREADS = 4
"""Clips that are decoded at the same time; FFmpeg uses threads of its own for each."""


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
        index: number of the request, from 0.
        text: the text since the last piece. The pieces of a request joined are its answer's text.
        answer: the whole answer with the last piece of a request; None with the others.
    """

    index: int
    text: str
    answer: Answer | None = None


class LlavaVideo:
    """A LLaVA-OneVision or LLaVA-Video model that answers questions about clips.

    Attributes:
        model: weights, sizes and layout, and the dtype of the computation.
        tokenizer: tokenizer of the checkpoint.
        stop_ids: token ids that end an answer.
        notes: remarks on the checkpoint, such as files in its folder that were not read.
        chat_template: source of the checkpoint's own chat template; None if it has none.
    """

    def __init__(
        self,
        model: Model,
        tokenizer: Tokenizer,
        extra_stop_ids: Sequence[int] = (),
        notes: Sequence[str] = (),
        chat_template: str | None = None,
    ) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.stop_ids = stop_ids(tokenizer, extra_stop_ids)
        self.notes = tuple(notes)
        self.chat_template = chat_template or template_of(tokenizer)
        check_vocabulary(tokenizer, model.config)

    @property
    def config(self) -> LlavaConfig:
        """Sizes and layout of the model."""
        return self.model.config

    @property
    def params(self) -> Params:
        """Weights of the model by dotted path."""
        return self.model.params

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | PathLike[str],
        *,
        dtype: DTypeLike | None = None,
        pool_mode: PoolMode | None = None,
        progress: Progress | None = None,
    ) -> "LlavaVideo":
        """Loads a checkpoint.

        Args:
            name_or_path: a folder in the lmms-lab or the llava-hf layout, a folder that
                ``dycoke-jax convert`` made, or a hub id ``org/name``, which is downloaded.
            dtype: dtype of weights and computation (float32, bfloat16, float16); None: as stored.
            pool_mode: pooling of frames in place of the configuration's. The published evaluation
                of LLaVA-Video replaces it by ``average``.
            progress: called with the bytes of weights loaded after each tensor.

        Raises:
            CheckpointError: listing everything that is wrong with the files.
            ConfigError: naming a setting that is not supported.
        """
        checks.path("name_or_path", name_or_path)
        if pool_mode is not None:
            checks.choice("pool_mode", pool_mode, get_args(PoolMode))
        _check_loading(dtype, progress)
        checkpoint = open_checkpoint(name_or_path, pool_mode=pool_mode)
        return cls.from_checkpoint(checkpoint, dtype=dtype, progress=progress)

    @classmethod
    def from_checkpoint(
        cls,
        checkpoint: Checkpoint,
        *,
        dtype: DTypeLike | None = None,
        progress: Progress | None = None,
    ) -> "LlavaVideo":
        """Loads the weights of a checkpoint that is open already; see ``from_pretrained``."""
        _check_loading(dtype, progress)
        return cls(
            checkpoint.load(dtype, progress),
            checkpoint.tokenizer,
            checkpoint.stop_ids,
            checkpoint.notes,
            find_chat_template(checkpoint.folder.path, checkpoint.tokenizer),
        )

    @overload
    def generate(
        self,
        videos: Sequence[Video | None] | None,
        prompts: Sequence[Conversation],
        *,
        stream: Literal[False] = False,
        **settings: Any,
    ) -> list[Answer]: ...

    @overload
    def generate(
        self,
        videos: Sequence[Video | None] | None,
        prompts: Sequence[Conversation],
        *,
        stream: Literal[True],
        **settings: Any,
    ) -> Iterator[Piece]: ...

    def generate(  # type: ignore[misc]  # it spells the settings out
        self,
        videos: Sequence[Video | None] | None,
        prompts: Sequence[Conversation],
        *,
        compression: Compressor | None = DyCoke(),  # noqa: B008 (frozen)
        max_new_tokens: Ints = 128,
        temperature: Floats = 0.0,
        top_k: Ints = 0,
        top_p: Floats = 1.0,
        seed: Ints = 0,
        frames: int = 32,
        fps: float | None = None,
        system: System = ...,
        prompt_format: PromptFormat = "llava-next",
        time_text: bool = False,
        allow_damaged: bool = False,
        batch_size: int = 8,
        stream: bool = False,
        progress: Progress | None = None,
    ) -> list[Answer] | Iterator[Piece]:
        """Answers a question about each clip.

        Every request gets the answer that it would get alone, whatever it is batched with: token
        for token in float32, up to rounding in half precision. A setting given as a sequence has
        one value for each request.

        Programs are compiled when they are first needed: for each number of frames, and for sizes
        of batch, prompt and answer that double from bucket to bucket. All else is data.

        Args:
            videos: a clip or None for each request; None if no request has a clip.
            prompts: a question or conversation for each request.
            compression: ``DyCoke`` with its settings, or another method; None: the plain model.
            max_new_tokens: number of tokens after which an answer is cut off.
            temperature: sampling temperature; 0 for greedy decoding.
            top_k: number of most likely tokens to sample from; 0 for the whole vocabulary.
            top_p: sample from the fewest tokens that hold this probability, in (0, 1].
            seed: of sampling.
            frames: number of frames of a file to use (see ``inputs.video.FrameSampling``).
            fps: frames a second to use instead, at most ``frames`` of them.
            system: text of the system turn; None for no such turn; ``...`` (the default) for "You
                are a helpful assistant." in the format llava-next, and None in checkpoint.
            prompt_format: ``llava-next``: the conversation format of LLaVA-NeXT, in which the
                models were trained. ``checkpoint``: the checkpoint's own chat template.
            time_text: tell the model the times of the frames, as LLaVA-Video does.
            allow_damaged: use what can be decoded of damaged files.
            batch_size: largest number of requests that run together. The clips of the next batch
                are decoded while one runs.
            stream: return an iterator of ``Piece`` that yields text as it is generated.
            progress: called while the work goes on.

        Returns:
            The answers in the order of the requests, or the iterator.

        Raises:
            DycokeError: VideoError, PromptError, ConfigError or RequestError, saying what to do.
        """
        videos, prompts = _one_each(videos, prompts)
        count = len(prompts)
        batch_size = checks.whole_number("batch_size", batch_size, 1, error=RequestError)
        checks.flag("stream", stream, error=RequestError)
        check_compressor(compression)
        _check_asking(system, prompt_format, time_text, allow_damaged, progress)
        settings = (
            _each("max_new_tokens", max_new_tokens, count),
            _each("temperature", temperature, count),
            _each("top_k", top_k, count),
            _each("top_p", top_p, count),
            _each("seed", seed, count),
        )
        decodings = [Decoding(*values) for values in zip(*settings, strict=True)]
        if prompt_format == "checkpoint":
            check_template(self.chat_template)
        if time_text and any(clip is not None and not has_times(clip) for clip in videos):
            raise RequestError("time_text needs files: an array does not say when it was filmed")
        sampling = FrameSampling(frames=frames, fps=fps)

        # Progress counts the frames of a single clip, and the clips of many.
        decoding = progress if count == 1 else None

        def prepare(index: int) -> "_Prepared":
            request, notes = self.request(
                videos[index],
                prompts[index],
                decodings[index],
                sampling,
                system=system,
                prompt_format=prompt_format,
                time_text=time_text,
                allow_damaged=allow_damaged,
                progress=decoding,
            )
            return _Prepared(index, request, notes)

        groups = _groups(prepare, count, batch_size, progress)
        pieces = self._run(groups, compression, stream, progress)
        if stream:
            return pieces
        answers = {piece.index: piece.answer for piece in pieces if piece.answer is not None}
        return [answers[index] for index in range(count)]

    def score(
        self,
        videos: Sequence[Video | None] | None,
        prompts: Sequence[Conversation],
        answers: Sequence[str],
        *,
        compression: Compressor | None = DyCoke(),  # noqa: B008 (frozen)
        frames: int = 32,
        fps: float | None = None,
        system: System = ...,
        batch_size: int = 8,
        progress: Progress | None = None,
    ) -> list[Likelihood]:
        """Computes how likely the model finds given answers (teacher forcing).

        An answer counts with the token that ends it. With a compressor each token is scored as it
        would be generated.

        Args:
            videos: as in ``generate``.
            prompts: as in ``generate``.
            answers: an answer to each request, not empty.
            compression: as in ``generate``.
            frames: as in ``generate``.
            fps: as in ``generate``.
            system: as in ``generate``.
            batch_size: as in ``generate``.
            progress: called while the work goes on.

        Returns:
            The likelihoods in the order of the requests.

        Raises:
            DycokeError: as ``generate`` does.
        """
        videos, prompts = _one_each(videos, prompts)
        count = len(prompts)
        must = "prompts and answers must be lists with one entry for each request"
        answers = checks.sequence("answers", answers, must, error=RequestError)
        if len(answers) != count:
            raise RequestError(f"{count} prompts and {len(answers)} answers; give one each")
        batch_size = checks.whole_number("batch_size", batch_size, 1, error=RequestError)
        check_compressor(compression)
        sampling = FrameSampling(frames=frames, fps=fps)
        ids = [encode_answer(self.tokenizer, answer) for answer in answers]

        def prepare(index: int) -> "_Prepared":
            request, notes = self.request(
                videos[index], prompts[index], Decoding(len(ids[index])), sampling, system=system
            )
            return _Prepared(index, request, notes)

        scored: dict[int, Likelihood] = {}
        for group in _groups(prepare, count, batch_size, progress):
            of_group = score_batch(
                self.model,
                [prepared.request for prepared in group],
                [ids[prepared.index] for prepared in group],
                compression,
                progress=progress,
            )
            scored |= {p.index: one for p, one in zip(group, of_group, strict=True)}
        return [scored[index] for index in range(count)]

    def request(
        self,
        video: Video | None,
        prompt: Conversation,
        decoding: Decoding,
        sampling: FrameSampling,
        *,
        system: System = ...,
        prompt_format: PromptFormat = "llava-next",
        time_text: bool = False,
        allow_damaged: bool = False,
        progress: Progress | None = None,
    ) -> tuple[Request, tuple[str, ...]]:
        """Prepares one question for the engine: reads its clip and encodes its prompt.

        The arguments are those of ``generate``.

        Returns:
            The request, and remarks on the clip.
        """
        checks.instance("decoding", decoding, Decoding, error=RequestError)
        checks.instance("sampling", sampling, FrameSampling, error=RequestError)
        _check_asking(system, prompt_format, time_text, allow_damaged, progress)
        clip, size = None, self.config.vision.image_size
        if video is not None:
            clip = read_video(video, sampling, size, allow_damaged=allow_damaged, progress=progress)
        times = None
        if time_text and clip is not None:
            times = time_instruction(clip.duration, clip.times)
        encode: Callable[..., Prompt] = build_prompt
        if prompt_format == "checkpoint":
            encode = partial(build_prompt_by_template, template=self.chat_template)
        if isinstance(system, EllipsisType):
            system = DEFAULT_SYSTEM if prompt_format == "llava-next" else None
        ids = encode(
            self.tokenizer,
            prompt,
            system=system,
            has_video=clip is not None,
            time_instruction=times,
        )
        if clip is None:
            return Request(ids, None, decoding), ()
        return Request(ids, clip.frames, decoding), clip.notes

    def _run(
        self,
        groups: Generator[list["_Prepared"], None, None],
        compression: Compressor | None,
        stream: bool,
        progress: Progress | None,
    ) -> Iterator[Piece]:
        # Closing it, after an error or if the reader of a stream stops, ends the reading of clips.
        with closing(groups):
            for group in groups:
                yield from self._run_group(group, compression, stream, progress)

    def _run_group(
        self,
        group: Sequence["_Prepared"],
        compression: Compressor | None,
        stream: bool,
        progress: Progress | None,
    ) -> Iterator[Piece]:
        texts = [_Text(self.tokenizer) for _ in group]
        updates = run_batch(
            self.model,
            [prepared.request for prepared in group],
            compression,
            self.stop_ids,
            stream_every=STREAM_EVERY if stream else None,
            progress=progress,
        )
        finished: set[int] = set()
        for update in updates:
            for row, (prepared, text, row_now) in enumerate(zip(group, texts, update, strict=True)):
                if row in finished:
                    continue
                piece = text.extend(row_now)
                if row_now.finish_reason is not None:
                    finished.add(row)
                    answer = Answer(
                        text.whole,
                        row_now.token_ids,
                        row_now.finish_reason,
                        row_now.tokens,
                        row_now.seconds,
                        prepared.notes,
                    )
                    yield Piece(prepared.index, piece, answer)
                elif piece:
                    yield Piece(prepared.index, piece)


@dataclass(frozen=True)
class _Prepared:
    index: int
    request: Request
    notes: tuple[str, ...]


class _Text:
    """The text of a growing list of ids, in whole characters only."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._backend = tokenizer.backend_tokenizer
        self._stream = DecodeStream(skip_special_tokens=True)
        self._read = 0
        self.whole = ""

    def extend(self, generated: Generated) -> str:
        """The text that the ids since the last call have added."""
        ids = generated.token_ids
        before = self.whole
        if generated.finish_reason is not None:
            # The bytes of an incomplete character become replacement characters.
            self.whole = self._backend.decode(list(ids), skip_special_tokens=True)
        else:
            for token in ids[self._read :]:
                self.whole += self._stream.step(self._backend, token) or ""
            self._read = len(ids)
        return self.whole[len(before) :]


def _groups(
    prepare: Callable[[int], _Prepared], count: int, batch_size: int, progress: Progress | None
) -> Generator[list[_Prepared], None, None]:
    """Yields prepared requests that can run as one batch; those that follow are read meanwhile."""
    windows = [range(s, min(s + batch_size, count)) for s in range(0, count, batch_size)]
    pool = ThreadPoolExecutor(CLIP_THREADS, thread_name_prefix="clips")
    try:
        ready = 0
        ahead = [pool.submit(prepare, index) for index in windows[0]] if windows else []
        for following in [*windows[1:], ()]:
            window = []
            for future in ahead:
                window.append(future.result())
                ready += 1
                if progress:
                    progress("reading clips", ready, count)
            # Decoded while this window runs on the device. No more than that, to bound memory.
            ahead = [pool.submit(prepare, index) for index in following]
            yield from _by_frames(window)
    finally:
        # After an error, or if nobody reads on, other clips are not needed.
        pool.shutdown(cancel_futures=True)


def _by_frames(window: Sequence[_Prepared]) -> list[list[_Prepared]]:
    """Groups of requests with equal numbers of frames, in the order of their first request."""
    groups: dict[int, list[_Prepared]] = {}
    for prepared in window:
        groups.setdefault(prepared.request.num_frames, []).append(prepared)
    return list(groups.values())


def _one_each(
    videos: Sequence[Video | None] | None, prompts: Sequence[Conversation]
) -> tuple[Sequence[Video | None], Sequence[Conversation]]:
    """Checks that there is a video, or None, for each prompt."""
    must = "videos and prompts must be lists with one entry for each request"
    prompts = checks.sequence("prompts", prompts, must, error=RequestError)
    if videos is None:
        videos = [None] * len(prompts)
    videos = checks.sequence("videos", videos, must, error=RequestError)
    if len(videos) != len(prompts):
        raise RequestError(f"{len(videos)} videos but {len(prompts)} prompts; give one each")
    return videos, prompts


def _each(name: str, value: Any, count: int) -> Sequence[Any]:
    """One value for each request, of one value or one for each; ``Decoding`` checks them."""
    values = value.tolist() if isinstance(value, np.ndarray | jax.Array) else value
    if isinstance(values, str | bytes) or not isinstance(values, Sequence):
        return [values] * count
    if len(values) != count:
        raise RequestError(f"{name} has {len(values)} values for {count} requests")
    return values


def _check_loading(dtype: DTypeLike | None, progress: Progress | None) -> None:
    try:
        weight_dtype(dtype)
    except CheckpointError as error:
        raise ConfigError(str(error)) from None
    checks.function("progress", progress, error=RequestError)


def _check_asking(
    system: System,
    prompt_format: PromptFormat,
    time_text: bool,
    allow_damaged: bool,
    progress: Progress | None,
) -> None:
    checks.choice("prompt_format", prompt_format, get_args(PromptFormat), error=RequestError)
    if system is not None and system is not ...:
        checks.text("system", system, error=RequestError)
    checks.flag("time_text", time_text, error=RequestError)
    checks.flag("allow_damaged", allow_damaged, error=RequestError)
    checks.function("progress", progress, error=RequestError)
