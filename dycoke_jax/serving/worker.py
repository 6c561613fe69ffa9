"""The one thread that runs the engine, and the queue from which it takes requests.

Clips are read by other threads before their requests are queued, so that a clip which takes long
holds up no other request.

The engine reads the queue as its stream of requests, and asks it again after every batch. While
nothing waits, the queue says so, and the engine runs what it has in a batch that is not full.
"""

import asyncio
import logging
import threading
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from dataclasses import dataclass, replace

from dycoke_jax.compression.protocol import Compressor
from dycoke_jax.engine.prepare import CLIP_THREADS
from dycoke_jax.engine.requests import Failure, Piece, Request, failure
from dycoke_jax.engine.schedule import BatchReport
from dycoke_jax.inputs.any_video import ReadVideo, read_video
from dycoke_jax.llava_video import STREAM_EVERY, LlavaVideo
from dycoke_jax.serving.faults import Fault, failed, of_failure, stopping
from dycoke_jax.serving.metrics import Metrics
from dycoke_jax.serving.settings import Serving

_LOG = logging.getLogger(__name__)


@dataclass(eq=False)
class Ticket:
    """A request on its way through the engine.

    Attributes:
        request: the request.
        compression: what it is answered with; None for the plain model.
        loop: the event loop of ``events``.
        events: what becomes of it: pieces, of which the last has the answer, or a fault.
        abandoned: whether nobody waits for it any more.
    """

    request: Request
    compression: Compressor | None
    loop: asyncio.AbstractEventLoop
    events: asyncio.Queue[Piece | Fault]
    abandoned: bool = False

    def tell(self, event: Piece | Fault) -> None:
        """Hands an event to the event loop, from any thread."""
        with suppress(RuntimeError):  # the loop has ended, and nobody waits
            self.loop.call_soon_threadsafe(self.events.put_nowait, event)


class Worker:
    """Runs the engine in a thread of its own for requests from any thread.

    Requests whose compression differs do not share batches: those with another one wait until the
    requests before them are answered.
    """

    def __init__(
        self,
        model: LlavaVideo,
        settings: Serving,
        metrics: Metrics,
        read: ReadVideo = read_video,
    ) -> None:
        """Starts no thread yet.

        Args:
            model: the model.
            settings: numbers of requests.
            metrics: counted into.
            read: reads the clips, as in ``LlavaVideo.run``; called in threads.
        """
        self._model = model
        self._settings = settings
        self._metrics = metrics
        self._read = read
        self._places = threading.BoundedSemaphore(settings.max_requests)
        self._changed = threading.Condition()
        self._reading: set[Ticket] = set()
        self._waiting: deque[Ticket] = deque()
        self._taken: dict[int, Ticket] = {}
        self._stopping = False
        self._readers = ThreadPoolExecutor(CLIP_THREADS, thread_name_prefix="clips of requests")
        # A daemon, because a program on the device cannot be ended when the server must.
        self._thread = threading.Thread(target=self._work, name="engine", daemon=True)

    def start(self) -> None:
        """Starts the thread."""
        self._thread.start()

    @property
    def is_ready(self) -> bool:
        """Whether requests are accepted."""
        return not self._stopping and self._thread.is_alive()

    def admit(self) -> None:
        """Takes a place in the server for a request; ``submit`` or ``leave`` must follow.

        Raises:
            Fault: if no place is free, or if the server is shutting down.
        """
        if not self.is_ready:
            raise stopping()
        if not self._places.acquire(blocking=False):
            raise Fault(429, "the server has no room; ask again later", code="queue_full")

    def leave(self) -> None:
        """Gives back the place of a request that was not submitted."""
        self._places.release()

    def submit(self, ticket: Ticket) -> None:
        """Queues a request; its place is free again when the engine has done with it.

        Raises:
            Fault: if the server is shutting down; the place is not given back then.
        """
        with self._changed:
            if self._stopping:
                raise stopping()
            if ticket.request.video is None:
                self._waiting.append(ticket)
            else:
                self._reading.add(ticket)
                self._readers.submit(self._read_clip, ticket)
            self._count()
            self._changed.notify_all()

    def stop(self) -> None:
        """Refuses new requests; the thread ends when those that are here are answered."""
        with self._changed:
            self._stopping = True
            self._changed.notify_all()

    def join(self, seconds: float) -> bool:
        """Waits for the thread to end; returns whether it has."""
        self._thread.join(seconds)
        return not self._thread.is_alive()

    def give_up(self) -> None:
        """Tells all requests that are not answered that the server is shutting down."""
        with self._changed:
            left = [*self._reading, *self._waiting, *self._taken.values()]
        for ticket in left:
            ticket.abandoned = True
            ticket.tell(stopping())

    def _read_clip(self, ticket: Ticket) -> None:
        """Reads the clip of a request, and queues the request for the engine."""
        request, fault = ticket.request, None
        try:
            if not ticket.abandoned:
                size = self._model.config.vision.image_size
                clip = self._read(
                    request.video, request.sampling, size, allow_damaged=request.allow_damaged
                )
                ticket.request = replace(request, video=clip)
        except Exception as error:
            fault = _fault(failure(0, error))
        with self._changed:
            self._reading.remove(ticket)
            if fault is None:
                self._waiting.append(ticket)
            self._count()
            self._changed.notify_all()
        if fault is not None:
            ticket.tell(fault)
            self._places.release()

    def _work(self) -> None:
        while (first := self._next(wait=True)) is not None:
            run = self._model.run(
                self._stream(first.compression),
                compression=first.compression,
                batch_size=self._settings.batch_size,
                stream_every=STREAM_EVERY,
                on_batch=self._report,
            )
            try:
                with closing(run):
                    for result in run:
                        self._deliver(result)
            except Exception:
                # A fault of the program or of the device: those that are in its hands fail, and
                # it goes on with the others.
                _LOG.exception("the engine has failed")
                for index, ticket in [*self._taken.items()]:
                    ticket.tell(failed())
                    self._finish(index)
        self._readers.shutdown(wait=False)

    def _stream(self, compression: Compressor | None) -> Iterator[Request | None]:
        """The requests with one compression, up to the first with another one."""
        index = 0
        while True:
            # All that is taken is answered if the engine has nothing in hand: it may wait then.
            ticket = self._next(wait=not self._taken)
            if ticket is None and not self._taken:
                return
            if ticket is None:
                yield None
            elif ticket.compression != compression:
                return
            else:
                with self._changed:
                    self._waiting.popleft()
                    self._taken[index] = ticket
                    self._count()
                index += 1
                yield ticket.request

    def _next(self, *, wait: bool) -> Ticket | None:
        """The first request that somebody waits for, which stays in the queue.

        Args:
            wait: whether to wait for one, and then for those that are sent together with it.

        Returns:
            The request; None if there is none, after a wait only when the server shuts down.
        """
        with self._changed:
            while True:
                while self._waiting and self._waiting[0].abandoned:
                    self._waiting.popleft()
                    self._places.release()
                    self._count()
                if self._waiting or not wait or (self._stopping and not self._reading):
                    break
                self._changed.wait()
                self._changed.wait_for(self._has_full_batch, self._settings.gather)
            return self._waiting[0] if self._waiting else None

    def _has_full_batch(self) -> bool:
        return len(self._waiting) >= self._settings.batch_size or self._stopping

    def _deliver(self, result: Piece | Failure) -> None:
        ticket = self._taken[result.index]
        ticket.tell(_fault(result) if isinstance(result, Failure) else result)
        if isinstance(result, Piece) and result.answer is not None:
            self._metrics.count(result.answer.tokens)
        if isinstance(result, Failure) or result.answer is not None:
            self._finish(result.index)

    def _finish(self, index: int) -> None:
        with self._changed:
            del self._taken[index]
            self._count()
        self._places.release()

    def _report(self, report: BatchReport) -> None:
        self._metrics.batch_fill.observe(report.fill)

    def _count(self) -> None:
        self._metrics.waiting.set(len(self._reading) + len(self._waiting))
        self._metrics.running.set(len(self._taken))


def _fault(failure: Failure) -> Fault:
    """What the client of a request that has failed is told; the log has what it is not told."""
    if failure.kind == "internal":
        _LOG.error("a request has failed: %s", failure.message, exc_info=failure.error)
    return of_failure(failure)
