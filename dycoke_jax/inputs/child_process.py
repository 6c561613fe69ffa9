"""Processes of this package that do what could crash, hang or fill the memory of a program.

Requests and replies are lines of JSON on the standard input and output of the process.
"""

import json
import os
import resource
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from threading import Timer
from typing import Any

Message = dict[str, Any]
"""A request or a reply."""
Tell = Callable[[Message], None]
"""Sends a message before the reply."""

_START_SECONDS = 60.0
"""In which a process must have started; it takes about half a second where there is nothing else to
do."""
_LONGEST_LINE = 2**28
"""Bytes of a message."""
_QUIET = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "2"}
"""Environment of a process: threads that it does not need would take address space."""


class ChildError(Exception):
    """A process has ended before it has answered.

    Attributes:
        how: with which signal or exit code.
        is_late: whether it was ended because it took too long.
    """

    def __init__(self, how: str, is_late: bool) -> None:
        super().__init__(how)
        self.how, self.is_late = how, is_late


class Child:
    """A process, which answers one request at a time; to be used by one thread at a time.

    It ends when the process that has started it does, in whatever way.
    """

    def __init__(
        self, module: str, arguments: Sequence[str] = (), files: Sequence[int] = ()
    ) -> None:
        """Starts the process.

        Args:
            module: a module that calls ``answer_requests`` when it is run.
            arguments: its arguments.
            files: numbers of the files that it has open too.

        Raises:
            ChildError: if it does not start.
        """
        places = [str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")]
        path = {"PYTHONPATH": os.pathsep.join(filter(None, places))}
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", module, *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            pass_fds=files,
            env=os.environ | _QUIET | path,
            start_new_session=True,  # Ctrl-C is for this process, which then ends the other
        )
        self._is_late = False
        try:
            with self.within(_START_SECONDS):
                self.hear()
        except ChildError as error:
            self.end()
            raise ChildError(f"it does not start: {error.how}", is_late=False) from error
        except BaseException:
            self.end()
            raise

    @property
    def is_alive(self) -> bool:
        """Whether it has not ended."""
        return self._process.poll() is None

    @contextmanager
    def within(self, seconds: float) -> Iterator[None]:
        """Kills the process if the block takes longer."""

        def kill() -> None:
            self._is_late = True
            self._process.kill()

        timer = Timer(seconds, kill)
        timer.daemon = True
        timer.start()
        try:
            yield
        finally:
            timer.cancel()

    def tell(self, message: Message) -> None:
        """Sends a message."""
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):  # it has ended; the reply that does not come says so
            self._process.stdin.write(json.dumps(message).encode() + b"\n")
            self._process.stdin.flush()

    def hear(self) -> Message:
        """Waits for a message.

        Raises:
            ChildError: if the process ends first.
        """
        assert self._process.stdout is not None
        line = self._process.stdout.readline(_LONGEST_LINE)
        if line.endswith(b"\n"):
            return dict(json.loads(line))
        self._process.kill()
        code = self._process.wait()
        how = f"signal {-code}" if code < 0 else f"exit code {code}"
        raise ChildError(how, self._is_late)

    def kill(self) -> None:
        """Ends the process at once; who waits for a message is told."""
        self._process.kill()

    def end(self) -> None:
        """Ends the process, for which nobody is waiting, and closes what was open for it."""
        self.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            with suppress(BrokenPipeError):  # what it was not told any more
                pipe.close()


def answer_requests(answer: Callable[[Message, Tell], Message], megabytes: int) -> None:
    """Answers requests until there are no more; called in the process.

    Args:
        answer: makes the reply to a request.
        megabytes: memory in millions of bytes that the process may take beside what it has. On
            Linux only: elsewhere address space is not what memory costs.
    """
    replies = os.fdopen(os.dup(1), "w", encoding="ascii")
    os.dup2(2, 1)  # what a library prints is no reply

    def reply(message: Message) -> None:
        replies.write(json.dumps(message) + "\n")
        replies.flush()

    _limit_memory(megabytes * 1_000_000)
    reply({"ready": True})
    for line in sys.stdin:
        reply(answer(json.loads(line), reply))


def _limit_memory(more: int) -> None:
    """Lets this process have so many bytes more of address space than it has now."""
    statm = Path("/proc/self/statm")
    if statm.exists():
        now = int(statm.read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (now + more, now + more))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
