"""The file of results of a job: a JSON object on each line, written so that a job can be killed."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import filelock
import jax

from dycoke_jax.errors import OutputError
from dycoke_jax.files import check_writable
from dycoke_jax.hosts import is_first, share

_START = b'{"id": '
"""How every line begins."""


class Results:
    """What is known of the results of a job, in a process that leaves writing them to another.

    Attributes:
        path: the file of results.
        digests: digest of each request that has a result, by its id.
        failed: kind of error of each request that has failed, by its id.
        models: fingerprints of the models that have made the results.
    """

    def __init__(self, path: Path) -> None:
        """Begins without a result."""
        self.path = path
        self.digests: dict[str, str] = {}
        self.failed: dict[str, str] = {}
        self.models: set[str] = set()

    def add(self, result: dict[str, Any]) -> None:
        """Adds a result, which ``commit`` writes; its first key is ``id``."""
        self._note(result)

    def commit(self) -> None:
        """Writes the results that have been added; here nothing."""

    def told(self) -> bytes:
        """All that is known, for ``heard``."""
        return json.dumps([self.digests, self.failed, sorted(self.models)]).encode()

    def heard(self, told: bytes) -> None:
        """Takes what another process knows."""
        self.digests, self.failed, models = json.loads(told)
        self.models = set(models)

    def _note(self, result: dict[str, Any]) -> None:
        own = result["id"]
        if own in self.digests:
            raise ValueError
        self.digests[own] = result["request"]
        self.models.add(result["model"])
        if "error" in result:
            self.failed[own] = result["error"]["kind"]


class ResultFile(Results):
    """Results that are there, and more of them, which are appended.

    Lines are held back until ``commit``, which writes whole lines and waits until they are on disk.
    A process that is killed while it writes leaves at most one torn line, at the end, which is cut
    off when the file is opened the next time.
    """

    def __init__(self, path: Path) -> None:
        """Reads the results, and cuts off a torn line; ``open_results`` also takes a lock.

        Raises:
            OutputError: if the file holds anything but results.
        """
        super().__init__(path)
        self._waiting: list[bytes] = []
        with path.open("ab+") as file:
            whole = self._read(file)
            if whole < file.seek(0, os.SEEK_END):
                file.truncate(whole)
                os.fsync(file.fileno())

    def _read(self, file: BinaryIO) -> int:
        """Reads the results; returns the number of bytes of whole lines."""
        file.seek(0)
        size = 0
        for number, line in enumerate(file, start=1):
            if not line.endswith(b"\n"):
                # After a loss of power, bytes that were not written are zero.
                torn = line.rstrip(b"\0")
                if torn.startswith(_START) or _START.startswith(torn):
                    break
                raise self._foreign(number)
            try:
                self._note(json.loads(line))
            except (ValueError, KeyError, TypeError, RecursionError):
                raise self._foreign(number) from None
            size += len(line)
        return size

    def _foreign(self, number: int) -> OutputError:
        return OutputError(
            f"{self.path}: line {number} is no result of a job, or the second of its id; it is "
            "left as it is: name another file of results, or remove that line"
        )

    def add(self, result: dict[str, Any]) -> None:
        """Adds a result, which ``commit`` writes; its first key is ``id``."""
        super().add(result)
        self._waiting.append(json.dumps(result).encode() + b"\n")

    def commit(self) -> None:
        """Writes the results that have been added, and waits until they are on disk.

        Raises:
            OutputError: if they cannot be written.
        """
        # Forgotten first: whatever interrupts this, no line is written twice.
        lines, self._waiting = self._waiting, []
        if not lines:
            return
        try:
            with self.path.open("ab", buffering=0) as file:
                rest = memoryview(b"".join(lines))
                while rest:
                    rest = rest[file.write(rest) :]
                os.fsync(file.fileno())
        except OSError as error:
            raise OutputError(f"cannot write {self.path}: {error.strerror or error}") from error


@contextmanager
def open_results(path: Path) -> Iterator[ResultFile]:
    """Opens a file of results, or makes it; no other job can open it while the block runs.

    Results that are waiting are written at the end of the block, however it ends.

    Raises:
        OutputError: if another job has the file open, if it holds anything but results, or if it
            cannot be written.
    """
    check_writable(path)
    own = path.resolve()  # the same lock by whatever name
    lock = filelock.FileLock(own.with_name(f"{own.name}.lock"), timeout=0)
    try:
        lock.acquire()
    except filelock.Timeout:
        raise OutputError(
            f"another job is writing {path}; wait for it, or name another file of results"
        ) from None
    except (OSError, NotImplementedError) as error:
        raise OutputError(f"cannot lock {path} ({error})") from error
    try:
        try:
            results = ResultFile(path)
        except OSError as error:
            raise OutputError(f"cannot write {path}: {error.strerror or error}") from error
        try:
            yield results
        finally:
            results.commit()
    finally:
        lock.release()


@contextmanager
def open_results_together(path: Path) -> Iterator[Results]:
    """Opens a file of results in the first of several processes, and tells the others what it has.

    With one process it is ``open_results``.
    """
    if jax.process_count() == 1:
        with open_results(path) as results:
            yield results
    elif is_first():
        with open_results(path) as results:
            share(results.told())
            yield results
    else:
        known = Results(path)
        known.heard(share(b"")[0])
        yield known
