"""Decodes the chosen frames of a long video file by seeking to the key frames before them.

The frames are those that decoding in order gives, bit for bit. Where that is not certain, seeking
is not planned, and where something else comes than the packets promise, it gives up.
"""

import os
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from heapq import heappop, heappush
from threading import Lock
from typing import NamedTuple

import av
import av.container
import numpy as np
from jaxtyping import Int, UInt8

from dycoke_jax.inputs.container import Source, demux, open_container, video_stream
from dycoke_jax.inputs.decoding import DECODING
from dycoke_jax.inputs.entry_points import is_referenced
from dycoke_jax.inputs.frames import resize
from dycoke_jax.inputs.orientation import Orientations, upright
from dycoke_jax.inputs.scan import Packets, Scan
from dycoke_jax.progress import Progress

_SEEK_COST = 8
"""Cost of a seek in decoded frames: those that are in flight in the decoder."""
_LEAST_SAVED = 100
"""Number of frames that seeking must save; below it, decoding in order is as fast."""
_MOST_WORKERS = 4
"""Stretches that are decoded at the same time; each decoder keeps some frames of full size."""


class Stretch(NamedTuple):
    """Packets to decode in one go: from an entry point to the last frame that is wanted of it."""

    entry: int
    """Number of the packet at which decoding starts."""
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
    if len(np.unique(packets.pts)) < len(packets):
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
            stretches.append(Stretch(entry, [index], packet))
    return stretches


def pick_by_seeking(
    source: Source,
    found: Scan,
    stretches: Sequence[Stretch],
    size: int,
    progress: Progress | None = None,
) -> UInt8[np.ndarray, "F size size 3"] | None:
    """Decodes the stretches of a file, several at a time, and resizes the wanted frames.

    Args:
        source: the file.
        found: its contents.
        stretches: what to decode, in the order of the file.
        size: side of the resized square frames, in pixels.
        progress: called after each wanted frame; counts these.

    Returns:
        The wanted frames in order; None if seeking does not lead to an entry point, if something
        cannot be decoded, or if other frames come than those expected.
    """
    rows = np.cumsum([0, *(len(stretch.wanted) for stretch in stretches)]).tolist()
    frames = np.zeros((rows[-1], size, size, 3), np.uint8)
    lock, done, failed = Lock(), 0, False

    def decode(numbers: Sequence[int]) -> None:
        """Decodes the stretches of these numbers."""
        nonlocal done, failed
        orientations: Orientations = {}
        with open_container(source) as container:
            stream = video_stream(source, container)
            # One thread for each worker: the threads of a decoder run empty at each seek.
            stream.thread_type = "NONE"
            for number in numbers:
                decoded = 0
                for frame in _wanted_frames(source, container, stream, found, stretches[number]):
                    frames[rows[number] + decoded] = resize(
                        upright(source.name, frame, orientations), size
                    )
                    decoded += 1
                    with lock:
                        done += 1
                        if progress is not None:
                            progress(DECODING, done, rows[-1])
                failed |= decoded < len(stretches[number].wanted)
                if failed:
                    return

    workers = min(_MOST_WORKERS, os.cpu_count() or 1, len(stretches))
    with ThreadPoolExecutor(workers, thread_name_prefix="seeking") as pool:
        shares = [range(first, len(stretches), workers) for first in range(workers)]
        for _ in pool.map(decode, shares):
            pass
    return None if failed else frames


def _wanted_frames(
    source: Source,
    container: av.container.InputContainer,
    stream: av.VideoStream,
    found: Scan,
    stretch: Stretch,
) -> Iterator[av.VideoFrame]:
    """Yields the wanted frames of a stretch; fewer if something unexpected comes."""
    pts = found.packets.pts
    wanted = found.order[stretch.wanted].tolist()
    left = deque(pts[wanted].tolist())
    due: list[int] = []
    codec, extradata = stream.codec_context.name, stream.codec_context.extradata
    number = stretch.entry
    try:
        for packet in _packets_from(container, stream, stretch.entry, found.packets):
            source.check_time()
            if packet.size and number < len(pts):
                number += 1
                if number - 1 not in wanted and not is_referenced(packet, codec, extradata):
                    continue
                heappush(due, int(pts[number - 1]))
            for frame in packet.decode():
                if frame.is_corrupt or not due or frame.pts != heappop(due):
                    return
                if frame.pts == left[0]:
                    yield frame
                    left.popleft()
                    if not left:
                        return
    except av.FFmpegError:
        return


def _packets_from(
    container: av.container.InputContainer, stream: av.VideoStream, entry: int, packets: Packets
) -> Iterator[av.Packet]:
    """Yields the packets of a stream from an entry point on; none if seeking does not find it."""
    place = int(packets.position[entry]), int(packets.pts[entry])
    # Some containers are searched by presentation timestamps and some by those of decoding.
    for timestamp in (place[1], int(packets.dts[entry])):
        container.seek(timestamp, stream=stream)
        found = False
        for packet in demux(container, stream):
            if not found and packet.size:
                position = -1 if packet.pos is None else packet.pos
                found = (position, packet.pts) == place
                if packet.pts is None or position > place[0]:
                    break
            if found:
                yield packet
        if found:
            return
