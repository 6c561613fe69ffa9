"""The process that ``inputs.decoding_pool`` starts: reads clips one after the other.

Requests and replies are lines of JSON on its standard input and output. Frames, and files that are
given as bytes, pass through a file in memory that both processes have open. It imports neither JAX
nor transformers, so that it starts quickly and holds little memory.
"""

import json
import os
import resource
import sys
import time
from pathlib import Path
from typing import Any, TextIO

import numpy as np

from dycoke_jax.errors import VideoError
from dycoke_jax.inputs.clip import Clip
from dycoke_jax.inputs.container import Source
from dycoke_jax.inputs.limits import DecodingLimits, Watch
from dycoke_jax.inputs.sampling import FrameSampling
from dycoke_jax.inputs.system_errors import system_error
from dycoke_jax.inputs.video import read_clip, read_source

REPORT_EVERY = 0.1
"""Seconds between two reports of progress."""


def main() -> None:
    """Reads clips until the standard input ends."""
    shared = int(sys.argv[1])
    limits = DecodingLimits(**json.loads(sys.argv[2]))
    replies = os.fdopen(os.dup(1), "w", encoding="ascii")
    os.dup2(2, 1)  # what a library prints is no reply
    _limit_memory(limits.megabytes * 1_000_000)
    _reply(replies, {"ready": True})
    for line in sys.stdin:
        _reply(replies, _answer(json.loads(line), shared, limits, replies))


def _answer(
    request: dict[str, Any], shared: int, limits: DecodingLimits, replies: TextIO
) -> dict[str, Any]:
    """Reads a clip, writes its frames into the shared file and returns the rest of it."""
    try:
        clip = _read(request, shared, limits, replies)
        _write(shared, clip)
    except VideoError as error:
        if isinstance(error.__cause__, MemoryError):
            return {"memory": True}
        return {"error": str(error), "errno": system_error(error)}
    except MemoryError:
        return {"memory": True}
    except Exception as error:  # of libraries at files that they were never tried with
        return {"crash": f"{type(error).__name__}: {error}", "errno": system_error(error)}
    return {
        "shape": clip.frames.shape,
        "times": clip.times,
        "duration": clip.duration,
        "notes": clip.notes,
    }


def _read(request: dict[str, Any], shared: int, limits: DecodingLimits, replies: TextIO) -> Clip:
    last = time.monotonic()

    def progress(what: str, done: int, total: int) -> None:
        nonlocal last
        if request["progress"] and time.monotonic() - last >= REPORT_EVERY:
            last = time.monotonic()
            _reply(replies, {"progress": [what, done, total]})

    sampling, size = FrameSampling(request["frames"], request["fps"]), request["size"]
    allow_damaged = request["allow_damaged"]
    if request["bytes"] is not None:
        content = os.pread(shared, request["bytes"], 0)
        source = Source(request["name"], content, content[:4096], Watch.begin(limits))
        return read_source(source, sampling, size, allow_damaged, progress)
    os.chdir(request["folder"])  # that of relative paths
    path: str | Path = request["name"]
    return read_clip(
        path, sampling, size, allow_damaged=allow_damaged, progress=progress, limits=limits
    )


def _write(shared: int, clip: Clip) -> None:
    content = np.ascontiguousarray(clip.frames).data.cast("B")
    written = 0
    while written < len(content):
        written += os.pwrite(shared, content[written:], written)


def _reply(replies: TextIO, message: dict[str, Any]) -> None:
    replies.write(json.dumps(message) + "\n")
    replies.flush()


def _limit_memory(more: int) -> None:
    """Lets this process have so many bytes more of address space than it has now."""
    statm = Path("/proc/self/statm")
    if statm.exists():  # elsewhere than on Linux, address space is not what memory costs
        now = int(statm.read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (now + more, now + more))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


if __name__ == "__main__":
    main()
