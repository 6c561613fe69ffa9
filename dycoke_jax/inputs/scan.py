"""Finds the frames of a video file, their order and their times by reading its packets.

Nothing is decoded. What only decoding can tell is marked as uncertain.
"""

import re
from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise

import av
import av.container
import numpy as np
from jaxtyping import Bool, Int

from dycoke_jax.inputs.avi_index import indexed_chunks
from dycoke_jax.inputs.container import Source, demux, open_container, video_stream
from dycoke_jax.inputs.entry_points import is_entry_point
from dycoke_jax.inputs.sampling import Timeline, even_timeline, measure_timeline

_TINY_MPEG4 = 16  # bytes; a picture that is not coded takes 6 to 8
_TIMED = ("matroska,webm", "flv")
"""Formats whose header tells when the file ends, but not how many frames it has."""


@dataclass(frozen=True, eq=False)
class Packets:
    """The packets of a video stream that hold data, in the order of decoding.

    Attributes:
        pts: presentation timestamp of each, or its decoding timestamp if it has none.
        dts: decoding timestamp of each, or its presentation timestamp if it has none.
        duration: duration in ticks; 0 if unknown.
        position: place in the file in bytes; -1 if unknown.
        is_shown: whether it holds a frame that is displayed.
        is_key: whether it is marked as a key frame.
        is_entry: whether decoding can start there, by the bitstream of its codec.
        is_empty: whether it is so small that it may hold no coded picture.
        is_incomplete: whether FFmpeg marks it as corrupt.
    """

    pts: Int[np.ndarray, "packets"]
    dts: Int[np.ndarray, "packets"]
    duration: Int[np.ndarray, "packets"]
    position: Int[np.ndarray, "packets"]
    is_shown: Bool[np.ndarray, "packets"]
    is_key: Bool[np.ndarray, "packets"]
    is_entry: Bool[np.ndarray, "packets"]
    is_empty: Bool[np.ndarray, "packets"]
    is_incomplete: Bool[np.ndarray, "packets"]

    def __len__(self) -> int:
        return len(self.pts)

    @property
    def jumps(self) -> Int[np.ndarray, "packets"]:
        """Whether time jumps right before a packet: 1 forwards, -1 backwards, 0 not at all."""
        steps = np.diff(self.dts, prepend=self.dts[:1])
        usual = np.median(steps[steps > 0]) if (steps > 0).any() else 0
        return (steps > 1.5 * usual).astype(np.int64) - (steps < 0)


@dataclass(frozen=True, eq=False)
class Scan:
    """The contents of a file, as found without decoding.

    Attributes:
        packets: the packets of the video stream; incomplete ones at the end are left out.
        order: packet numbers of the frames, in the order of presentation.
        has_pts: whether decoded frames carry the timestamps in ``packets.pts``.
        has_times: whether the file has timestamps at all.
        is_in_order_avi: whether the frames are in the order of decoding and have only timestamps of
            decoding, so that these are their times. For H.264, FFmpeg gives later ones.
        tail: time in ticks for which empty samples keep the last picture on screen, beyond its own
            duration.
        tick: unit of the timestamps, in seconds.
        header_rates: frame rates that the header suggests, in frames a second, without those that
            cannot be.
        damage: the damage, as a phrase that follows the file's name ("is cut: ..."); None if none.
        notes: oddities of the file that are not damage.
    """

    packets: Packets
    order: Int[np.ndarray, "frames"]
    has_pts: bool
    has_times: bool
    is_in_order_avi: bool
    tail: int
    tick: Fraction
    header_rates: list[float]
    damage: str | None
    notes: tuple[str, ...]

    @property
    def total(self) -> int:
        """Number of frames that should be decodable."""
        return len(self.order)

    @property
    def reordering(self) -> int:
        """Largest number of packets before that of a frame whose frames are shown after it."""
        return int(max(self.order - np.arange(self.total), default=0))

    @property
    def incomplete(self) -> int:
        """Number of packets that FFmpeg marks as corrupt.

        Often it is only that a counter jumps, where whole files were joined.
        """
        return int(self.packets.is_incomplete.sum())

    @property
    def pts(self) -> Int[np.ndarray, "frames"]:
        """Timestamp of each frame, in the order of presentation."""
        return self.packets.pts[self.order]

    @property
    def timeline(self) -> Timeline:
        """The times of the frames, of which there is at least one."""
        if not self.has_times:
            return self.nominal_timeline(self.total)
        pts = self.packets.dts[self.order] if self.is_in_order_avi else self.pts
        return self.timeline_of(pts, self.packets.duration[self.order])

    def timeline_of(
        self, pts: Int[np.ndarray, "shown"], duration: Int[np.ndarray, "shown"]
    ) -> Timeline:
        """Returns the times of frames with these timestamps and durations in ticks."""
        ticks = _joined(pts, duration)
        end = int(ticks[-1] + duration[-1]) + self.tail
        return measure_timeline(ticks, end, self.tick, self.header_rates)

    def nominal_timeline(self, total: int) -> Timeline:
        """Returns the times of ``total`` frames by the header's rate.

        It is for files that are damaged or have no timestamps.
        """
        return even_timeline(total, self.header_rates[0] if self.header_rates else 1.0)

    @property
    def is_uncertain(self) -> bool:
        """Whether only decoding tells which packets give a frame.

        It does for packets that are marked as corrupt, those before the first key frame, those that
        follow it but are shown before it (leading pictures, which are lost where an open group of
        pictures was cut), and those that may hold no coded picture.
        """
        packets = self.packets
        keys = np.flatnonzero(packets.is_key)
        first = int(keys[0]) if len(keys) else 0
        is_leading = packets.is_shown & (packets.pts < packets.pts[first])
        return bool(
            self.incomplete
            or first
            or (self.has_pts and is_leading.any())
            or packets.is_empty.any()
        )


def scan(source: Source) -> Scan:
    """Reads the packets of a file's video stream.

    Raises:
        VideoError: if it cannot be opened or has no video stream that can be decoded, or if a
            limit is exceeded.
    """
    damage = None
    hidden = complete = tail_end = 0
    table = array("q")  # the fields of Packets, one packet after the other
    count = 0
    has_pts = has_times = True
    with open_container(source) as container:
        stream = video_stream(source, container)
        codec, extradata = stream.codec_context.name, stream.codec_context.extradata
        is_avi = container.format.name == "avi"
        is_in_order_avi = is_avi and not stream.codec_context.has_b_frames
        stream_index = stream.index
        is_mp4 = "mp4" in container.format.name.split(",")
        # These formats have no presentation timestamps; FFmpeg sets those of decoding.
        if container.format.name in ("avi", "asf") and stream.codec_context.has_b_frames:
            has_pts = False
        # The index entries reflect the edit list, which trims a clip without removing frames from
        # the file; stream.frames does not.
        promised = len(stream.index_entries) if is_mp4 else stream.frames
        try:
            for packet in demux(container, stream):
                source.check_time()
                size = packet.size
                dts = packet.dts
                if not size:
                    # An empty sample extends the previous frame's duration. The empty packet
                    # without a timestamp is not a sample: PyAV emits it at the end.
                    if dts is not None:
                        hidden += 1
                        if not packet.is_discard:
                            start = dts if packet.pts is None else packet.pts
                            tail_end = max(tail_end, start + (packet.duration or 0))
                    continue
                pts = packet.pts
                if pts is None:
                    has_pts = False
                    has_times &= dts is not None
                    pts = dts if dts is not None else count
                is_shown = not (packet.is_discard or _is_hidden(packet, codec))
                is_key = packet.is_keyframe
                count += 1
                source.watch.check_frames(source.name, count)
                table.extend(
                    (
                        pts,
                        pts if dts is None else dts,
                        packet.duration or 0,
                        -1 if packet.pos is None else packet.pos,
                        is_shown,
                        is_key,
                        is_key and is_entry_point(packet, codec, extradata),
                        codec == "mpeg4" and size < _TINY_MPEG4,
                        packet.is_corrupt,
                    )
                )
                if not packet.is_corrupt:
                    complete = count
        except av.FFmpegError as error:
            damage = f"cannot be read to its end ({error.strerror})"
        tick = stream.time_base or Fraction(1)
        seconds = (container.duration or 0) / av.time_base
        own_seconds = _own_seconds(container, stream)
        rates = [stream.average_rate, stream.guessed_rate, stream.base_rate]

    # A recording may end in the middle of a packet.
    columns = np.array(table, np.int64).reshape(-1, 9)[:complete].T
    packets = Packets(*columns[:4], *columns[4:].astype(bool))
    order = np.array(list(_presentation_order(packets)), np.int64)
    frames = len(order)
    hidden += len(packets) - frames

    tail = max(0, tail_end - int(max(packets.pts + packets.duration, default=0)))
    if is_avi and promised > frames:
        chunks = indexed_chunks(source, stream_index, promised)
        if chunks == promised and frames:
            tail = promised - int(max(packets.dts + packets.duration))
            promised = frames
    if not damage and (holes := _holes(packets)):
        damage = f"is damaged: packets are missing at {holes} {'places' if holes > 1 else 'place'}"

    end = float(max(packets.pts + packets.duration, default=0) * tick)
    seconds = own_seconds or seconds
    tolerance = 0.1 * seconds + 1  # for a longer audio track
    if own_seconds:
        # As in other formats two frames may be missing; a half one is for rounding.
        tolerance = min(tolerance, 2.5 * float(_longest_step(packets) * tick))
    notes = []
    if is_mp4 and frames + hidden < promised:
        damage = f"is cut: {frames + hidden} of its {promised} frames are there"
    elif not is_mp4 and promised and promised != frames and not _is_spaced_out(packets, promised):
        notes.append(f"{source.name}: its header promises {promised} frames, {frames} are there")
    elif not promised and seconds - end > tolerance:
        notes.append(
            f"{source.name}: its header says {seconds:.1f} s, the frames end after {end:.1f} s"
        )
    header_rates = [float(rate) for rate in rates if rate]
    if not header_rates and seconds:
        header_rates = [max(frames, 1) / seconds]
    return Scan(
        packets,
        order,
        has_pts,
        has_times,
        is_in_order_avi,
        tail,
        tick,
        header_rates,
        damage,
        tuple(notes),
    )


def _own_seconds(container: av.container.InputContainer, stream: av.VideoStream) -> float:
    """Returns when the video itself should end by the file's header; 0 if that is not known.

    Other formats have no such header, and FFmpeg estimates their length from what is there.
    """
    if container.format.name not in _TIMED:
        return 0.0
    whole = (container.duration or 0) / av.time_base
    # A tag that FFmpeg and mkvmerge write: "00:01:02.500000000".
    tag = re.fullmatch(r"(\d+):(\d+):(\d+(?:\.\d+)?)", stream.metadata.get("DURATION", ""))
    if tag:
        hours, minutes, seconds = map(float, tag.groups())
        return min(3600 * hours + 60 * minutes + seconds, whole)  # copies may keep an old tag
    return whole if len(container.streams) == 1 else 0.0


def _longest_step(packets: Packets) -> int:
    """Returns the longest time in ticks for which a frame is known to be on screen."""
    steps = np.diff(np.sort(packets.pts))
    return int(max(steps.max(initial=0), packets.duration.max(initial=0)))


def _presentation_order(packets: Packets) -> Iterator[int]:
    """Yields the numbers of the shown packets in the order of presentation.

    Where whole files were joined, timestamps start again at a key frame; each part has an order of
    its own.
    """
    keys = np.flatnonzero(packets.is_key)
    restarts = keys[1:][np.diff(packets.pts[keys]) <= 0] if len(keys) else keys
    bounds = [0, *restarts.tolist(), len(packets)]
    for first, last in pairwise(bounds):
        shown = first + np.flatnonzero(packets.is_shown[first:last])
        yield from shown[np.argsort(packets.pts[shown], kind="stable")].tolist()


def _holes(packets: Packets) -> int:
    """Returns at how many places packets are missing.

    There, FFmpeg marks a packet as corrupt because a counter jumps, and time jumps too. Where files
    were joined, a key frame follows, and nothing is missing.
    """
    if not packets.is_incomplete.any():
        return 0
    # FFmpeg's parser may put the mark on the packet before the torn one.
    is_near = np.convolve(packets.is_incomplete, [1, 1, 1])[1:-2] > 0
    is_gap = packets.jumps[1:] > 0
    return int((is_gap & is_near & ~packets.is_key[1:]).sum())


def _joined(
    pts: Int[np.ndarray, "frames"], duration: Int[np.ndarray, "frames"]
) -> Int[np.ndarray, "frames"]:
    """Shifts timestamps that start again, so that each part follows the end of the one before."""
    pts = pts.copy()
    for restart in 1 + np.flatnonzero(np.diff(pts) < 0):
        if restart > 1 and pts[restart - 1] - pts[restart - 2] == 2 * duration[restart - 2]:
            # In MPEG program streams, FFmpeg guesses it by what follows, one frame too late.
            pts[restart - 1] -= duration[restart - 2]
        end = pts[restart - 1] + max(int(duration[restart - 1]), 1)
        pts[restart:] += end - pts[restart]
    return pts


def _is_spaced_out(packets: Packets, promised: int) -> bool:
    """Whether empty chunks between the frames account for a promised number of frames.

    AVI counts chunks, and an empty chunk repeats the picture before it. Timestamps count chunks
    too, so the frames then end about where the last chunk does.
    """
    if len(packets) < 2:
        return False
    steps = np.diff(packets.pts)
    return bool(packets.pts[-1] + steps.max() >= promised)


def _is_hidden(packet: av.Packet, codec: str) -> bool:
    """Whether a packet holds a frame that is only a reference for others and is not displayed.

    VP8 is the one codec that stores such frames in packets of their own; bit 4 of its frame header
    is ``show_frame`` (RFC 6386, section 9.1).
    """
    return codec == "vp8" and not memoryview(packet)[0] & 0x10
