"""Reads video clips: samples frames, computes their times and detects damaged files.

Frames are decoded in order with PyAV (FFmpeg), without seeking, and each sampled frame is resized
at once, so memory grows with the sampled frames and not with the length of the clip. The reference
decodes with decord; the pixels are the same.

Frame indices count the frames that can be decoded, because the count in a container's header is
often wrong. A damaged clip raises an error unless the caller allows it.
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
    """Which frames of a clip are sampled as model input.

    Attributes:
        frames: number of frames, at least 1; the maximum number if ``fps`` is given.
        fps: None samples ``frames`` frames evenly over the whole clip, including the first and the
            last, as LLaVA-OneVision does; a clip with fewer frames repeats some. A number above 0
            samples about that many frames a second, as LLaVA-Video does, or ``frames`` frames
            evenly if that would be more than ``frames``.
    """

    frames: int = 32
    fps: float | None = None

    def __post_init__(self) -> None:
        """Checks the ranges of the settings."""
        if self.frames < 1:
            raise ConfigError(f"frames is {self.frames}; at least 1 is needed")
        if self.fps is not None and not 0 < self.fps < float("inf"):
            raise ConfigError(f"fps is {self.fps}; a number above 0 is needed")


@dataclass(frozen=True, eq=False)
class Clip:
    """The sampled frames of a clip.

    Attributes:
        frames: uint8 RGB values, with rotation tags applied and resized to squares.
        times: time of each frame in seconds from the start of the clip.
        duration: length of the clip in seconds.
        notes: messages for the user about damage or oddities of the file, one sentence each; empty
            if there are none.
    """

    frames: UInt8[np.ndarray, "F size size 3"]
    times: tuple[float, ...]
    duration: float
    notes: tuple[str, ...] = ()


def frame_indices(total: int, average_fps: float, sampling: FrameSampling) -> Int[np.ndarray, "F"]:
    """Returns the indices of the frames to sample.

    They equal those of ``load_video`` (LLaVA-OneVision) and ``process_video_with_decord``
    (LLaVA-Video) of the reference.

    Args:
        total: number of frames of the clip, at least 1.
        average_fps: the clip's average frame rate, in frames a second.
        sampling: which frames to sample.

    Returns:
        int64 indices in [0, total), in ascending order: ``sampling.frames`` of them if
        ``sampling.fps`` is None, otherwise at most that many. Short clips repeat some.

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
    """Returns the times in seconds of the frames that :func:`frame_indices` selects.

    Frames sampled at ``sampling.fps`` get their nominal times, 0, 1/fps, 2/fps, ... These differ
    slightly from the true times, for instance in a clip of 29.97 frames a second, but the reference
    computes them in this way and LLaVA-Video was trained on them.
    """
    indices = frame_indices(total, average_fps, sampling)
    step = _fps_step(total, average_fps, sampling)
    if step is None or sampling.fps is None:
        return tuple((indices / average_fps).tolist())
    return tuple((indices / (step * sampling.fps)).tolist())


def _fps_step(total: int, average_fps: float, sampling: FrameSampling) -> int | None:
    """Returns the index step of sampling at ``sampling.fps``; None for even sampling."""
    if sampling.fps is None:
        return None
    step = max(1, round(average_fps / sampling.fps))
    return step if len(range(0, total, step)) <= sampling.frames else None


def clip_from_array(frames: ArrayLike, size: int, *, fps: float = 1.0) -> Clip:
    """Makes a clip of frames that the caller has sampled already; all are used, in order.

    Args:
        frames: uint8 RGB values [F, height, width, 3].
        size: side of the resized square frames, in pixels.
        fps: rate of the given frames in frames a second, above 0; it determines their times.

    Returns:
        The clip, with frames resized as in :func:`read_clip`.

    Raises:
        VideoError: if the array has another shape or dtype, or is empty.
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
    """Reads the sampled frames of a video file.

    Args:
        path: a local file in any format that FFmpeg reads; a still image is a clip of one frame.
        sampling: which frames to sample.
        size: side of the resized square frames, in pixels.
        allow_damaged: for a damaged or truncated file, use the frames that can be decoded and add
            a note to the clip, instead of raising. Frames near the damage may have artefacts.
        progress: called after each decoded frame; counts frames. It restarts from the first frame
            if a damaged clip is decoded again.

    Returns:
        The clip, with rotation tags applied. A frame that is sampled several times is decoded once.

    Raises:
        VideoError: if the file cannot be read as video, or is damaged and ``allow_damaged`` is
            False. The message names the file and the remedy.
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
        # Decoding in several threads may lose frames next to a fault. A single thread decodes the
        # same frames on every machine, so its count is used.
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
    """Checks the structure of a video file without decoding it, which finds most faults early.

    Args:
        path: a local file in any format that FFmpeg reads.
        allow_damaged: accept a damaged or truncated file that has at least one complete frame.

    Raises:
        VideoError: as :func:`read_clip`, for faults that are visible in the file's structure.
    """
    found = _scan(path)
    if found.damage:
        _refuse_or_note(f"{path} {found.damage}", allow_damaged, [])
    if not found.frames:
        raise VideoError(f"{path} holds no complete video frame; get the file again")


def _spare(total: int) -> int:
    """Returns how many frames an undamaged clip may lack at its end.

    Some encoders declare more frames than they write.
    """
    return max(2, total // 50)


def _refuse_or_note(damage: str, allow_damaged: bool, notes: list[str]) -> None:
    """Raises for a damaged clip, or adds the damage to ``notes`` if the caller allows it."""
    if not allow_damaged:
        raise VideoError(
            f"{damage}; get the file again, or use what is there with --allow-damaged "
            "(allow_damaged=True)"
        )
    notes.append(f"{damage}; what could be read was used")


@dataclass(frozen=True)
class _Scan:
    """The contents of a file, as found without decoding.

    Attributes:
        frames: number of frames that should be decodable.
        fps: average frame rate, in frames a second.
        damage: the damage, as a phrase that follows the path ("is cut: ..."); None if none.
        notes: oddities of the file that are not damage.
    """

    frames: int
    fps: float
    damage: str | None
    notes: tuple[str, ...]


def _scan(path: str | os.PathLike[str]) -> _Scan:
    """Counts the frames of a file by reading its packets, without decoding them."""
    damage = None
    frames = hidden = torn = torn_inside = 0
    end = 0.0
    with _open(path) as container:
        stream = _video_stream(path, container)
        is_mp4 = "mp4" in container.format.name.split(",")
        # The index entries reflect the edit list, which trims a clip without removing frames from
        # the file; stream.frames does not.
        promised = len(stream.index_entries) if is_mp4 else stream.frames
        try:
            for packet in container.demux(stream):
                if not packet.size:
                    # An empty sample extends the previous frame's duration. The empty packet
                    # without a timestamp is not a sample: PyAV emits it at the end.
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
            fps = 1.0  # A still image, for instance, for which any rate will do.

    notes = []
    if is_mp4 and frames + hidden < promised:
        damage = f"is cut: {frames + hidden} of its {promised} frames are there"
    elif torn_inside:
        damage = damage or f"is damaged (incomplete packets: {torn_inside})"
    elif not is_mp4 and promised and promised != frames:
        notes.append(f"{path}: its header promises {promised} frames, {frames} are there")
    elif not promised and end < 0.9 * seconds - 1:
        # Matroska headers give a length but no frame count. The tolerance is for a longer audio
        # track.
        notes.append(f"{path}: its header says {seconds:.1f} s, the frames end after {end:.1f} s")
    return _Scan(frames, fps, damage, tuple(notes))


def _is_hidden(packet: av.Packet, stream: av.VideoStream) -> bool:
    """Whether a packet holds a frame that is only a reference for others and is not displayed.

    VP8 is the one codec that stores such frames in packets of their own; bit 4 of its frame header
    is ``show_frame`` (RFC 6386, section 9.1).
    """
    return stream.codec_context.name == "vp8" and not memoryview(packet)[0] & 0x10


@dataclass(frozen=True)
class _Picked:
    """The result of decoding the sampled frames.

    Attributes:
        frames: uint8 RGB values, resized to squares.
        decoded: number of frames decoded, up to the last sampled one.
        missing: number of frames that could not be decoded, up to the last sampled one.
        faults: number of decoding errors and corrupt frames.
    """

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
    """Decodes a file up to the last index, and resizes the frames at the indices.

    Indices beyond the last decodable frame get that frame.
    """
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
    """Returns the numbers of frames that can be decoded and of decoding errors."""
    frames = faults = 0
    for frame in _decode(path, threads=False):
        frames += frame is not None
        faults += frame is None or bool(frame.is_corrupt)
    return frames, faults


def _decode(
    path: str | os.PathLike[str], threads: bool
) -> Generator[av.VideoFrame | None, None, None]:
    """Yields the frames of a file in presentation order, and None for each decoding error.

    Decoding continues after an error, as in video players. Incomplete packets are skipped silently,
    because ``_scan`` reports them.
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
                # An error of the demuxer ends the loop: a generator that has raised is exhausted.
                yield None
                continue
            yield from frames


def _upright(
    path: str | os.PathLike[str], frame: av.VideoFrame
) -> UInt8[np.ndarray, "height width 3"]:
    """Returns the RGB values of a frame with its rotation tag applied, as players display it."""
    turns = round(frame.rotation / 90)
    if abs(frame.rotation - 90 * turns) > 1:  # The tag may be a fraction, which PyAV truncates.
        raise VideoError(
            f"{path} is tagged as rotated by {frame.rotation} degrees; rotate it by a multiple of "
            "90 with a video editor"
        )
    # Both the tag and rot90 count counterclockwise.
    return np.rot90(frame.to_ndarray(format="rgb24"), turns)


def _open(path: str | os.PathLike[str]) -> av.container.InputContainer:
    """Opens a local video file; a file that cannot be opened raises a VideoError of one line."""
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
        # The path is absolute because FFmpeg would take a "name:" at its start for a protocol.
        # Metadata that is not UTF-8 must not be an error.
        container = av.open(str(file.absolute()), metadata_errors="replace")
    except OSError as error:  # FFmpeg's file errors are OSErrors too.
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
    if container.format.name == "tty":  # FFmpeg renders text files as images of a terminal.
        container.close()
        raise VideoError(f"{path} is a text file; give a file such as MP4, MKV, WebM or AVI")
    return container


def _video_stream(
    path: str | os.PathLike[str], container: av.container.InputContainer
) -> av.VideoStream:
    """Returns the first video stream that is not a cover picture."""
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
