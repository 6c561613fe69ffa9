"""The process that ``inputs.decoding_pool`` starts: reads clips one after the other.

Frames, and files that are given as bytes, pass through a file in memory that both processes have
open. It imports neither JAX nor transformers, so that it starts quickly and holds little memory.
"""

import json
import os
import sys
import time
from pathlib import Path

import numpy as np

from dycoke_jax.errors import VideoError
from dycoke_jax.inputs.child_process import Message, Tell, answer_requests
from dycoke_jax.inputs.clip import Clip
from dycoke_jax.inputs.container import Source
from dycoke_jax.inputs.limits import DecodingLimits, Watch
from dycoke_jax.inputs.sampling import FrameSampling
from dycoke_jax.inputs.system_errors import system_error
from dycoke_jax.inputs.video import read_clip, read_source

REPORT_EVERY = 0.1
"""Seconds between two reports of progress."""


def _answer(request: Message, shared: int, limits: DecodingLimits, tell: Tell) -> Message:
    """Reads a clip, writes its frames into the shared file and returns the rest of it."""
    try:
        clip = _read(request, shared, limits, tell)
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


def _read(request: Message, shared: int, limits: DecodingLimits, tell: Tell) -> Clip:
    last = time.monotonic()

    def progress(what: str, done: int, total: int) -> None:
        nonlocal last
        if request["progress"] and time.monotonic() - last >= REPORT_EVERY:
            last = time.monotonic()
            tell({"progress": [what, done, total]})

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


if __name__ == "__main__":
    _SHARED, _LIMITS = int(sys.argv[1]), DecodingLimits(**json.loads(sys.argv[2]))
    answer_requests(
        lambda request, tell: _answer(request, _SHARED, _LIMITS, tell), _LIMITS.megabytes
    )
