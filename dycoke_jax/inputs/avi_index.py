"""Counts the chunks of an AVI file by its index.

FFmpeg does not report empty chunks, each of which repeats the picture before it.
"""

from pathlib import Path

import numpy as np

from dycoke_jax.inputs.container import Source

_ENTRY = 16  # bytes: name of the chunk, flags, place, size
_STREAMS = 8  # the index holds the chunks of other streams too


def indexed_chunks(source: Source, stream: int, promised: int) -> int:
    """Returns how many video chunks the index at the end of an AVI file names; 0 if it has none.

    Args:
        source: an AVI file.
        stream: number of the stream.
        promised: number of chunks that the header names, which tells how far to look.
    """
    tail = _tail(source, (promised * _STREAMS + 4096) * _ENTRY)
    place = tail.rfind(b"idx1")
    if place < 0:
        return 0
    length = int.from_bytes(tail[place + 4 : place + 8], "little")
    entries = tail[place + 8 : place + 8 + length]
    names = np.frombuffer(entries[: len(entries) // _ENTRY * _ENTRY], "S4")[:: _ENTRY // 4]
    return int(np.isin(names, [b"%02ddc" % stream, b"%02ddb" % stream]).sum())


def _tail(source: Source, length: int) -> bytes:
    if isinstance(source.content, bytes):
        return source.content[-length:]
    with Path(source.content).open("rb") as file:
        size = file.seek(0, 2)
        file.seek(max(0, size - length))
        return file.read()
