"""Reads clips in processes of their own, which a file can crash, block or fill without harm.

Decoders are large programs in C, and files come from anywhere. Where thousands of them are read
unattended, a file must cost no more than its own answer.
"""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from threading import BoundedSemaphore, Lock, Timer
from types import TracebackType
from typing import IO, Any

import numpy as np
from jaxtyping import UInt8

from dycoke_jax import checks
from dycoke_jax.errors import VideoError, printable
from dycoke_jax.inputs.any_video import is_readable, read_video
from dycoke_jax.inputs.clip import Clip
from dycoke_jax.inputs.container import Source, find_source, shown_name
from dycoke_jax.inputs.limits import DecodingLimits, setting, too_slow
from dycoke_jax.inputs.sampling import FrameSampling
from dycoke_jax.progress import Progress

_START_SECONDS = 60.0
"""In which a process must have started; it takes about half a second where there is nothing else to
do."""
_GRACE_SECONDS = 2.0
"""A process looks at its time itself, and is ended only if it has not done so for so long."""
_MOST_CLIPS = 1000
"""After which a process is replaced, since libraries lose some memory over damaged files."""
_LONGEST_LINE = 2**26
"""Bytes of a reply; it holds the times of the sampled frames."""
_QUIET = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "2"}
"""Environment of a process: threads that it does not need would take address space."""


class DecodingPool:
    """Processes that read clips; a context manager, whose end ends them.

    A process that crashes or exceeds its limits fails the clip that it reads, and a new one takes
    its place. A process is started when it is needed. On Linux its memory is limited, elsewhere
    only its time is.

    Example:
        ``with DecodingPool() as pool: model.run(requests, read=pool.read)``
    """

    def __init__(
        self,
        limits: DecodingLimits = DecodingLimits(),  # noqa: B008 (frozen)
        processes: int = 4,
    ) -> None:
        """Sets the pool up without starting a process.

        Args:
            limits: what reading one clip may take.
            processes: largest number of clips that are read at the same time, at least 1.

        Raises:
            ConfigError: naming the argument and its range.
        """
        checks.instance("limits", limits, DecodingLimits)
        self._limits = limits
        self._places = BoundedSemaphore(checks.whole_number("processes", processes, 1))
        self._lock = Lock()
        self._idle: list[_Process] = []
        self._all: set[_Process] = set()

    def read(
        self,
        video: Any,
        sampling: FrameSampling,
        size: int,
        *,
        allow_damaged: bool = False,
        progress: Progress | None = None,
    ) -> Clip:
        """Reads a clip as ``inputs.any_video.read_video`` does; may be called in several threads.

        Arrays and lists of frames, which need no decoding, are read in this process.

        Raises:
            RequestError: as ``read_video``.
            VideoError: as ``read_video``; and if the process has crashed or exceeded a limit.
        """
        if not is_readable(video):
            return read_video(video, sampling, size)
        name, content = _name_and_content(video)
        request = {
            "name": name,
            "bytes": None if content is None else len(content),
            "folder": str(Path.cwd()),
            "frames": sampling.frames,
            "fps": sampling.fps,
            "size": size,
            "allow_damaged": allow_damaged,
            "progress": progress is not None,
        }
        with self._places:
            process = self._take()
            try:
                clip = process.read(request, content, progress)
            except _Refused as refused:
                self._give_back(process)
                raise refused.error from refused.__cause__
            except BaseException:
                self._end(process)
                raise
            self._give_back(process)
            return clip

    def _take(self) -> "_Process":
        """A process that is idle, or a new one."""
        while True:
            with self._lock:
                process = self._idle.pop() if self._idle else None
            if process is None:
                process = _Process(self._limits)
                with self._lock:
                    self._all.add(process)
                return process
            if process.is_alive:
                return process
            self._end(process)

    def _give_back(self, process: "_Process") -> None:
        if process.clips >= _MOST_CLIPS:
            self._end(process)
            return
        with self._lock:
            self._idle.append(process)

    def _end(self, process: "_Process") -> None:
        process.end()
        with self._lock:
            self._all.discard(process)

    def close(self) -> None:
        """Ends the processes, also those that are reading."""
        with self._lock:
            for process in self._all:
                process.kill()
            for process in self._idle:
                process.end()
            self._all.difference_update(self._idle)
            self._idle.clear()

    def __enter__(self) -> "DecodingPool":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


def _name_and_content(video: Any) -> tuple[str, bytes | None]:
    """The path of a clip, or what messages call it with its bytes."""
    if isinstance(video, str | os.PathLike):
        return os.fsdecode(video), None
    if isinstance(video, bytes | bytearray | memoryview) and video and b"\0" not in bytes(video):
        return os.fsdecode(bytes(video)), None
    source: Source = find_source(video)
    assert isinstance(source.content, bytes)
    return source.name, source.content


class _Refused(Exception):
    """The process has answered that the clip cannot be read."""

    def __init__(self, error: VideoError) -> None:
        self.error = error


class _Process:
    """One process, which reads one clip at a time.

    Attributes:
        clips: number of clips that it was asked to read.
    """

    def __init__(self, limits: DecodingLimits) -> None:
        self.clips = 0
        self._limits = limits
        self._shared = _memory_file()
        command = ["-P", "-m", "dycoke_jax.inputs.decoding_process"]
        arguments = [str(self._shared.fileno()), json.dumps(asdict(limits))]
        places = [str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")]
        path = {"PYTHONPATH": os.pathsep.join(filter(None, places))}
        self._process = subprocess.Popen(
            [sys.executable, *command, *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            pass_fds=(self._shared.fileno(),),
            env=os.environ | _QUIET | path,
            start_new_session=True,  # Ctrl-C is for this process, which then ends the other
        )
        self._late = False
        try:
            self._within(_START_SECONDS, lambda: self._next("the process that reads clips"))
        except BaseException:
            self.end()
            raise

    def read(
        self, request: dict[str, Any], content: bytes | None, progress: Progress | None
    ) -> Clip:
        """Has a clip read.

        Raises:
            _Refused: if the process says that it cannot be read.
            VideoError: if the process ends or takes too long.
        """
        self.clips += 1
        name = shown_name(request["name"])
        if content is not None:
            self._shared.seek(0)
            self._shared.write(content)
            self._shared.flush()
        seconds = self._limits.seconds + _GRACE_SECONDS
        reply = self._within(seconds, lambda: self._ask(name, request, progress))
        number = reply.get("errno")
        cause = None if number is None else OSError(number, os.strerror(number))
        if "error" in reply:
            raise _Refused(VideoError(reply["error"])) from cause
        if "crash" in reply:
            raise VideoError(_crashed(name, printable(reply["crash"][:200]))) from cause
        if "shape" not in reply:
            raise VideoError(self._too_large(name))
        size = request["size"]
        count, *shape = reply["shape"]
        if not 0 < count <= request["frames"] or shape != [size, size, 3]:
            raise VideoError(f"{name} cannot be read: its frames did not arrive; try again")
        clip = Clip(
            self._frames(name, (count, size, size, 3)),
            tuple(reply["times"]),
            reply["duration"],
            tuple(reply["notes"]),
        )
        self._shared.truncate(0)
        return clip

    @property
    def is_alive(self) -> bool:
        """Whether it has not ended."""
        return self._process.poll() is None

    def kill(self) -> None:
        """Ends the process at once; who is reading from it is told."""
        self._process.kill()

    def end(self) -> None:
        """Ends the process, from which nobody is reading, and closes what was open for it."""
        self.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            with suppress(BrokenPipeError):  # what it was not told any more
                pipe.close()
        self._shared.close()

    def _ask(self, name: str, request: dict[str, Any], progress: Progress | None) -> dict[str, Any]:
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):  # it has ended; the reply that does not come says so
            self._process.stdin.write(json.dumps(request).encode() + b"\n")
            self._process.stdin.flush()
        while "progress" in (reply := self._next(name)):
            if progress is not None:
                progress(*reply["progress"])
        return reply

    def _within(self, seconds: float, work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """Does something with the process, which is killed after so many seconds."""

        def kill() -> None:
            self._late = True
            self._process.kill()

        timer = Timer(seconds, kill)
        timer.daemon = True
        timer.start()
        try:
            return work()
        finally:
            timer.cancel()

    def _next(self, name: str) -> dict[str, Any]:
        """The next message of the process."""
        assert self._process.stdout is not None
        line = self._process.stdout.readline(_LONGEST_LINE)
        if line.endswith(b"\n"):
            return dict(json.loads(line))
        if self._late:
            raise VideoError(too_slow(name, self._limits))
        self._process.kill()
        code = self._process.wait()
        how = f"signal {-code}" if code < 0 else f"exit code {code}"
        raise VideoError(_crashed(name, how))

    def _too_large(self, name: str) -> str:
        return (
            f"{name} takes more than the limit of {self._limits.megabytes} megabytes of memory to "
            f"read; sample fewer frames, make them smaller, or raise {setting('megabytes')}"
        )

    def _frames(self, name: str, shape: tuple[int, ...]) -> UInt8[np.ndarray, "F size size 3"]:
        # Not mapped: a process that cut the file would make reading the mapping a crash.
        frames = np.empty(shape, np.uint8)
        target = frames.data.cast("B")
        done = 0
        while done < len(target):
            count = os.preadv(self._shared.fileno(), [target[done:]], done)
            if not count:
                raise VideoError(f"{name} cannot be read: its frames did not arrive; try again")
            done += count
        return frames


def _crashed(name: str, how: str) -> str:
    return (
        f"{name} cannot be read: the process that decoded it has crashed ({how}); get the file "
        "again or convert it, to H.264 in MP4 for instance"
    )


def _memory_file() -> IO[bytes]:
    """A file without a name, in memory where the system has such."""
    if hasattr(os, "memfd_create"):
        return os.fdopen(os.memfd_create("clip"), "w+b")
    return tempfile.TemporaryFile()
