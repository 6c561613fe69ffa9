"""What the host does for a request: reads its clip and encodes its prompt, ahead of the device."""

import logging
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from traceback import clear_frames
from types import EllipsisType

from dycoke_jax.compression.protocol import Compressor
from dycoke_jax.config import LlavaConfig
from dycoke_jax.engine.requests import Failure, Prepared, Request, failure
from dycoke_jax.engine.sharing import share_prepared
from dycoke_jax.errors import RequestError
from dycoke_jax.generation.layout import plan
from dycoke_jax.hosts import ALONE, Processes
from dycoke_jax.inputs.any_video import ReadVideo, has_times, read_video
from dycoke_jax.inputs.chat_template import build_prompt_by_template, check_template
from dycoke_jax.inputs.prompt_length import encode_within
from dycoke_jax.inputs.prompts import (
    DEFAULT_SYSTEM,
    Prompt,
    Tokenizer,
    build_prompt,
    check_prompt,
    time_instruction,
)
from dycoke_jax.progress import Progress

_LOG = logging.getLogger(__name__)

CLIP_THREADS = 4
"""Clips that are decoded at the same time; FFmpeg uses threads of its own for each."""


def prepare(
    request: Request,
    tokenizer: Tokenizer,
    config: LlavaConfig,
    compression: Compressor | None,
    *,
    chat_template: str | None = None,
    read: ReadVideo = read_video,
    progress: Progress | None = None,
) -> Prepared:
    """Reads the clip of a request and encodes its prompt.

    Args:
        request: the request.
        tokenizer: the checkpoint's tokenizer.
        config: the model, whose vision tower says how large frames are, and whose positions say how
            long a prompt may be.
        compression: method and settings, which say how many visual tokens there are; None for the
            plain model.
        chat_template: source of the checkpoint's chat template; None if it has none.
        read: reads the clip.
        progress: called after each decoded frame.

    Raises:
        VideoError: if the clip cannot be read.
        PromptError: if the prompt cannot be encoded.
        RequestError: if the clip is no video, or has no times where they are to be told, or if the
            prompt is too long for the model.
        ConfigError: if the compression cannot work on this model or clip length.
    """
    prompting, video = request.prompting, request.video
    encode: Callable[..., Prompt] = build_prompt
    system = prompting.system
    if isinstance(system, EllipsisType):
        system = DEFAULT_SYSTEM if prompting.prompt_format == "llava-next" else None
    if prompting.prompt_format == "checkpoint":
        encode = partial(build_prompt_by_template, template=check_template(chat_template))
    if prompting.time_text and video is not None and not has_times(video):
        raise RequestError("time_text needs files: an array does not say when it was filmed")
    check_prompt(request.prompt, has_video=video is not None)
    clip, times = None, None
    if video is not None:
        clip = read(
            video,
            request.sampling,
            config.vision.image_size,
            allow_damaged=request.allow_damaged,
            progress=progress,
        )
        if prompting.time_text:
            times = time_instruction(clip.duration, clip.times)
    encode = partial(
        encode, tokenizer, system=system, has_video=clip is not None, time_instruction=times
    )
    frames = 0 if clip is None else len(clip.frames)
    visual = plan(config, 1, frames, 0, 0, 0, compression).slots.visual
    new = request.decoding.max_new_tokens
    room = config.text.max_positions - visual - new
    why = (
        f"the text, {visual} visual tokens and {new} new ones must not exceed the model's "
        f"{config.text.max_positions} positions"
    )
    ids, notes = encode_within(encode, request.prompt, room, truncate=prompting.truncate, why=why)
    if clip is None:
        return Prepared(ids, None, request.decoding, notes)
    return Prepared(ids, clip.frames, request.decoding, (*clip.notes, *notes))


class Ahead:
    """Prepares the requests of a stream in threads, no more of them than is asked for.

    Several processes each prepare some of the requests, and tell each other what has become of
    them, all but the frames. So every process takes the same from the stream.

    Attributes:
        begun: number of requests taken from the stream so far.
        has_ended: whether the stream has no more requests.
    """

    def __init__(
        self,
        requests: Iterable[Request | None],
        prepare: Callable[[Request], Prepared],
        processes: Processes = ALONE,
        together: int = 1,
    ) -> None:
        """Begins with no request.

        Args:
            requests: the stream; None in it says that no request waits now.
            prepare: prepares a request; called in threads.
            processes: the processes that work together.
            together: of how many requests they tell each other at once.
        """
        self._requests = iter(requests)
        self._prepare = prepare
        self._processes = processes
        self._together = together
        self._pool = ThreadPoolExecutor(CLIP_THREADS, thread_name_prefix="clips")
        self._in_work: deque[tuple[int, Request, Future[Prepared] | None]] = deque()
        self._finished: deque[tuple[int, Prepared] | Failure] = deque()
        self.begun = 0
        self.has_ended = False

    def __len__(self) -> int:
        """Number of requests in preparation, those included that wait to be taken."""
        return len(self._in_work) + len(self._finished)

    def extend(self, most: int) -> None:
        """Takes requests until ``most`` are in preparation, none waits now, or the stream ends."""
        while len(self) < most and not self.has_ended:
            try:
                request = next(self._requests)
            except StopIteration:
                self.has_ended = True
                return
            if request is None:
                return
            future = None
            if self._processes.reader(self.begun) == self._processes.index:
                future = self._pool.submit(self._prepare, request)
            self._in_work.append((self.begun, request, future))
            self.begun += 1

    def take(self) -> tuple[int, Prepared] | Failure:
        """Waits for the first request in preparation, in the order of the stream.

        Returns:
            The number of the request in the stream with what was prepared, or its failure.

        Raises:
            HostError: if another process has failed.
        """
        if not self._finished:
            together = 1 if self._processes.count == 1 else self._together
            first = [self._in_work.popleft() for _ in range(min(together, len(self._in_work)))]
            own = (_outcome(index, future) for index, _, future in first if future is not None)
            if self._processes.count == 1:
                self._finished.extend(own)
            else:
                self._finished.extend(
                    share_prepared({index: request for index, request, _ in first}, own)
                )
        return self._finished.popleft()

    def close(self) -> None:
        """Waits for the threads; requests that none of them has begun are not prepared."""
        self._pool.shutdown(cancel_futures=True)


def _outcome(index: int, future: Future[Prepared]) -> tuple[int, Prepared] | Failure:
    """Waits for a request; its own error is its outcome, of whatever kind it is."""
    try:
        return index, future.result()
    except Exception as error:
        _LOG.debug("request %d cannot be prepared", index, exc_info=True)
        # Among the variables of the functions that it has passed may be frames of the clip.
        cause: BaseException | None = error
        while cause is not None:
            clear_frames(cause.__traceback__)
            cause = cause.__context__
        return failure(index, error)
