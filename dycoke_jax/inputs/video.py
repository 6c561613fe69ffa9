"""Reads video clips: samples frames, computes their times and detects damaged files.

Videos are decoded with PyAV (FFmpeg), pictures with Pillow. The reference decodes with decord; the
pixels are the same.

Frame indices count the frames that can be decoded, because the count in a container's header is
often wrong, and times are those of the timestamps, because its rate is often wrong too. A damaged
clip raises an error unless the caller allows it.
"""

import os

import numpy as np
from jaxtyping import Int, UInt8

from dycoke_jax.errors import VideoError
from dycoke_jax.inputs.clip import Clip
from dycoke_jax.inputs.container import (
    Readable,
    Source,
    check_readable,
    damage_or_unreadable,
    find_source,
    folder_of,
)
from dycoke_jax.inputs.damage import check_decoded, lost_packets, refuse_or_note
from dycoke_jax.inputs.decoding import MOST_REORDERED, Decoded, decode_all, pick_in_order
from dycoke_jax.inputs.limits import DecodingLimits, Watch
from dycoke_jax.inputs.pictures import (
    is_picture,
    pictures_of,
    read_picture,
    read_pictures,
)
from dycoke_jax.inputs.sampling import FrameSampling, choose_frames
from dycoke_jax.inputs.scan import Scan, scan
from dycoke_jax.inputs.seeking import pick_by_seeking, plan_seeks
from dycoke_jax.progress import Progress


def read_clip(
    path: Readable,
    sampling: FrameSampling,
    size: int,
    *,
    allow_damaged: bool = False,
    progress: Progress | None = None,
    limits: DecodingLimits = DecodingLimits(),  # noqa: B008 (frozen)
) -> Clip:
    """Reads the sampled frames of a video file.

    Args:
        path: a local file in one of the usual formats, its bytes, or an open binary file; a still
            picture is a clip of one frame. Or a folder of pictures (see
            ``inputs.pictures.read_pictures``).
        sampling: which frames to sample.
        size: side of the resized square frames, in pixels.
        allow_damaged: for a damaged or truncated file, use the frames that can be decoded and add
            a note to the clip, instead of raising. Frames near the damage may have artefacts.
        progress: called after each decoded frame; counts frames. It restarts from the first frame
            if a clip is decoded again.
        limits: what reading may take. A call of FFmpeg or Pillow that hangs or crashes is not
            stopped, for that see ``inputs.decoding_pool``.

    Returns:
        The clip, turned and mirrored as its file says. A frame that is sampled several times is
        decoded once.

    Raises:
        VideoError: if the file cannot be read as video, exceeds a limit, or is damaged and
            ``allow_damaged`` is False. The message names the file and the remedy. If the operating
            system does not give the file, its ``__cause__`` is the ``OSError``.
    """
    watch = Watch.begin(limits)
    try:
        if (folder := folder_of(path)) is not None:
            return read_pictures(folder, sampling, size, progress, watch)
        return read_source(find_source(path, watch), sampling, size, allow_damaged, progress)
    except MemoryError as error:
        raise VideoError(
            f"{sampling.frames} frames of {size}x{size} pixels do not fit in memory; sample fewer"
        ) from error


def read_source(
    source: Source,
    sampling: FrameSampling,
    size: int,
    allow_damaged: bool,
    progress: Progress | None,
) -> Clip:
    """Reads the sampled frames of a file that was found; otherwise as :func:`read_clip`."""
    with damage_or_unreadable(source):
        clip = _read_source(source, sampling, size, allow_damaged, progress)
    if clip.notes:  # of damage that was accepted, and that may be none
        check_readable(source)
    return clip


def _read_source(
    source: Source,
    sampling: FrameSampling,
    size: int,
    allow_damaged: bool,
    progress: Progress | None,
) -> Clip:
    if is_picture(source):
        return read_picture(source, sampling, size, progress)
    found = scan(source)
    notes = list(found.notes)
    _accept(source, found, allow_damaged, notes)

    if not found.is_uncertain:
        timeline = found.nominal_timeline(found.total) if found.damage else found.timeline
        indices, times = choose_frames(timeline, sampling)
        frames = _pick(source, found, indices, size, progress)
        if frames is not None:
            notes += timeline.notes(source.name)
            return Clip(frames, times, timeline.duration, tuple(notes))

    decoded = _decode_all(source, found, progress)
    timeline = check_decoded(source, found, decoded, allow_damaged, notes)
    indices, times = choose_frames(timeline, sampling)
    picked = pick_in_order(
        source,
        indices,
        size,
        packets=len(found.packets),
        threads=decoded.threads,
        progress=progress,
    )
    if picked.missing:
        notes.append(
            f"{source.name}: {picked.missing} of its {timeline.total} frames could not be decoded; "
            "the last frame stands in at the end"
        )
    notes += timeline.notes(source.name)
    return Clip(picked.frames, times, timeline.duration, tuple(notes))


def check_clip(path: Readable, *, allow_damaged: bool = False) -> None:
    """Checks the structure of a video file without decoding it, which finds most faults early.

    A picture is decoded, which takes little time.

    Args:
        path: as in :func:`read_clip`.
        allow_damaged: accept a damaged or truncated file that has at least one complete frame.

    Raises:
        VideoError: as :func:`read_clip`, for faults that are visible in the file's structure.
    """
    if (folder := folder_of(path)) is not None:
        pictures_of(folder)
        return
    source = find_source(path)
    with damage_or_unreadable(source):
        if is_picture(source):
            read_picture(source, FrameSampling(frames=1), size=1)
            return
        found = scan(source)
        _accept(source, found, allow_damaged, [])


def count_frames(path: str | os.PathLike[str], sampling: FrameSampling) -> int:
    """Returns how many frames :func:`read_clip` gives; it decodes only if packets do not tell.

    Raises:
        VideoError: as :func:`read_clip`.
    """
    if folder_of(path) is None:
        source = find_source(path)
        if not is_picture(source):
            found = scan(source)
            if found.total and not (found.damage or found.is_uncertain):
                return len(choose_frames(found.timeline, sampling)[0])
    return len(read_clip(path, sampling, size=1).frames)


def _accept(source: Source, found: Scan, allow_damaged: bool, notes: list[str]) -> None:
    """Raises for a clip whose packets show damage, or notes it if the caller allows it."""
    if found.damage:
        refuse_or_note(f"{source.name} {found.damage}", allow_damaged, notes)
    if not found.total:
        raise VideoError(f"{source.name} holds no complete video frame; get the file again")


def _pick(
    source: Source,
    found: Scan,
    indices: Int[np.ndarray, "F"],
    size: int,
    progress: Progress | None,
) -> UInt8[np.ndarray, "F size size 3"] | None:
    """Decodes the frames at the indices; None if the file does not give what its packets say."""
    wanted, rows = np.unique(indices, return_inverse=True)
    stretches = plan_seeks(found, wanted.tolist())
    if stretches is not None:
        frames = pick_by_seeking(source, found, stretches, size, progress)
        if frames is not None:
            return frames[rows]
    for threads in (True, False):
        if threads and found.reordering > MOST_REORDERED:
            continue
        picked = pick_in_order(
            source,
            indices,
            size,
            packets=len(found.packets),
            pts=found.pts.tolist() if found.has_pts else None,
            threads=threads,
            stop_at_fault=True,
            progress=progress,
        )
        if not picked.faults:
            break  # threads also find faults behind the last chosen frame, which are none
    if picked.faults or picked.missing or not picked.as_expected:
        return None
    return picked.frames


def _decode_all(source: Source, found: Scan, progress: Progress | None) -> Decoded:
    """Decodes all frames, in a single thread if anything is wrong with them.

    Several threads lose frames next to a fault, and at the end of a file also the fault, which then
    is seen by the frames that are missing.
    """
    packets = len(found.packets)
    if found.reordering <= MOST_REORDERED:
        decoded = decode_all(source, packets, threads=True, progress=progress)
        if not decoded.faults and not lost_packets(found, decoded):
            return decoded
    return decode_all(source, packets, threads=False, progress=progress)
