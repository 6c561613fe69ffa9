"""Forms full batches from a stream of requests and runs them, so that answers are a stream too.

Requests wait in one queue for each layout, in the order of the stream, and a full queue runs as a
batch. If many requests wait and no queue is full, the queue runs whose batch has the fewest empty
slots; free rows are taken by requests of smaller layouts, which only leave more slots empty. As
every row of a batch is independent of the others, no answer depends on what it is batched with. A
batch always has the layout of one of its requests, so no stream needs programs that its requests
do not need one by one.

Which batches are formed depends on the stream, which may say that no request waits now, and on
nothing else, such as the time that it takes to read a clip. So several processes that answer one
stream form the same batches, in which each has as many rows: for requests whose clips it has read.
"""

from collections import Counter
from collections.abc import Callable, Generator, Iterable, Sequence, Sized
from contextlib import closing
from dataclasses import dataclass

from jax.sharding import Mesh

from dycoke_jax.compression.protocol import Compressor
from dycoke_jax.config import LlavaConfig
from dycoke_jax.engine.batch import layout_of, rows_for, run_batch
from dycoke_jax.engine.prepare import Ahead
from dycoke_jax.engine.requests import Answer, Failure, Piece, Prepared, Request, failure
from dycoke_jax.engine.text import GrowingText
from dycoke_jax.generation.layout import Layout
from dycoke_jax.hosts import ALONE, Processes, failures_of_others, processes_of
from dycoke_jax.inputs.prompts import Tokenizer
from dycoke_jax.model import Model
from dycoke_jax.progress import Progress

LOOK_AHEAD = 3
"""How many batches of requests are prepared, or in preparation, beside the batch that runs."""

PATIENCE = 16
"""A request runs before this many batches of later requests have come in, however rare its layout
is."""


@dataclass(frozen=True, eq=False)
class Queued:
    """A request that is ready for the device.

    Attributes:
        index: number of the request in the stream, from 0.
        prepared: the request.
        layout: layout of a batch of this request alone.
    """

    index: int
    prepared: Prepared
    layout: Layout

    @property
    def size(self) -> int:
        """Number of slots of a row in this layout."""
        return self.layout.slots.prompt + self.layout.slots.generated


@dataclass(frozen=True)
class BatchReport:
    """How a batch was formed.

    Attributes:
        indices: numbers in the stream of the requests of the batch.
        batch_size: largest number of requests of a batch.
    """

    indices: tuple[int, ...]
    batch_size: int

    @property
    def fill(self) -> float:
        """Number of requests of the batch as a share of the largest, in (0, 1]."""
        return len(self.indices) / self.batch_size


def run(
    model: Model,
    tokenizer: Tokenizer,
    prepare: Callable[[Request], Prepared],
    requests: Iterable[Request | None],
    compression: Compressor | None,
    *,
    stop_ids: tuple[int, ...],
    batch_size: int,
    stream_every: int | None = None,
    progress: Progress | None = None,
    on_batch: Callable[[BatchReport], None] | None = None,
) -> Generator[Piece | Failure, None, None]:
    """Answers a stream of requests.

    Requests are taken from the stream when they are needed: no more than four times ``batch_size``
    of them are prepared, in preparation or running. While a batch runs on the device, requests that
    follow are prepared in threads. Closing the generator ends the threads.

    If the mesh has devices of several processes, each of them must call this with the same requests
    and settings, and read all that is yielded, which is the same in every process. Each prepares
    its part of the requests: of n processes the one with number i those with numbers i, n + i, ...

    Args:
        model: the model.
        tokenizer: the checkpoint's tokenizer.
        prepare: reads the clip of a request and encodes its prompt; called in threads.
        requests: the requests, of which there may be any number. None in place of one says that
            none waits now: those that were taken run, in a batch that is not full if need be, and
            then the stream is asked again. It may only block where all of them are answered.
        compression: method and settings, or None for the plain model.
        stop_ids: ids that end an answer.
        batch_size: largest number of requests that run together; with several processes rounded up
            to a multiple of their number.
        stream_every: number of tokens between two pieces of an answer; None gives each answer in
            one piece.
        progress: called while the work goes on.
        on_batch: called before each batch runs.

    Yields:
        Pieces of answers as they are generated, and failures of requests that cannot be answered,
        which do not stop the others. Their ``index`` is the number of the request in the stream.

    Raises:
        DycokeError: if the settings that are common to all requests make no sense.
        HostError: if another process has ended or failed.
        Exception: what the stream itself raises, or a program that runs a batch.
    """
    processes = processes_of(model.mesh)
    batches = form_batches(
        model.config,
        prepare,
        requests,
        compression,
        batch_size=batch_size,
        processes=processes,
        progress=progress,
    )
    batch_size = _rounded(batch_size, processes)
    with closing(batches), failures_of_others():
        for batch in batches:
            if isinstance(batch, Failure):
                yield batch
                continue
            if on_batch:
                on_batch(BatchReport(tuple(queued.index for queued in batch), batch_size))
            yield from _run_one(
                model, tokenizer, batch, compression, stop_ids, stream_every, progress
            )


def form_batches(
    config: LlavaConfig,
    prepare: Callable[[Request], Prepared],
    requests: Iterable[Request | None],
    compression: Compressor | None,
    *,
    batch_size: int,
    processes: Processes = ALONE,
    progress: Progress | None = None,
) -> Generator[list[Queued] | Failure, None, None]:
    """Prepares a stream of requests and forms batches of them.

    The arguments are those of ``run``; ``processes`` are those that work together.

    Yields:
        The requests of a batch, at most ``batch_size``, or the failure of a single request. The
        requests that follow a batch are prepared until the next one is asked for.
    """
    total = len(requests) if isinstance(requests, Sized) else None
    batch_size = _rounded(batch_size, processes)
    room = LOOK_AHEAD * batch_size
    queues = _Queues(config, compression, batch_size, processes)
    with closing(Ahead(requests, prepare, processes, batch_size)) as ahead:
        while True:
            ahead.extend(room - len(queues))
            if len(ahead):
                taken = ahead.take()
                if progress:
                    done = ahead.begun - len(ahead)
                    progress("reading clips", done, ahead.begun if total is None else total)
                if isinstance(taken, Failure):
                    yield taken
                    continue
                index, prepared = taken
                try:
                    queues.append(index, prepared)
                except Exception as error:  # as in its preparation
                    yield failure(index, error)
                    continue
                batch = queues.full() or queues.overdue()
            elif not queues:
                if ahead.has_ended:
                    return
                continue  # no request waits, and none is unanswered
            elif ahead.has_ended:
                batch = queues.largest()
            else:
                batch = queues.best_used()
            if batch:
                ahead.extend(room - len(queues))
                yield batch


def _rounded(batch_size: int, processes: Processes) -> int:
    """Rows of the largest batch, of which each process has as many."""
    return -(-batch_size // processes.count) * processes.count


def place(batch: Sequence[Queued], mesh: Mesh | None) -> list[Queued | None]:
    """The rows of a batch: each request in one on devices of the process that has read its clip.

    Returns:
        What is in each row; None for empty ones.
    """
    processes = processes_of(mesh)
    parts: list[list[Queued]] = [[] for _ in range(processes.count)]
    for one in batch:
        parts[processes.reader(one.index)].append(one)
    rows = rows_for(processes.count * max(map(len, parts)), mesh) // processes.count
    return [one for part in parts for one in (*part, *[None] * (rows - len(part)))]


class _Queues:
    """Requests that wait for a batch, by their layout. Its methods take batches out."""

    def __init__(
        self,
        config: LlavaConfig,
        compression: Compressor | None,
        batch_size: int,
        processes: Processes,
    ) -> None:
        self._config = config
        self._compression = compression
        self._batch_size = batch_size
        self._processes = processes
        self._queues: dict[Layout, list[Queued]] = {}
        self._newest = 0

    def __len__(self) -> int:
        return sum(map(len, self._queues.values()))

    def append(self, index: int, prepared: Prepared) -> None:
        """Adds a request.

        Raises:
            RequestError: if it does not fit into the model's positions.
            ConfigError: if the compression cannot work on this model or clip length.
        """
        layout = layout_of(self._config, [prepared], 1, self._compression)
        self._queues.setdefault(layout, []).append(Queued(index, prepared, layout))
        self._newest = index

    def full(self) -> list[Queued]:
        """The requests of a queue that is a whole batch; none if there is no such queue."""
        for queue in self._queues.values():
            batch = self._first_of_each(queue)
            if len(batch) == self._batch_size:
                return self._take(batch)
        return []

    def overdue(self) -> list[Queued]:
        """The best batch for the oldest request; none if that has not waited for long."""
        oldest = min(self._firsts(), key=lambda first: first.index)
        if self._newest - oldest.index < PATIENCE * self._batch_size:
            return []
        batches = [
            self._batch(first, oldest) for first in self._firsts() if self._fits(oldest, first)
        ]
        return self._take(max(batches, key=_use))

    def best_used(self) -> list[Queued]:
        """The batch with the fewest empty slots."""
        return self._take(max(map(self._batch, self._firsts()), key=_use))

    def largest(self) -> list[Queued]:
        """A batch of the largest layout. That has to run at some time, and has room for others."""
        size = max(first.size for first in self._firsts())
        batches = [self._batch(first) for first in self._firsts() if first.size == size]
        return self._take(max(batches, key=len))

    def _firsts(self) -> list[Queued]:
        return [queue[0] for queue in self._queues.values()]

    def _fits(self, one: Queued, other: Queued) -> bool:
        """Whether a request can be a row of a batch in the layout of another request."""
        both = one.prepared, other.prepared
        if (both[0].frames is None) != (both[1].frames is None):
            return False
        # Each of them fits alone, and no request needs more for another beside it.
        return layout_of(self._config, both, 1, self._compression) == other.layout

    def _batch(self, first: Queued, oldest: Queued | None = None) -> list[Queued]:
        """Requests for a batch in the layout of ``first``: its own queue, then large ones."""
        queues = [queue for queue in self._queues.values() if self._fits(queue[0], first)]
        waiting = [one for queue in queues for one in queue]
        waiting.sort(
            key=lambda one: (one is not oldest, one.layout != first.layout, -one.size, one.index)
        )
        return self._first_of_each(waiting)

    def _first_of_each(self, waiting: Iterable[Queued]) -> list[Queued]:
        """The first requests, of each process as many as it has rows in the largest batch."""
        rows: Counter[int] = Counter()
        batch = []
        for one in waiting:
            reader = self._processes.reader(one.index)
            if rows[reader] < self._batch_size // self._processes.count:
                rows[reader] += 1
                batch.append(one)
        return batch

    def _take(self, batch: list[Queued]) -> list[Queued]:
        taken = {one.index for one in batch}
        left = {
            layout: [one for one in queue if one.index not in taken]
            for layout, queue in self._queues.items()
        }
        self._queues = {layout: queue for layout, queue in left.items() if queue}
        return batch


def _use(batch: Sequence[Queued]) -> float:
    """The share of the slots of a batch that its requests need, up to a common factor."""
    return sum(one.size for one in batch) / max(one.size for one in batch)


def _run_one(
    model: Model,
    tokenizer: Tokenizer,
    batch: Sequence[Queued],
    compression: Compressor | None,
    stop_ids: tuple[int, ...],
    stream_every: int | None,
    progress: Progress | None,
) -> Generator[Piece, None, None]:
    """Runs one batch and makes pieces of text of what it generates."""
    rows = place(batch, model.mesh)
    batch = [queued for queued in rows if queued is not None]
    texts = [GrowingText(tokenizer) for _ in batch]
    updates = run_batch(
        model,
        [None if queued is None else queued.prepared for queued in rows],
        compression,
        stop_ids,
        stream_every=stream_every,
        progress=progress,
    )
    finished: set[int] = set()
    for update in updates:
        for queued, text, generated in zip(batch, texts, update, strict=True):
            if queued.index in finished:
                continue
            piece = text.extend(generated)
            if generated.finish_reason is not None:
                finished.add(queued.index)
                answer = Answer(
                    text.whole,
                    generated.token_ids,
                    generated.finish_reason,
                    generated.tokens,
                    generated.seconds,
                    queued.prepared.notes,
                )
                yield Piece(queued.index, piece, answer)
            elif piece:
                yield Piece(queued.index, piece)
