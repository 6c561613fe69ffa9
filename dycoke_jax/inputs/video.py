"""Reading clips: which frames, when they were taken, and what to say about damaged files.

Frames are decoded one after the other with PyAV (FFmpeg), never by seeking, and each wanted one is
made a small square at once, so the memory needed is that of the result and not of the clip. The
reference decodes with decord; the pixels are the same.

A frame's index counts the frames that decode, not what the container's header says: headers lie
often. A damaged clip is an error unless the caller asks for what is left of it.
"""

import os
from collections.abc import Generator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import av
import av.container
import av.stream
import numpy as np
from jaxtyping import Int, UInt8
from numpy.typing import ArrayLike

from dycoke_jax.errors import ConfigError, VideoError
from dycoke_jax.inputs.frames import resize
from dycoke_jax.progress import Progress


@dataclass(frozen=True)
class FrameSampling:
    """Which frames of a clip the model sees.

    Attributes:
        frames: how many; the most there can be if ``fps`` is given.
        fps: None spreads ``frames`` evenly over the whole clip, first and last frame included, as
            LLaVA-OneVision does; a clip with fewer frames repeats some. A number takes about that
            many frames a second, as LLaVA-Video does, and spreads evenly if these are too many.
    """

    frames: int = 32
    fps: float | None = None

    def __post_init__(self) -> None:
        """Refuses settings that choose nothing."""
        if self.frames < 1:
            raise ConfigError(f"frames is {self.frames}; at least 1 is needed")
        if self.fps is not None and not 0 < self.fps < float("inf"):
            raise ConfigError(f"fps is {self.fps}; a number above 0 is needed")


@dataclass(frozen=True, eq=False)
class Clip:
    """The chosen frames of a clip.

    Attributes:
        frames: uint8 RGB values, upright and squeezed to squares.
        times: seconds from the clip's start, one for every frame.
        duration: length of the clip in seconds.
        notes: what the person who asked should know, one sentence each; empty if all is well.
    """

    frames: UInt8[np.ndarray, "F size size 3"]
    times: tuple[float, ...]
    duration: float
    notes: tuple[str, ...] = ()


def frame_indices(total: int, average_fps: float, sampling: FrameSampling) -> Int[np.ndarray, "F"]:
    """Indices of the frames to take, in ascending order; short clips repeat some.

    Args:
        total: frames of the clip, at least 1.
        average_fps: the clip's frames a second.
        sampling: which frames are wanted.

    Returns:
        int64 indices in [0, total). Without ``sampling.fps`` there are ``sampling.frames`` of them,
        otherwise at most that many. As ``load_video`` (LLaVA-OneVision) and
        ``process_video_with_decord`` (LLaVA-Video) of the reference compute them.

    Raises:
        VideoError: if ``total`` is below 1.
    """
    if total < 1:
        raise VideoError("a clip without frames has none to choose from")
    step = _fps_step(total, average_fps, sampling)
    if step is not None:
        return np.arange(0, total, step)
    return np.linspace(0, total - 1, sampling.frames, dtype=int)


def frame_times(total: int, average_fps: float, sampling: FrameSampling) -> tuple[float, ...]:
    """Times in seconds of the frames that :func:`frame_indices` chooses.

    Frames taken at ``sampling.fps`` get their nominal times, 0, 1/fps, 2/fps, ...: the reference
    divides the index by the step too, which for a clip of 29.97 frames a second is not quite the
    true time, and LLaVA-Video was trained on these.
    """
    indices = frame_indices(total, average_fps, sampling)
    step = _fps_step(total, average_fps, sampling)
    if step is None or sampling.fps is None:
        return tuple((indices / average_fps).tolist())
    return tuple((indices / (step * sampling.fps)).tolist())


def _fps_step(total: int, average_fps: float, sampling: FrameSampling) -> int | None:
    """Distance between the frames taken at ``sampling.fps``; None if they are spread evenly."""
    if sampling.fps is None:
        return None
    step = max(1, round(average_fps / sampling.fps))
    return step if len(range(0, total, step)) <= sampling.frames else None


def clip_from_array(frames: ArrayLike, size: int, *, fps: float = 1.0) -> Clip:
    """Makes a clip of frames that the caller has chosen already; all are used, in their order.

    Args:
        frames: uint8 RGB values [F, height, width, 3].
        size: side of the resulting squares in pixels.
        fps: frames a second of the given frames, for their times.

    Returns:
        The clip, its frames resized as :func:`read_clip` does it.

    Raises:
        VideoError: if the array is not of that kind.
        ConfigError: if ``fps`` is not above 0.
    """
    if not 0 < fps < float("inf"):
        raise ConfigError(f"fps is {fps}; a number above 0 is needed")
    array = np.asarray(frames)
    if array.ndim != 4 or array.shape[-1] != 3:
        raise VideoError(
            f"a video array has the shape [frames, height, width, 3], not {list(array.shape)}"
        )
    if array.dtype != np.uint8:
        raise VideoError(f"a video array holds uint8 values from 0 to 255, not {array.dtype}")
    if array.size == 0:
        raise VideoError(f"a video array of shape {list(array.shape)} holds no pixels")
    return Clip(
        frames=np.stack([resize(frame, size) for frame in array]),
        times=tuple(index / fps for index in range(len(array))),
        duration=len(array) / fps,
    )


def read_clip(
    path: str | os.PathLike[str],
    sampling: FrameSampling,
    size: int,
    *,
    allow_damaged: bool = False,
    progress: Progress | None = None,
) -> Clip:
    """Reads the chosen frames of a video file.

    Args:
        path: a local file of any format that FFmpeg knows; a still image is a clip of one frame.
        sampling: which frames to take.
        size: side of the resulting squares in pixels.
        allow_damaged: take what can be decoded of a damaged or cut file, and say so in the clip's
            notes. Frames next to a damaged place may show its traces.
        progress: called with the frames decoded and to decode as the work goes on; it starts
            again for a damaged clip.

    Returns:
        The clip. Rotation tags are applied. A frame that is chosen several times is decoded once.

    Raises:
        VideoError: if the file cannot be read as video, or is damaged and ``allow_damaged`` is
            False. The message names the file and what to do.
    """
    found = _scan(path)
    notes = list(found.notes)
    if found.damage:
        _refuse_or_note(f"{path} {found.damage}", allow_damaged, notes)
    if not found.frames:
        raise VideoError(f"{path} holds no complete video frame; get the file again")

    total = found.frames
    picked = _pick(path, frame_indices(total, found.fps, sampling), size, True, progress)
    if picked.faults or not picked.decoded or picked.missing > _spare(total):
        # Decoding in several threads may lose frames next to a fault. What one thread decodes is
        # the same on every machine, so that decides.
        total, faults = _count(path)
        if not total:
            raise VideoError(
                f"{path}: not one of its video frames can be decoded; get the file again or "
                "convert it, to H.264 in MP4 for instance"
            )
        if faults or found.frames - total > _spare(found.frames):
            errors = f" (decoding errors: {faults})" if faults else ""
            _refuse_or_note(
                f"{path} is damaged: {total} of its {found.frames} frames can be decoded{errors}",
                allow_damaged,
                notes,
            )
        picked = _pick(path, frame_indices(total, found.fps, sampling), size, False, progress)
    if picked.missing:
        notes.append(
            f"{path}: {picked.missing} of its {total} frames could not be decoded; the last frame "
            "stands in at the end"
        )
    return Clip(
        frames=picked.frames,
        times=frame_times(total, found.fps, sampling),
        duration=total / found.fps,
        notes=tuple(notes),
    )


def check_clip(path: str | os.PathLike[str], *, allow_damaged: bool = False) -> None:
    """Looks through a video file without decoding it, to find most faults early.

    Raises:
        VideoError: as ``read_clip``, for faults that show in the file's structure.
    """
    found = _scan(path)
    if found.damage:
        _refuse_or_note(f"{path} {found.damage}", allow_damaged, [])
    if not found.frames:
        raise VideoError(f"{path} holds no complete video frame; get the file again")


def _spare(total: int) -> int:
    """Frames that may be missing at the end of an undamaged clip (some encoders promise more)."""
    return max(2, total // 50)


def _refuse_or_note(damage: str, allow_damaged: bool, notes: list[str]) -> None:
    """Raises for a damaged clip, or notes the damage if the caller wants what is left."""
    if not allow_damaged:
        raise VideoError(
            f"{damage}; get the file again, or use what is there with --allow-damaged "
            "(allow_damaged=True)"
        )
    notes.append(f"{damage}; what could be read was used")


@dataclass(frozen=True)
class _Scan:
    """What a file holds, found without decoding.

    Attributes:
        frames: frames that should decode.
        fps: frames a second.
        damage: what is wrong with the file, continuing "clip.mp4 ..."; None if nothing is.
        notes: oddities that are no damage.
    """

    frames: int
    fps: float
    damage: str | None
    notes: tuple[str, ...]


def _scan(path: str | os.PathLike[str]) -> _Scan:
    """Counts the frames of a file by walking through its packets."""
    damage = None
    frames = hidden = torn = torn_inside = 0
    end = 0.0
    with _open(path) as container:
        stream = _video_stream(path, container)
        is_mp4 = "mp4" in container.format.name.split(",")
        # The table of samples as it is after the edit list, which trims a clip without removing
        # the frames from the file; stream.frames does not know of it.
        promised = len(stream.index_entries) if is_mp4 else stream.frames
        try:
            for packet in container.demux(stream):
                if not packet.size:
                    # A sample without bytes shows the frame before it for longer; the packet
                    # without a time is none, but PyAV's sign of the end.
                    hidden += packet.dts is not None
                    continue
                if packet.is_corrupt:
                    torn += 1
                    continue
                torn_inside = torn
                if packet.is_discard or _is_hidden(packet, stream):
                    hidden += 1
                else:
                    frames += 1
                if packet.pts is not None and packet.time_base is not None:
                    last = packet.pts + (packet.duration or 0)
                    end = max(end, float(last * packet.time_base))
        except av.FFmpegError as error:
            damage = f"cannot be read to its end ({error.strerror})"

        seconds = (container.duration or 0) / av.time_base
        rate = stream.average_rate or stream.guessed_rate
        if rate:
            fps = float(rate)
        elif seconds:
            fps = max(frames, 1) / seconds
        else:
            fps = 1.0  # no rate and no length: a still image, say, where any rate will do

    notes = []
    if is_mp4 and frames + hidden < promised:
        damage = f"is cut: {frames + hidden} of its {promised} frames are there"
    elif torn_inside:
        damage = damage or f"is damaged (incomplete packets: {torn_inside})"
    elif not is_mp4 and promised and promised != frames:
        notes.append(f"{path}: its header promises {promised} frames, {frames} are there")
    elif not promised and end < 0.9 * seconds - 1:
        # Matroska, where a header has no count but a length. The slack is for longer sound.
        notes.append(f"{path}: its header says {seconds:.1f} s, the frames end after {end:.1f} s")
    return _Scan(frames, fps, damage, tuple(notes))


def _is_hidden(packet: av.Packet, stream: av.VideoStream) -> bool:
    """Whether a packet holds a frame that is only there for others to refer to.

    VP8 is the one codec that stores these apart; bit 4 of its frame header is ``show_frame``
    (RFC 6386, section 9.1).
    """
    return stream.codec_context.name == "vp8" and not memoryview(packet)[0] & 0x10


@dataclass(frozen=True)
class _Picked:
    """Frames [F, size, size, 3], how many were decoded for them, and what went wrong."""

    frames: UInt8[np.ndarray, "F size size 3"]
    decoded: int
    missing: int
    faults: int


def _pick(
    path: str | os.PathLike[str],
    indices: Int[np.ndarray, "F"],
    size: int,
    threads: bool,
    progress: Progress | None,
) -> _Picked:
    """Decodes up to the last wanted frame; wanted frames beyond the end are the last there is."""
    wanted, rows = np.unique(indices, return_inverse=True)
    goal = int(wanted[-1]) + 1
    frames = np.zeros((len(wanted), size, size, 3), np.uint8)
    decoded = filled = faults = 0
    last = None
    with closing(_decode(path, threads)) as stream:
        for frame in stream:
            if frame is None or frame.is_corrupt:
                faults += 1
            if frame is None:
                continue
            if decoded == wanted[filled]:
                frames[filled] = resize(_upright(path, frame), size)
                filled += 1
            decoded += 1
            last = frame
            if progress is not None:
                progress("decoding frames", decoded, goal)
            if decoded == goal:
                break
    if last is not None and filled < len(wanted):
        frames[filled:] = resize(_upright(path, last), size)
    if len(rows) > len(wanted):
        frames = frames[rows]
    return _Picked(frames, decoded, goal - decoded, faults)


def _count(path: str | os.PathLike[str]) -> tuple[int, int]:
    """Frames of a file that decode, and the faults on the way."""
    frames = faults = 0
    for frame in _decode(path, threads=False):
        frames += frame is not None
        faults += frame is None or bool(frame.is_corrupt)
    return frames, faults


def _decode(
    path: str | os.PathLike[str], threads: bool
) -> Generator[av.VideoFrame | None, None, None]:
    """Yields the frames of a file in the order of showing, and None for each fault.

    Decoding goes on after a fault, as players do. Incomplete packets are left out without a word:
    the scan has spoken of them.
    """
    with _open(path) as container:
        stream = _video_stream(path, container)
        stream.thread_type = "AUTO" if threads else "NONE"
        packets = container.demux(stream)
        while True:
            try:
                packet = next(packets, None)
                if packet is None:
                    return
                frames = [] if packet.size and packet.is_corrupt else packet.decode()
            except av.FFmpegError:
                # From the demuxer it ends the loop: a generator that raised yields no more.
                yield None
                continue
            yield from frames


def _upright(
    path: str | os.PathLike[str], frame: av.VideoFrame
) -> UInt8[np.ndarray, "height width 3"]:
    """RGB values of a frame with its rotation tag applied, as players show it."""
    turns = round(frame.rotation / 90)
    if abs(frame.rotation - 90 * turns) > 1:  # the tag holds fractions, PyAV cuts them off
        raise VideoError(
            f"{path} is tagged as rotated by {frame.rotation} degrees; rotate it by a multiple of "
            "90 with a video editor"
        )
    # Both count counterclockwise.
    return np.rot90(frame.to_ndarray(format="rgb24"), turns)


def _open(path: str | os.PathLike[str]) -> av.container.InputContainer:
    """Opens a local file, or says in one line why that is not possible."""
    file = Path(path)
    if file.is_dir():
        raise VideoError(f"{path} is a folder; name one video file")
    if not file.exists():
        raise VideoError(f"{path}: no such file; check the path")
    if not file.is_file():
        raise VideoError(f"{path} is no regular file; name one video file")
    try:
        with file.open("rb") as opened:
            head = opened.read(12)
        if not head:
            raise VideoError(f"{path} is empty (0 bytes); get the file again")
        # An absolute path, so that FFmpeg takes no "name:" at its start for a protocol. Titles in
        # another encoding than UTF-8 must not matter.
        container = av.open(str(file.absolute()), metadata_errors="replace")
    except OSError as error:  # FFmpeg's errors about files are among these
        raise VideoError(f"{path} cannot be opened ({error.strerror})") from error
    except av.FFmpegError as error:
        if head[4:8] == b"ftyp":
            raise VideoError(
                f"{path} is an MP4 or MOV file without its index (moov), which is written last: a "
                "recording, copy or download was broken off; get the file again"
            ) from error
        raise VideoError(
            f"{path} is not a video ({error.strerror}); give a file such as MP4, MKV, WebM or AVI"
        ) from error
    if container.format.name == "tty":  # FFmpeg draws text files as pictures of a terminal
        container.close()
        raise VideoError(f"{path} is a text file; give a file such as MP4, MKV, WebM or AVI")
    return container


def _video_stream(
    path: str | os.PathLike[str], container: av.container.InputContainer
) -> av.VideoStream:
    """The first video stream, cover pictures aside."""
    cover = av.stream.Disposition.attached_pic
    streams = [stream for stream in container.streams.video if not stream.disposition & cover]
    if not streams:
        kinds = ", ".join(sorted({stream.type for stream in container.streams})) or "nothing"
        raise VideoError(f"{path} has no video stream, only {kinds}; give a file with pictures")
    if streams[0].codec_context is None:
        raise VideoError(
            f"{path}: there is no decoder for its video stream; convert it, to H.264 in MP4 for "
            "instance"
        )
    return streams[0]
