"""What the host does for a request: reads its clip and encodes its prompt, ahead of the device."""

from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from traceback import clear_frames
from types import EllipsisType

from dycoke_jax.engine.requests import Failure, Prepared, Request, failure
from dycoke_jax.errors import DycokeError, RequestError
from dycoke_jax.inputs.any_video import has_times, read_video
from dycoke_jax.inputs.chat_template import build_prompt_by_template, check_template
from dycoke_jax.inputs.prompts import (
    DEFAULT_SYSTEM,
    Prompt,
    Tokenizer,
    build_prompt,
    time_instruction,
)
from dycoke_jax.progress import Progress

CLIP_THREADS = 4
"""Clips that are decoded at the same time; FFmpeg uses threads of its own for each."""


def prepare(
    request: Request,
    tokenizer: Tokenizer,
    image_size: int,
    *,
    chat_template: str | None = None,
    progress: Progress | None = None,
) -> Prepared:
    """Reads the clip of a request and encodes its prompt.

    Args:
        request: the request.
        tokenizer: the checkpoint's tokenizer.
        image_size: height and width of a frame in pixels, as the vision tower reads it.
        chat_template: source of the checkpoint's chat template; None if it has none.
        progress: called after each decoded frame.

    Raises:
        VideoError: if the clip cannot be read.
        PromptError: if the prompt cannot be encoded.
        RequestError: if the clip is no video, or has no times where they are to be told.
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
    clip, times = None, None
    if video is not None:
        clip = read_video(
            video,
            request.sampling,
            image_size,
            allow_damaged=request.allow_damaged,
            progress=progress,
        )
        if prompting.time_text:
            times = time_instruction(clip.duration, clip.times)
    has_video = clip is not None
    ids = encode(
        tokenizer, request.prompt, system=system, has_video=has_video, time_instruction=times
    )
    if clip is None:
        return Prepared(ids, None, request.decoding)
    return Prepared(ids, clip.frames, request.decoding, clip.notes)


class Ahead:
    """Prepares the requests of a stream in threads, no more of them than is asked for.

    Attributes:
        begun: number of requests taken from the stream so far.
        has_ended: whether the stream has no more requests.
    """

    def __init__(self, requests: Iterable[Request], prepare: Callable[[Request], Prepared]) -> None:
        self._requests = iter(requests)
        self._prepare = prepare
        self._pool = ThreadPoolExecutor(CLIP_THREADS, thread_name_prefix="clips")
        self._in_work: deque[tuple[int, Future[Prepared]]] = deque()
        self.begun = 0
        self.has_ended = False

    def __len__(self) -> int:
        """Number of requests in preparation, those included that wait to be taken."""
        return len(self._in_work)

    def extend(self, most: int) -> None:
        """Takes requests from the stream until ``most`` are in preparation, or it ends."""
        while len(self) < most and not self.has_ended:
            try:
                request = next(self._requests)
            except StopIteration:
                self.has_ended = True
                return
            self._in_work.append((self.begun, self._pool.submit(self._prepare, request)))
            self.begun += 1

    def take(self) -> tuple[int, Prepared] | Failure:
        """Waits for the first request in preparation, in the order of the stream.

        Returns:
            The number of the request in the stream with what was prepared, or its failure.
        """
        index, future = self._in_work.popleft()
        try:
            return index, future.result()
        except DycokeError as error:
            # Among the variables of the functions that it has passed may be frames of the clip.
            cause: BaseException | None = error
            while cause is not None:
                clear_frames(cause.__traceback__)
                cause = cause.__context__
            return failure(index, error)

    def close(self) -> None:
        """Waits for the threads; requests that none of them has begun are not prepared."""
        self._pool.shutdown(cancel_futures=True)
