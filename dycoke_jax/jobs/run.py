"""Runs a job: answers all requests of a file that have no result yet."""

import hashlib
import logging
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import closing
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from pathlib import Path
from threading import Event
from typing import Any

import jax

from dycoke_jax import checks
from dycoke_jax.checkpoint.fingerprint import fingerprint
from dycoke_jax.compression.protocol import Compressor
from dycoke_jax.config import LlavaConfig
from dycoke_jax.engine.requests import Failure, Piece, Request, failure, in_one_line
from dycoke_jax.engine.schedule import BatchReport
from dycoke_jax.errors import ConfigError, DycokeError, EngineError, RequestError, printable
from dycoke_jax.inputs.any_video import ReadVideo, read_video
from dycoke_jax.inputs.system_errors import may_pass
from dycoke_jax.jobs.request_file import Line, read_requests
from dycoke_jax.jobs.result_file import Results
from dycoke_jax.jobs.settings import JobSettings, Shard
from dycoke_jax.llava_video import LlavaVideo
from dycoke_jax.progress import Progress

_LOG = logging.getLogger(__name__)

BAD_REQUEST = "bad_request"
"""Kind of error of a line that is no request; other kinds are those of ``Failure``."""

COMMIT_EVERY = 1.0
"""Seconds for which a failure may wait for the next results before it is written."""

RETRY_AFTER, LONGEST_PAUSE = 1.0, 60.0
"""Seconds before requests are tried once more, which double each time; and the most of them."""


@dataclass(frozen=True)
class Job:
    """What is to be answered, and how.

    Attributes:
        requests: the file of requests.
        settings: those of all requests that do not say otherwise.
        shard: the part of the file that is answered.
    """

    requests: Path
    settings: JobSettings
    shard: Shard = field(default_factory=Shard)

    def lines(self) -> Iterator[Line]:
        """The lines of the shard.

        Raises:
            RequestError: if the file cannot be read.
        """
        for line in read_requests(self.requests, self.settings):
            if self.shard.holds(line.number):
                yield line


@dataclass(frozen=True)
class Checked:
    """What the files of a job hold before it runs.

    Attributes:
        requests: number of requests.
        found: how many of them have a result.
        errors: number of these by kind of error.
        frames: the numbers of frames of clips that are still to be read; among them None for clips
            that are sampled by frames a second.
    """

    requests: int
    found: int
    errors: dict[str, int]
    frames: frozenset[int | None]


@dataclass(frozen=True)
class Summary:
    """What has become of the requests of a job, or of a shard of it.

    Attributes:
        requests: number of requests.
        answered: how many have an answer.
        failed: how many have an error for a result.
        errors: number of requests by kind of error.
        computed: how many of the results were made by this run.
        seconds: duration of this run, without the loading of the model.
        interrupted: whether the run was stopped before the end.
    """

    requests: int
    answered: int
    failed: int
    errors: dict[str, int]
    computed: int
    seconds: float
    interrupted: bool

    @property
    def rate(self) -> float:
        """Results a second of this run."""
        return self.computed / self.seconds if self.seconds else 0.0


def check_requests(job: Job, results: Results, *, force: bool = False) -> Checked:
    """Reads all requests once, before the model is loaded.

    Args:
        job: the job.
        results: the results that are there.
        force: accept results that were made with other settings.

    Raises:
        RequestError: if the file cannot be read, if two requests have the same id, or if a request
            or its settings have changed since its result was written.
    """
    if job.requests.exists() and job.requests.samefile(results.path):
        raise RequestError(f"{job.requests} cannot be both the requests and the results")
    lines: dict[str, int] = {}
    changed: list[Line] = []
    requests = found = 0
    errors: Counter[str] = Counter()
    frames: set[int | None] = set()
    for line in read_requests(job.requests, job.settings):
        first = lines.setdefault(line.id, line.number)
        if first != line.number:
            raise RequestError(
                f"{job.requests}: lines {first} and {line.number} have the same id "
                f"{printable(line.id)!r}; give each request an id of its own"
            )
        if not job.shard.holds(line.number):
            continue
        requests += 1
        digest = results.digests.get(line.id)
        if digest is None:
            if isinstance(line.request, Request) and line.request.video is not None:
                sampling = line.request.sampling
                frames.add(sampling.frames if sampling.fps is None else None)
            continue
        found += 1
        if line.id in results.failed:
            errors[results.failed[line.id]] += 1
        if digest != line.digest:
            changed.append(line)
    if changed and not force:
        raise RequestError(
            f"{results.path}: {len(changed)} requests or their settings have changed since their "
            f"results were written (the first in line {changed[0].number}, "
            f"{printable(changed[0].id)!r}); use the same settings, name another file of results, "
            "or keep these results with --force"
        )
    return Checked(requests, found, dict(errors), frozenset(frames))


def check_compression(
    compression: Compressor | None, config: LlavaConfig, checked: Checked
) -> None:
    """Checks that a compression works on a model for at least one of the clips of a job.

    Raises:
        ConfigError: if it works for none.
    """
    if compression is None:
        return
    refused: ConfigError | None = None
    for frames in checked.frames:
        if frames is None:
            return
        try:
            compression.stages.check(config, frames)
        except ConfigError as error:
            refused = error
        else:
            return
    if refused is not None:
        raise refused


def run_job(
    model: LlavaVideo,
    job: Job,
    results: Results,
    checked: Checked,
    *,
    batch_size: int = 8,
    max_retries: int = 2,
    force: bool = False,
    read: ReadVideo = read_video,
    stop: Event | None = None,
    progress: Progress | None = None,
) -> Summary:
    """Answers all requests that have no result yet.

    Each request gets one result, an answer or an error. A process that is killed at any moment
    loses the requests of the batch that runs and of those in preparation, and nothing else: the
    next run makes the results that are missing.

    Args:
        model: the model.
        job: the job.
        results: where results are written.
        checked: what ``check_requests`` has returned.
        batch_size: largest number of requests that run together.
        max_retries: how often requests are tried again whose file could not be read, for a reason
            that may pass (see ``inputs.system_errors.may_pass``), after all others.
        force: accept results that another model has made.
        read: reads the clips, as in ``LlavaVideo.run``.
        stop: ends the work after the batch that runs, once it is set.
        progress: called after each result; its detail holds failures, rate and time left.

    Returns:
        What has become of the requests.

    Raises:
        RequestError: if the results are of another model, or if a setting makes no sense.
        OutputError: if a result cannot be written.
        EngineError: if two batches in a row have failed.
    """
    max_retries = checks.whole_number("max_retries", max_retries, 0, error=RequestError)
    made_by = model_fingerprint(model)
    if results.models - {made_by} and not force:
        raise RequestError(
            f"{results.path} holds results of another model; use the same model, name another "
            "file of results, or keep these results with --force"
        )
    run = _Run(model, job, results, checked, made_by, batch_size, read, stop or Event(), progress)
    pause = RETRY_AFTER
    for tried in range(max_retries + 1):
        left = run.answer(is_last=tried == max_retries)
        if not left or run.stop.wait(pause):
            break
        pause = min(2 * pause, LONGEST_PAUSE)
    return run.summary()


def model_fingerprint(model: LlavaVideo) -> str:
    """Returns 16 hexadecimal digits that change with whatever of a model can change its answers.

    That is its weights as loaded, with their dtypes, its configuration, the storage of keys and
    values, its tokenizer and its chat template.
    """
    parts = (
        fingerprint(model.params),
        repr(model.config),
        f"{model.model.dtype} {model.model.kv} {model.stop_ids}",
        model.tokenizer.backend_tokenizer.to_str(),
        model.chat_template or "",
    )
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


class _Stopped(Exception):
    """The work is to end before the next batch runs."""


class _Run:
    """The state of one run of a job."""

    def __init__(
        self,
        model: LlavaVideo,
        job: Job,
        results: Results,
        checked: Checked,
        made_by: str,
        batch_size: int,
        read: ReadVideo,
        stop: Event,
        progress: Progress | None,
    ) -> None:
        self.stop = stop
        self._model, self._job, self._results = model, job, results
        self._made_by, self._batch_size, self._progress = made_by, batch_size, progress
        self._read = read
        self._checked = checked
        self._errors = Counter(checked.errors)
        self._computed = 0
        self._began = self._committed = time.monotonic()
        self._asked: dict[int, tuple[Line, Request]] = {}
        self._running: set[int] = set()
        self._aside: dict[str, tuple[Line, Request, Exception]] = {}
        self._report()

    def answer(self, *, is_last: bool) -> int:
        """Answers the requests without a result; returns how many are to be tried again.

        A batch that fails as a whole is set aside, and the others are answered. Its requests fail
        when another batch has worked, or none is left: until then the device may be what fails.

        Raises:
            EngineError: if the next batch fails too; neither of them has results then.
        """
        while True:
            try:
                left = self._answer(is_last=is_last)
                break
            except DycokeError:
                raise
            except Exception as error:
                self._set_aside(error)
            finally:
                self._asked.clear()
                self._running.clear()
        if not self.stop.is_set():
            self._finish_aside()
        self._commit(at_once=True)
        return left

    def _set_aside(self, error: Exception) -> None:
        """Sets the batch that runs aside, or raises what it has failed with."""
        # Of several processes the others may have gone on.
        if not self._running or jax.process_count() > 1:
            raise error
        if self._aside:
            raise EngineError(
                f"two batches in a row have failed ({in_one_line(error)}); the device may be lost "
                "or out of memory: run the same command again, with a smaller batch size if need be"
            ) from error
        _LOG.debug("a batch has failed", exc_info=error)
        asked = [self._asked[index] for index in sorted(self._running)]
        self._aside = {line.id: (line, request, error) for line, request in asked}

    def _finish_aside(self) -> None:
        """Writes the failures of the batch that was set aside."""
        aside, self._aside = self._aside, {}
        for line, request, error in aside.values():
            self._finish(line, self._result(line, request, failure(0, error)))

    def _answer(self, *, is_last: bool) -> int:
        """Answers the requests without a result until a batch fails."""
        left = 0
        items = self._model.run(
            self._requests(),
            compression=self._job.settings.compression,
            batch_size=self._batch_size,
            read=self._read,
            on_batch=self._begin_batch,
        )
        try:
            with closing(items):
                for item in items:
                    line, request = self._asked.pop(item.index)
                    self._running.discard(item.index)
                    if isinstance(item, Failure) and not is_last and may_pass(item.error):
                        left += 1
                    else:
                        self._finish(line, self._result(line, request, item))
                    if self._running:
                        continue
                    if isinstance(item, Piece):
                        self._finish_aside()
                    self._commit(at_once=isinstance(item, Piece))
                    if self.stop.is_set():
                        break
        except _Stopped:
            pass
        return left

    def summary(self) -> Summary:
        """What has become of the requests so far."""
        failed, done = self._errors.total(), self._done()
        return Summary(
            requests=self._checked.requests,
            answered=done - failed,
            failed=failed,
            errors=dict(self._errors),
            computed=self._computed,
            seconds=time.monotonic() - self._began,
            interrupted=done < self._checked.requests,
        )

    def _requests(self) -> Iterator[Request]:
        """The requests without a result; lines that are no request get theirs at once."""
        index = 0
        for line in self._job.lines():
            if self.stop.is_set():
                return
            if line.id in self._results.digests or line.id in self._aside:
                continue
            if isinstance(line.request, RequestError):
                fault = {"kind": BAD_REQUEST, "message": str(line.request)}
                self._finish(line, {"error": fault, "settings": None})
                self._commit()
                continue
            self._asked[index] = line, line.request
            index += 1
            yield line.request

    def _begin_batch(self, report: BatchReport) -> None:
        if self.stop.is_set():
            raise _Stopped
        self._running = set(report.indices)

    def _result(self, line: Line, request: Request, item: Piece | Failure) -> dict[str, Any]:
        settings = {"settings": self._job.settings.described(request)}
        if isinstance(item, Failure):
            return {"error": {"kind": item.kind, "message": item.message}} | settings
        assert item.answer is not None  # each answer comes in one piece
        return asdict(item.answer) | settings

    def _finish(self, line: Line, result: dict[str, Any]) -> None:
        made = {"model": self._made_by, "request": line.digest}
        self._results.add({"id": line.id} | result | made)
        self._computed += 1
        if "error" in result:
            self._errors[result["error"]["kind"]] += 1
        self._report()

    def _commit(self, *, at_once: bool = False) -> None:
        now = time.monotonic()
        if at_once or now - self._committed >= COMMIT_EVERY:
            self._results.commit()
            self._committed = now

    def _done(self) -> int:
        return self._checked.found + self._computed

    def _report(self) -> None:
        if self._progress is None:
            return
        done, total = self._done(), self._checked.requests
        detail = f"{self._errors.total()} failed"
        if self._computed:
            seconds = time.monotonic() - self._began
            left = timedelta(seconds=round((total - done) * seconds / self._computed))
            detail += f", {self._computed / seconds:.2f} a second, {left} left"
        self._progress(f"requests: {detail}", done, total)
