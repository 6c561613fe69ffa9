"""Decodes a video file in order.

Each chosen frame is resized at once, so memory grows with the chosen frames and not with the length
of the clip.
"""

from collections.abc import Generator, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import NamedTuple

import av
import numpy as np
from jaxtyping import Int, UInt8

from dycoke_jax.inputs.container import Source, demux, open_container, video_stream
from dycoke_jax.inputs.frames import resize
from dycoke_jax.inputs.orientation import Orientations, upright
from dycoke_jax.progress import Progress

DECODING = "decoding frames"
"""What progress callbacks are told."""


@dataclass(frozen=True)
class Picked:
    """The result of decoding the chosen frames in order.

    Attributes:
        frames: uint8 RGB values, resized to squares.
        missing: number of frames that could not be decoded, up to the last chosen one.
        faults: number of decoding errors and corrupt frames.
        as_expected: whether the chosen frames carry the timestamps that were expected. If not,
            decoding stops at the first that does not.
    """

    frames: UInt8[np.ndarray, "F size size 3"]
    missing: int
    faults: int
    as_expected: bool


def pick_in_order(
    source: Source,
    indices: Int[np.ndarray, "F"],
    size: int,
    *,
    packets: int,
    pts: Sequence[int] | None = None,
    threads: bool = True,
    progress: Progress | None = None,
) -> Picked:
    """Decodes a file up to the last index, and resizes the frames at the indices.

    Args:
        source: the file.
        indices: indices of the frames in the order of presentation, ascending. Those beyond the
            last frame that can be decoded get that frame.
        size: side of the resized square frames, in pixels.
        packets: number of packets to decode.
        pts: expected timestamp of each frame of the file; None if unknown.
        threads: decode in several threads, which may lose frames next to a fault.
        progress: called after each decoded frame; counts frames.
    """
    wanted, rows = np.unique(indices, return_inverse=True)
    goal = int(wanted[-1]) + 1
    frames = np.zeros((len(wanted), size, size, 3), np.uint8)
    decoded = filled = faults = 0
    as_expected = True
    orientations: Orientations = {}
    last = None
    with closing(_decode(source, packets, threads)) as stream:
        for frame in stream:
            if frame is None or frame.is_corrupt:
                faults += 1
            if frame is None:
                continue
            if decoded == wanted[filled]:
                frames[filled] = resize(upright(source.name, frame, orientations), size)
                filled += 1
                if pts is not None and frame.pts not in (None, pts[decoded]):
                    as_expected = False
                    break
            decoded += 1
            last = frame
            if progress is not None:
                progress(DECODING, decoded, goal)
            if decoded == goal:
                break
    if last is not None and filled < len(wanted):
        frames[filled:] = resize(upright(source.name, last, orientations), size)
    if len(rows) > len(wanted):
        frames = frames[rows]
    return Picked(frames, goal - decoded, faults, as_expected)


class Decoded(NamedTuple):
    """The frames that a file gives when all of it is decoded.

    ``pts`` and ``duration`` are in ticks; ``pts`` is None if a frame carries no timestamp.
    """

    total: int
    pts: Int[np.ndarray, "shown"] | None
    duration: Int[np.ndarray, "shown"]
    faults: int
    is_interlaced: bool


def decode_all(source: Source, packets: int, progress: Progress | None = None) -> Decoded:
    """Decodes all frames of a file, keeping only their timestamps.

    If there are faults, it is decoded again in a single thread, because that gives the same frames
    next to a fault on every machine.

    Args:
        source: the file.
        packets: number of its packets to decode.
        progress: called after each decoded frame; counts frames.
    """
    decoded = _survey(source, packets, True, progress)
    return _survey(source, packets, False, progress) if decoded.faults else decoded


def _survey(source: Source, packets: int, threads: bool, progress: Progress | None) -> Decoded:
    pts: list[int | None] = []
    duration: list[int] = []
    faults = 0
    is_interlaced = True
    for frame in _decode(source, packets, threads):
        faults += frame is None or bool(frame.is_corrupt)
        if frame is not None:
            pts.append(frame.pts)
            duration.append(frame.duration or 0)
            is_interlaced &= frame.interlaced_frame
            if progress is not None:
                progress(DECODING, len(pts), max(len(pts), packets))
    known = [p for p in pts if p is not None]
    return Decoded(
        total=len(pts),
        pts=np.array(known, np.int64) if len(known) == len(pts) else None,
        duration=np.array(duration, np.int64),
        faults=faults,
        is_interlaced=is_interlaced,
    )


def _decode(
    source: Source, packets: int, threads: bool
) -> Generator[av.VideoFrame | None, None, None]:
    """Yields the frames of a file in presentation order, and None for each decoding error.

    Decoding continues after an error, as in video players.
    """
    with open_container(source) as container:
        stream = video_stream(source, container)
        stream.thread_type = "AUTO" if threads else "NONE"
        left = packets
        demuxed = demux(container, stream)
        while True:
            source.check_time()
            try:
                packet = next(demuxed, None)
                if packet is None:
                    return
                if packet.size:
                    left -= 1
                frames = packet.decode() if left >= 0 or not packet.size else []
            except av.FFmpegError:
                # An error of the demuxer ends the loop: a generator that has raised is exhausted.
                yield None
                continue
            yield from frames
