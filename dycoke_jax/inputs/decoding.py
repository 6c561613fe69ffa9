"""Decodes a video file in order.

Each chosen frame is resized at once, so memory grows with the chosen frames and not with the length
of the clip.

In several threads, FFmpeg decodes as many frames at a time. It copies the error flags of a frame
when it gives the frame out. If frames are reordered, a later thread does that, perhaps before the
frame's own thread has set its flags, so that the same file has an error at one time and none at
another. (A comment in ``libavcodec/h264_slice.c`` says that nothing is synchronised there.) H.264
frames are therefore held back until their thread has ended, and formats where that cannot be done
are decoded in one thread.
"""

import os
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

_THREADS = 10
"""Frames that are decoded at the same time, at most."""
_HELD = 15
"""H.264 frames that the decoder holds back; it has room for 16."""
MOST_REORDERED = _HELD - _THREADS - 1
"""Largest ``Scan.reordering`` with which a frame's thread has ended when the frame is given out.

At least ``_HELD`` less this number of frames are decoded after it, one of which may have a second
field, and a thread takes a packet only when that of ``_THREADS`` packets before is done.
"""
_UNSAFE = ("mpeg4", "rv30", "rv40")
"""Other decoders that take threads, set error flags, and reorder frames."""
_DELIMITER = b"\x09\xf0"
"""An H.264 access unit delimiter (ITU-T H.264, 7.3.2.4), without a picture."""


@dataclass(frozen=True)
class Picked:
    """The result of decoding the chosen frames in order.

    Attributes:
        frames: uint8 RGB values, resized to squares.
        missing: number of frames that could not be decoded, up to the last chosen one.
        faults: number of decoding errors and corrupt frames; 1 if decoding stops at the first.
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
    stop_at_fault: bool = False,
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
        threads: decode in several threads, which may lose frames next to a fault, and counts
            faults up to 15 frames behind the last index. At most ``MOST_REORDERED`` frames may be
            reordered, or the count differs from time to time.
        stop_at_fault: whether the frames are of no use if there is a fault.
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
                if stop_at_fault:
                    break
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
    ``threads`` tells whether several threads decoded them.
    """

    total: int
    pts: Int[np.ndarray, "shown"] | None
    duration: Int[np.ndarray, "shown"]
    faults: int
    is_interlaced: bool
    threads: bool


def decode_all(
    source: Source, packets: int, *, threads: bool, progress: Progress | None = None
) -> Decoded:
    """Decodes all frames of a file, keeping only their timestamps.

    Args:
        source: the file.
        packets: number of its packets to decode.
        threads: decode in several threads, as in :func:`pick_in_order`. That stops at the first
            fault, because only a single thread gives the same frames next to a fault on every
            machine.
        progress: called after each decoded frame; counts frames.
    """
    pts: list[int | None] = []
    duration: list[int] = []
    faults = 0
    is_interlaced = True
    with closing(_decode(source, packets, threads)) as stream:
        for frame in stream:
            faults += frame is None or bool(frame.is_corrupt)
            if faults and threads:
                break
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
        threads=threads,
    )


def _decode(
    source: Source, packets: int, threads: bool
) -> Generator[av.VideoFrame | None, None, None]:
    """Yields the frames of a file in presentation order, and None for each decoding error.

    Decoding continues after an error, as in video players.
    """
    with open_container(source) as container:
        stream = video_stream(source, container)
        context = stream.codec_context
        is_safe = not (context.name in _UNSAFE and context.has_b_frames)
        stream.thread_type = "AUTO" if threads and is_safe else "NONE"
        is_held = threads and context.name == "h264"
        if is_held:
            context.thread_count = min((os.cpu_count() or 1) + 1, _THREADS)
            context.options = {**context.options, "has_b_frames": str(_HELD)}
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
                elif is_held:
                    # At the end the decoder gives out all that it holds. Packets without a picture
                    # go through all threads first, so that these end with the last frames.
                    context.skip_frame = "NONREF"  # or a packet without a picture is an error
                    for _ in range(context.thread_count):
                        yield from context.decode(_empty(context))
                    is_held = False
                frames = packet.decode() if left >= 0 or not packet.size else []
            except av.FFmpegError:
                # An error of the demuxer ends the loop: a generator that has raised is exhausted.
                yield None
                continue
            yield from frames


def _empty(context: av.VideoCodecContext) -> av.Packet:
    """Returns an H.264 packet without a picture, in the framing of the stream's own packets."""
    extradata = context.extradata or b""
    start = b"\0\0\0\1"
    if extradata[:1] == b"\1" and len(extradata) > 4:
        # Lengths in place of start codes (ISO/IEC 14496-15, 5.3.3.1).
        start = len(_DELIMITER).to_bytes((extradata[4] & 3) + 1, "big")
    # Its memory is that of FFmpeg: a thread of the decoder would wait for Python's lock to release
    # a bytes object, while Python waits for the thread.
    packet = av.Packet(len(start + _DELIMITER))
    packet.update(start + _DELIMITER)
    return packet
