"""Tells damage, which loses frames, from what only looks odd in a video file."""

from collections import Counter

import numpy as np

from dycoke_jax.errors import VideoError
from dycoke_jax.inputs.container import Source
from dycoke_jax.inputs.decoding import Decoded
from dycoke_jax.inputs.sampling import Timeline
from dycoke_jax.inputs.scan import Scan


def check_decoded(
    source: Source, found: Scan, decoded: Decoded, allow_damaged: bool, notes: list[str]
) -> Timeline:
    """Tells from all decoded frames whether a file is damaged, and returns its times.

    Raises:
        VideoError: if it is and ``allow_damaged`` is False, or if no frame can be decoded.
    """
    if not decoded.total:
        raise VideoError(
            f"{source.name}: not one of its video frames can be decoded; get the file again or "
            "convert it, to H.264 in MP4 for instance"
        )
    lost = lost_packets(found, decoded)
    is_damaged = decoded.faults > 0 or len(lost) > _spare(found.total)
    if is_damaged:
        errors = f" (decoding errors: {decoded.faults})" if decoded.faults else ""
        damage = f": {decoded.total} of its {found.total} frames can be decoded{errors}"
        if found.incomplete:
            damage = f" (incomplete packets: {found.incomplete}){damage}"
        refuse_or_note(f"{source.name} is damaged{damage}", allow_damaged, notes)
    if is_damaged or found.damage:
        # Timestamps of a damaged file are not to be trusted.
        return found.nominal_timeline(decoded.total)
    if decoded.pts is None or not found.has_times:
        return found.nominal_timeline(decoded.total + len(lost))
    pts, duration = decoded.pts, decoded.duration
    if lost:
        pts = np.concatenate([pts, found.packets.pts[lost]])
        order = np.argsort(pts, kind="stable")
        duration = np.concatenate([duration, found.packets.duration[lost]])[order]
        pts = pts[order]
    return found.timeline_of(pts, duration)


def lost_packets(found: Scan, decoded: Decoded) -> list[int]:
    """Returns the numbers of the packets whose frame is missing and should not be.

    No frame is due from the leading pictures of an open group of pictures behind a cut, from the
    second field of a frame whose fields have a packet each, and from a picture that is not coded,
    which repeats the one before it.
    """
    missing = found.total - decoded.total
    if missing <= 0:
        return []
    packets = found.packets
    if decoded.pts is None:
        return [] if decoded.is_interlaced else found.order[decoded.total :].tolist()
    keys = np.flatnonzero(packets.is_key)
    cuts = {*keys[:1].tolist(), *keys[packets.jumps[keys] != 0].tolist()}
    cut = None  # the key frame behind a cut, until the next key frame
    given = Counter(decoded.pts.tolist())
    lost = []
    follows_frame = False
    for number in np.flatnonzero(packets.is_shown).tolist():
        pts = int(packets.pts[number])
        if packets.is_key[number]:
            cut = number if number in cuts else None
        if given[pts]:
            given[pts] -= 1
            follows_frame = True
            continue
        is_leading = cut is not None and pts < packets.pts[cut]
        is_second_field = decoded.is_interlaced and follows_frame
        if not (is_leading or is_second_field or packets.is_empty[number]):
            lost.append(number)
        follows_frame = False
    return lost[:missing]


def _spare(total: int) -> int:
    """Returns how many frames an undamaged clip may lack at its end.

    Some encoders declare more frames than they write.
    """
    return max(2, total // 50)


def refuse_or_note(damage: str, allow_damaged: bool, notes: list[str]) -> None:
    """Raises for a damaged clip, or adds the damage to ``notes`` if the caller allows it."""
    if not allow_damaged:
        raise VideoError(
            f"{damage}; get the file again, or use what is there with --allow-damaged "
            "(allow_damaged=True)"
        )
    notes.append(f"{damage}; what could be read was used")
