"""Decodes the chosen frames of a video file, in order or by seeking to key frames.

Each chosen frame is resized at once, so memory grows with the chosen frames and not with the length
of the clip. Both ways give the same frames: where seeking would not, it gives up.
"""

from collections.abc import Generator, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import NamedTuple

import av
import av.container
import numpy as np
from jaxtyping import Int, UInt8

from dycoke_jax.inputs.container import Source, open_container, video_stream
from dycoke_jax.inputs.frames import resize
from dycoke_jax.inputs.orientation import upright
from dycoke_jax.inputs.scan import Packets, Scan
from dycoke_jax.progress import Progress

_DECODING = "decoding frames"

_SEEK_COST = 8
"""Cost of a seek in decoded frames: those that are in flight in the decoder's threads."""
_LEAST_SAVED = 100
"""Number of frames that seeking must save; below it, decoding in order is as fast."""


@dataclass(frozen=True)
class Picked:
    """The result of decoding the chosen frames in order.

    Attributes:
        frames: uint8 RGB values, resized to squares.
        missing: number of frames that could not be decoded, up to the last chosen one.
        faults: number of decoding errors and corrupt frames.
        as_expected: whether the chosen frames carry the timestamps that were expected.
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
    last = None
    with closing(_decode(source, packets, threads)) as stream:
        for frame in stream:
            if frame is None or frame.is_corrupt:
                faults += 1
            if frame is None:
                continue
            if decoded == wanted[filled]:
                frames[filled] = resize(upright(source.name, frame), size)
                filled += 1
                if pts is not None and frame.pts is not None:
                    as_expected &= frame.pts == pts[decoded]
            decoded += 1
            last = frame
            if progress is not None:
                progress(_DECODING, decoded, goal)
            if decoded == goal:
                break
    if last is not None and filled < len(wanted):
        frames[filled:] = resize(upright(source.name, last), size)
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

    A single thread is used, because it decodes the same frames on every machine next to a fault.

    Args:
        source: the file.
        packets: number of its packets to decode.
        progress: called after each decoded frame; counts frames.
    """
    pts: list[int | None] = []
    duration: list[int] = []
    faults = 0
    is_interlaced = True
    for frame in _decode(source, packets, threads=False):
        faults += frame is None or bool(frame.is_corrupt)
        if frame is not None:
            pts.append(frame.pts)
            duration.append(frame.duration or 0)
            is_interlaced &= frame.interlaced_frame
            if progress is not None:
                progress(_DECODING, len(pts), max(len(pts), packets))
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
        demuxed = container.demux(stream)
        while True:
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


class Stretch(NamedTuple):
    """Packets to decode in one go: from an entry point to the last frame that is wanted of it."""

    entry: int
    """Number of the packet at which decoding starts."""
    first: int
    """Index of its frame in the order of presentation."""
    wanted: list[int]
    """Indices of the wanted frames, ascending."""
    last: int
    """Largest packet number of a wanted frame."""


def plan_seeks(found: Scan, wanted: Sequence[int]) -> list[Stretch] | None:
    """Returns the stretches of a file that hold the wanted frames; None if seeking is not worth it.

    Decoding may start at an entry point if all packets before it are shown before it and none after
    it are (a closed group of pictures).

    Args:
        found: the file's contents.
        wanted: indices of frames in the order of presentation, in ascending order, each once.
    """
    packets = found.packets
    if found.is_uncertain or not found.has_pts or not packets.is_shown.all():
        return None
    stretches = _stretches(packets, found.order, wanted)
    in_order = int(np.max(found.order[: wanted[-1] + 1])) + 1
    by_seeking = sum(s.last + 1 - s.entry + _SEEK_COST for s in stretches)
    if in_order - by_seeking < max(_LEAST_SAVED, in_order / 3):
        return None
    return stretches


def _stretches(
    packets: Packets, order: Int[np.ndarray, "frames"], wanted: Sequence[int]
) -> list[Stretch]:
    before = np.maximum.accumulate(packets.pts)
    after = np.minimum.accumulate(packets.pts[::-1])[::-1]
    is_closed = packets.is_entry & (packets.pts == after)
    is_closed[1:] &= before[:-1] < packets.pts[1:]
    is_closed[0] = True
    entries = np.flatnonzero(is_closed)
    index_of = np.empty(len(order), np.int64)
    index_of[order] = np.arange(len(order))
    firsts = index_of[entries]  # ascending, because the groups are closed
    stretches: list[Stretch] = []
    for index in wanted:
        place = int(np.searchsorted(firsts, index, side="right")) - 1
        entry, packet = int(entries[place]), int(order[index])
        if stretches and entry <= stretches[-1].last + _SEEK_COST:
            previous = stretches[-1]
            stretches[-1] = previous._replace(
                wanted=[*previous.wanted, index], last=max(previous.last, packet)
            )
        else:
            stretches.append(Stretch(entry, int(firsts[place]), [index], packet))
    return stretches


def pick_by_seeking(
    source: Source,
    found: Scan,
    stretches: Sequence[Stretch],
    size: int,
    progress: Progress | None = None,
) -> UInt8[np.ndarray, "F size size 3"] | None:
    """Decodes the stretches of a file, and resizes the wanted frames.

    Args:
        source: the file.
        found: its contents.
        stretches: what to decode, in the order of the file.
        size: side of the resized square frames, in pixels.
        progress: called after each decoded frame; counts frames.

    Returns:
        The wanted frames in order; None if seeking does not lead to an entry point, if something
        cannot be decoded, or if other frames come than those expected.
    """
    frames = np.zeros((sum(len(s.wanted) for s in stretches), size, size, 3), np.uint8)
    goal = sum(s.wanted[-1] + 1 - s.first for s in stretches)
    decoded = filled = 0
    expected = found.pts.tolist()
    with open_container(source) as container:
        stream = video_stream(source, container)
        stream.thread_type = "AUTO"
        for stretch in stretches:
            index, wanted = stretch.first, iter(stretch.wanted)
            target = next(wanted)
            try:
                for frame in _frames_from(container, stream, stretch.entry, found.packets):
                    if frame.is_corrupt or index >= found.total or frame.pts != expected[index]:
                        return None
                    decoded += 1
                    if progress is not None:
                        progress(_DECODING, decoded, goal)
                    if index == target:
                        frames[filled] = resize(upright(source.name, frame), size)
                        filled += 1
                        following = next(wanted, None)
                        if following is None:
                            break
                        target = following
                    index += 1
                else:
                    return None  # the entry point was not found, or the file ends too early
            except av.FFmpegError:
                return None
    return frames


def _frames_from(
    container: av.container.InputContainer, stream: av.VideoStream, entry: int, packets: Packets
) -> Generator[av.VideoFrame, None, None]:
    """Yields the frames of a stream from an entry point on; none if seeking does not find it."""
    place = int(packets.position[entry]), int(packets.pts[entry])
    # Some containers are searched by presentation timestamps and some by those of decoding.
    for timestamp in (int(packets.pts[entry]), int(packets.dts[entry])):
        if entry:
            container.seek(timestamp, stream=stream)
        found = False
        for packet in container.demux(stream):
            if not found and packet.size:
                position = -1 if packet.pos is None else packet.pos
                found = (position, packet.pts) == place
                if packet.pts is None or position > place[0]:
                    break
            if found:
                yield from packet.decode()
        if found:
            return
