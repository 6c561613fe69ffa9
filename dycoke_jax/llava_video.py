"""The main interface of the library: a model with its tokenizer answers questions about clips."""

from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence, Sized
from contextlib import closing
from dataclasses import replace
from functools import partial
from os import PathLike
from typing import Literal, get_args, overload

import numpy as np
from jax.sharding import Mesh
from jax.typing import DTypeLike

from dycoke_jax import checks
from dycoke_jax.checkpoint.chat_template import find_chat_template
from dycoke_jax.checkpoint.opening import Checkpoint, check_vocabulary, open_checkpoint
from dycoke_jax.checkpoint.tensors import check_storage, weight_dtype
from dycoke_jax.compression.dycoke import DyCoke
from dycoke_jax.compression.protocol import Compressor, check_compressor
from dycoke_jax.config import LlavaConfig, PoolMode, Storage
from dycoke_jax.engine import schedule
from dycoke_jax.engine.batch import score_batch
from dycoke_jax.engine.prepare import prepare
from dycoke_jax.engine.requests import (
    Answer,
    Decoding,
    Failure,
    Likelihood,
    Piece,
    Prepared,
    Request,
)
from dycoke_jax.engine.warm_up import WarmUp, layouts_of, warm_up
from dycoke_jax.errors import CheckpointError, ConfigError, RequestError
from dycoke_jax.hosts import failures_of_others, processes_of
from dycoke_jax.inputs.any_video import ReadVideo, Video, read_video
from dycoke_jax.inputs.chat_template import template_of
from dycoke_jax.inputs.prompts import Conversation, Prompting, Tokenizer, encode_answer, stop_ids
from dycoke_jax.inputs.sampling import FrameSampling
from dycoke_jax.model import Model
from dycoke_jax.models.llava import Params
from dycoke_jax.progress import Progress
from dycoke_jax.sharding import make_mesh

STREAM_EVERY = 4
"""Tokens between two pieces of a stream; each piece costs a transfer from the device."""

Failures = Literal["raise", "return"]
"""What becomes of a request that cannot be answered: ``raise`` raises its error and ends the work,
``return`` gives a ``Failure`` in place of its answer."""


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
        weights: Storage | None = None,
        kv: Storage | None = None,
        mesh: Mesh | str | Mapping[str, int] | None = None,
        fsdp: bool = False,
        pool_mode: PoolMode | None = None,
        progress: Progress | None = None,
    ) -> "LlavaVideo":
        """Loads a checkpoint.

        Args:
            name_or_path: a folder in the lmms-lab or the llava-hf layout, a folder that
                ``dycoke-jax convert`` made, or a hub id ``org/name``, which is downloaded.
            dtype: dtype of weights and computation (float32, bfloat16, float16); None: as stored.
            weights: ``int8`` stores the matrices of the language model as int8, with a scale for
                each output channel; None: as they are in the checkpoint.
            kv: ``int8`` stores keys and values as int8 while decoding, with a scale for each head
                and token; None: in the dtype of the computation.
            mesh: the devices to spread the model over: sizes of its axes such as
                ``"data=2,model=4"``, or a mesh with these axes; None for a single device.
            fsdp: spread the weights over the mesh's ``data`` too, which gathers them layer by layer
                where they are used.
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
        _check_loading(dtype, weights, kv, progress)
        checkpoint = open_checkpoint(name_or_path, pool_mode=pool_mode)
        return cls.from_checkpoint(
            checkpoint,
            dtype=dtype,
            weights=weights,
            kv=kv,
            mesh=mesh,
            fsdp=fsdp,
            progress=progress,
        )

    @classmethod
    def from_checkpoint(
        cls,
        checkpoint: Checkpoint,
        *,
        dtype: DTypeLike | None = None,
        weights: Storage | None = None,
        kv: Storage | None = None,
        mesh: Mesh | str | Mapping[str, int] | None = None,
        fsdp: bool = False,
        progress: Progress | None = None,
    ) -> "LlavaVideo":
        """Loads the weights of a checkpoint that is open already; see ``from_pretrained``."""
        _check_loading(dtype, weights, kv, progress)
        if mesh is not None and not isinstance(mesh, Mesh):
            mesh = make_mesh(mesh)
        processes_of(mesh)  # refuses a mesh that does not give each process rows of its own
        return cls(
            replace(checkpoint.load(dtype, progress, weights, mesh, fsdp=fsdp), kv=kv),
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
        compression: Compressor | None = ...,
        decoding: Decoding | Sequence[Decoding] = ...,
        sampling: FrameSampling = ...,
        prompting: Prompting = ...,
        allow_damaged: bool = ...,
        batch_size: int = ...,
        failures: Literal["raise"] = ...,
        progress: Progress | None = ...,
    ) -> list[Answer]: ...

    @overload
    def generate(
        self,
        videos: Sequence[Video | None] | None,
        prompts: Sequence[Conversation],
        *,
        compression: Compressor | None = ...,
        decoding: Decoding | Sequence[Decoding] = ...,
        sampling: FrameSampling = ...,
        prompting: Prompting = ...,
        allow_damaged: bool = ...,
        batch_size: int = ...,
        failures: Literal["return"],
        progress: Progress | None = ...,
    ) -> list[Answer | Failure]: ...

    def generate(
        self,
        videos: Sequence[Video | None] | None,
        prompts: Sequence[Conversation],
        *,
        compression: Compressor | None = DyCoke(),  # noqa: B008 (frozen)
        decoding: Decoding | Sequence[Decoding] = Decoding(),  # noqa: B008 (frozen)
        sampling: FrameSampling = FrameSampling(),  # noqa: B008 (frozen)
        prompting: Prompting = Prompting(),  # noqa: B008 (frozen)
        allow_damaged: bool = False,
        batch_size: int = 8,
        failures: Failures = "raise",
        progress: Progress | None = None,
    ) -> list[Answer] | list[Answer | Failure]:
        """Answers a question about each clip.

        Every request gets the answer that it would get alone, whatever it is batched with: token
        for token in float32, up to rounding in half precision.

        Programs are compiled when they are first needed, for sizes of batch, clip, prompt and
        answer that are rounded up to few values. All else is data.

        Args:
            videos: a clip or None for each request; None if no request has a clip.
            prompts: a question or conversation for each request.
            compression: ``DyCoke`` with its settings, or another method; None: the plain model.
            decoding: how answers are generated: for all requests, or a list with one for each.
            sampling: which frames of files to use.
            prompting: how the prompts are put to the model.
            allow_damaged: use what can be decoded of damaged files.
            batch_size: largest number of requests that run together. Other requests are prepared
                while they run.
            failures: ``raise``: the first request that cannot be answered raises its error and ends
                the work. ``return``: a ``Failure`` takes the place of its answer.
            progress: called while the work goes on.

        Returns:
            The answers in the order of the requests.

        Raises:
            DycokeError: VideoError, PromptError, ConfigError or RequestError, saying what to do.
                Any other exception is a fault of the program or the machine, raised as it was.
        """
        checks.choice("failures", failures, get_args(Failures), error=RequestError)
        requests = _requests(videos, prompts, decoding, sampling, prompting, allow_damaged)
        results: dict[int, Answer | Failure] = {}
        run = self.run(requests, compression=compression, batch_size=batch_size, progress=progress)
        with closing(run):
            for result in run:
                if isinstance(result, Failure):
                    if failures == "raise":
                        raise result.error
                    results[result.index] = result
                elif result.answer is not None:
                    results[result.index] = result.answer
        return [results[index] for index in range(len(requests))]

    def stream(
        self,
        videos: Sequence[Video | None] | None,
        prompts: Sequence[Conversation],
        *,
        compression: Compressor | None = DyCoke(),  # noqa: B008 (frozen)
        decoding: Decoding | Sequence[Decoding] = Decoding(),  # noqa: B008 (frozen)
        sampling: FrameSampling = FrameSampling(),  # noqa: B008 (frozen)
        prompting: Prompting = Prompting(),  # noqa: B008 (frozen)
        allow_damaged: bool = False,
        batch_size: int = 8,
        progress: Progress | None = None,
    ) -> Iterator[Piece]:
        """Answers a question about each clip, and yields the text as it is generated.

        Arguments and errors are those of ``generate``; settings are checked at once, clips and
        prompts when the work gets to them. The first request that cannot be answered ends the work;
        ``run`` goes on with the others.

        Returns:
            An iterator of the pieces of the answers, several of which may grow at the same time.
            Closing it ends the work.
        """
        run = self.run(
            _requests(videos, prompts, decoding, sampling, prompting, allow_damaged),
            compression=compression,
            batch_size=batch_size,
            stream_every=STREAM_EVERY,
            progress=progress,
        )
        return _raising(run)

    def run(
        self,
        requests: Iterable[Request | None],
        *,
        compression: Compressor | None = DyCoke(),  # noqa: B008 (frozen)
        batch_size: int = 8,
        stream_every: int | None = None,
        read: ReadVideo = read_video,
        progress: Progress | None = None,
        on_batch: Callable[[schedule.BatchReport], None] | None = None,
    ) -> Generator[Piece | Failure, None, None]:
        """Answers a stream of any number of requests, in bounded memory.

        On a mesh with devices of several processes (see ``hosts``) each of them makes this call
        with the same arguments, reads the clips of its part of the requests, and gets all results;
        ``generate``, ``stream`` and ``score`` likewise.

        Args:
            requests: the requests, such as a generator; at most four times ``batch_size`` of them
                are taken before they are answered. None in place of a request says that none waits
                now, so that those that were taken do not wait for a full batch either.
            compression: as in ``generate``.
            batch_size: as in ``generate``.
            stream_every: number of tokens between two pieces of an answer; None gives each answer
                in one piece.
            read: reads the clips; the ``read`` of an ``inputs.decoding_pool.DecodingPool`` does so
                in processes of their own, which a damaged or hostile file cannot take along.
            progress: called while the work goes on.
            on_batch: called before each batch runs, with its requests and how full it is.

        Returns:
            A generator of pieces of answers and of failures, as they come. Their ``index`` is the
            number of the request in the stream. Closing it ends the work.

        Raises:
            DycokeError: RequestError or ConfigError, if a setting that is common to all requests
                makes no sense.
        """
        batch_size = checks.whole_number("batch_size", batch_size, 1, error=RequestError)
        if stream_every is not None:
            stream_every = checks.whole_number("stream_every", stream_every, 1, error=RequestError)
        check_compressor(compression)
        checks.function("read", read, error=RequestError)
        checks.function("progress", progress, error=RequestError)
        checks.function("on_batch", on_batch, error=RequestError)
        # Progress counts the frames of a single clip, and the clips of many.
        is_single = isinstance(requests, Sized) and len(requests) == 1
        return schedule.run(
            self.model,
            self.tokenizer,
            partial(
                self.prepare,
                compression=compression,
                read=read,
                progress=progress if is_single else None,
            ),
            requests,
            compression,
            stop_ids=self.stop_ids,
            batch_size=batch_size,
            stream_every=stream_every,
            progress=progress,
            on_batch=on_batch,
        )

    def score(
        self,
        videos: Sequence[Video | None] | None,
        prompts: Sequence[Conversation],
        answers: Sequence[str],
        *,
        compression: Compressor | None = DyCoke(),  # noqa: B008 (frozen)
        sampling: FrameSampling = FrameSampling(),  # noqa: B008 (frozen)
        prompting: Prompting = Prompting(),  # noqa: B008 (frozen)
        allow_damaged: bool = False,
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
            sampling: as in ``generate``.
            prompting: as in ``generate``.
            allow_damaged: as in ``generate``.
            batch_size: as in ``generate``.
            progress: called while the work goes on.

        Returns:
            The likelihoods in the order of the requests.

        Raises:
            DycokeError: as ``generate`` does.
        """
        videos, prompts = _one_each(videos, prompts)
        must = "prompts and answers must be lists with one entry for each request"
        answers = checks.sequence("answers", answers, must, error=RequestError)
        if len(answers) != len(prompts):
            raise RequestError(f"{len(prompts)} prompts and {len(answers)} answers; give one each")
        batch_size = checks.whole_number("batch_size", batch_size, 1, error=RequestError)
        check_compressor(compression)
        checks.function("progress", progress, error=RequestError)
        ids = [encode_answer(self.tokenizer, answer) for answer in answers]
        # Answers of similar length run together.
        lengths = [Decoding(max_new_tokens=len(own)) for own in ids]
        requests = _requests(videos, prompts, lengths, sampling, prompting, allow_damaged)
        batches = schedule.form_batches(
            self.config,
            partial(self.prepare, compression=compression),
            requests,
            compression,
            batch_size=batch_size,
            processes=processes_of(self.model.mesh),
            progress=progress,
        )
        scored: dict[int, Likelihood] = {}
        with closing(batches), failures_of_others():
            for batch in batches:
                if isinstance(batch, Failure):
                    raise batch.error
                rows = schedule.place(batch, self.model.mesh)
                of_batch = score_batch(
                    self.model,
                    [None if queued is None else queued.prepared for queued in rows],
                    [() if queued is None else ids[queued.index] for queued in rows],
                    compression,
                    progress=progress,
                )
                batch = [queued for queued in rows if queued is not None]
                scored |= {one.index: like for one, like in zip(batch, of_batch, strict=True)}
        return [scored[index] for index in range(len(requests))]

    def warm_up(
        self,
        *,
        frames: Sequence[int],
        batch: Sequence[int] = (1, 2, 4, 8),
        question_tokens: Sequence[int] = (64,),
        max_new_tokens: Sequence[int] = (128,),
        compression: Compressor | None = DyCoke(),  # noqa: B008 (frozen)
        prompting: Prompting = Prompting(),  # noqa: B008 (frozen)
        progress: Progress | None = None,
    ) -> WarmUp:
        """Compiles the programs of all combinations of given sizes, before requests need them.

        Sizes are rounded up to few values, as those of requests are; each number stands for all
        that are rounded up to the same. What ``score`` needs besides is not compiled.

        Args:
            frames: numbers of frames of clips; 0 for questions without a clip.
            batch: numbers of requests that run together. ``generate`` also forms smaller batches
                than ``batch_size``, of what is left over: the default is for its default of 8.
            question_tokens: numbers of tokens of questions, the sentence about the times of the
                frames included if there is one (``Prompting.time_text``).
            max_new_tokens: as in ``Decoding``.
            compression: as in ``generate``.
            prompting: as in ``generate``; what is put around a question takes tokens too.
            progress: called after each combination.

        Returns:
            How many programs were compiled, and how many were found in the compilation cache on
            disk (see ``use_compilation_cache``).

        Raises:
            DycokeError: RequestError or ConfigError, naming the argument.
        """
        frames = _whole_numbers("frames", frames, 0)
        batch = _whole_numbers("batch", batch, 1)
        question_tokens = _whole_numbers("question_tokens", question_tokens, 1)
        max_new_tokens = _whole_numbers("max_new_tokens", max_new_tokens, 1)
        check_compressor(compression)
        checks.instance("prompting", prompting, Prompting, error=RequestError)
        checks.function("progress", progress, error=RequestError)
        side = self.config.vision.image_size
        clip = np.zeros((1, side, side, 3), np.uint8)
        words = replace(prompting, time_text=False)  # an array has no times
        shortest = self.prepare(Request("a", clip, Decoding(1), prompting=words)).prompt
        prompts = [
            replace(shortest, after=shortest.after + (0,) * (tokens - 1))
            for tokens in question_tokens
        ]
        layouts = layouts_of(
            self.config, prompts, frames, max_new_tokens, batch, compression, self.model.mesh
        )
        return warm_up(self.model, layouts, progress)

    def prepare(
        self,
        request: Request,
        *,
        compression: Compressor | None = None,
        read: ReadVideo = read_video,
        progress: Progress | None = None,
    ) -> Prepared:
        """Prepares a request for the device: reads its clip and encodes its prompt.

        Args:
            request: the request.
            compression: what it will be answered with; it leaves more room for text.
            read: reads the clip.
            progress: called after each decoded frame.

        Raises:
            DycokeError: VideoError, PromptError, RequestError or ConfigError.
        """
        checks.instance("request", request, Request, error=RequestError)
        return prepare(
            request,
            self.tokenizer,
            self.config,
            compression,
            chat_template=self.chat_template,
            read=read,
            progress=progress,
        )


def _raising(results: Generator[Piece | Failure, None, None]) -> Iterator[Piece]:
    # Closing it, after an error or if the reader of the stream stops, ends the reading of clips.
    with closing(results):
        for result in results:
            if isinstance(result, Failure):
                raise result.error
            yield result


def _requests(
    videos: Sequence[Video | None] | None,
    prompts: Sequence[Conversation],
    decoding: Decoding | Sequence[Decoding],
    sampling: FrameSampling,
    prompting: Prompting,
    allow_damaged: bool,
) -> list[Request]:
    """The requests of one call, which have all settings but ``decoding`` in common.

    Raises:
        RequestError: if the lists differ in length, or if a setting has a wrong type.
    """
    videos, prompts = _one_each(videos, prompts)
    if isinstance(decoding, Decoding):
        decoding = [decoding] * len(prompts)
    must = "it must be a Decoding, or a list with one for each request"
    decoding = checks.sequence("decoding", decoding, must, error=RequestError)
    if len(decoding) != len(prompts):
        raise RequestError(f"decoding has {len(decoding)} values for {len(prompts)} requests")
    return [
        Request(prompt, video, own, sampling, prompting, allow_damaged)
        for video, prompt, own in zip(videos, prompts, decoding, strict=True)
    ]


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


def _whole_numbers(name: str, values: Sequence[int], least: int) -> list[int]:
    must = "it must be a list of whole numbers"
    values = checks.sequence(name, values, must, error=RequestError)
    return [checks.whole_number(name, value, least, error=RequestError) for value in values]


def _check_loading(
    dtype: DTypeLike | None,
    weights: Storage | None,
    kv: Storage | None,
    progress: Progress | None,
) -> None:
    try:
        weight_dtype(dtype)
        check_storage("weights", weights)
        check_storage("kv", kv)
    except CheckpointError as error:
        raise ConfigError(str(error)) from None
    checks.function("progress", progress, error=RequestError)
