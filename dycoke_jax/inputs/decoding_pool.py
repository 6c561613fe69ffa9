"""Reads clips in processes of their own, which a file can crash, block or fill without harm.

Decoders are large programs in C, and files come from anywhere. Where thousands of them are read
unattended, a file must cost no more than its own answer.
"""

import json
import os
import tempfile
from dataclasses import asdict
from pathlib import Path
from threading import BoundedSemaphore, Lock
from types import TracebackType
from typing import IO, Any

import numpy as np
from jaxtyping import UInt8

from dycoke_jax import checks
from dycoke_jax.errors import VideoError, printable
from dycoke_jax.inputs.any_video import is_readable, read_video
from dycoke_jax.inputs.child_process import Child, ChildError
from dycoke_jax.inputs.clip import Clip
from dycoke_jax.inputs.container import Source, find_source, shown_name
from dycoke_jax.inputs.limits import DecodingLimits, setting, too_slow
from dycoke_jax.inputs.sampling import FrameSampling
from dycoke_jax.progress import Progress

_GRACE_SECONDS = 2.0
"""A process looks at its time itself, and is ended only if it has not done so for so long."""
_MOST_CLIPS = 1000
"""After which a process is replaced, since libraries lose some memory over damaged files."""


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
            try:
                process = self._take()
            except ChildError as error:
                raise VideoError(_crashed(name, error.how)) from error
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
        number = self._shared.fileno()
        arguments = [str(number), json.dumps(asdict(limits))]
        try:
            self._child = Child("dycoke_jax.inputs.decoding_process", arguments, [number])
        except BaseException:
            self._shared.close()
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
        try:
            reply = self._ask(request, progress)
        except ChildError as error:
            if error.is_late:
                raise VideoError(too_slow(name, self._limits)) from error
            raise VideoError(_crashed(name, error.how)) from error
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
        return self._child.is_alive

    def kill(self) -> None:
        """Ends the process at once; who is reading from it is told."""
        self._child.kill()

    def end(self) -> None:
        """Ends the process, from which nobody is reading, and closes what was open for it."""
        self._child.end()
        self._shared.close()

    def _ask(self, request: dict[str, Any], progress: Progress | None) -> dict[str, Any]:
        with self._child.within(self._limits.seconds + _GRACE_SECONDS):
            self._child.tell(request)
            while "progress" in (reply := self._child.hear()):
                if progress is not None:
                    progress(*reply["progress"])
        return reply

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
