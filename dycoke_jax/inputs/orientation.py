"""Turns decoded video frames the way players display them."""

from collections.abc import Mapping
from typing import NamedTuple, cast

import av
import numpy as np
from av.buffer import Buffer
from jaxtyping import UInt8

from dycoke_jax.errors import VideoError


class Orientation(NamedTuple):
    """What to do with the stored rows and columns: first swap them, then reverse each axis."""

    swap: bool = False
    flip_x: bool = False
    flip_y: bool = False


Orientations = dict[int, Orientation]
"""The orientations of a file's frames that are known so far, by PyAV's ``frame.rotation``."""


def upright(
    name: str, frame: av.VideoFrame, known: Orientations
) -> UInt8[np.ndarray, "height width 3"]:
    """Returns the RGB values of a frame with the file's display matrix applied.

    Args:
        name: name of the file, for the error.
        frame: the frame, which carries the matrix if there is one.
        known: orientations that earlier frames of the file had; a new one is added. It is not read
            from each frame, because a frame whose side data was read stays in memory until Python
            looks for reference cycles.

    Raises:
        VideoError: if the matrix turns the frame by anything but a multiple of 90 degrees.
    """
    rotation = frame.rotation
    if rotation not in known:
        known[rotation] = _orientation(name, frame)
    swap, flip_x, flip_y = known[rotation]
    picture = frame.to_ndarray(format="rgb24")
    if swap:
        picture = picture.transpose(1, 0, 2)
    return picture[:: -1 if flip_y else 1, :: -1 if flip_x else 1]


def _orientation(name: str, frame: av.VideoFrame) -> Orientation:
    """Reads the display matrix of a frame.

    The matrix ``[a b u; c d v; x y w]`` (ISO/IEC 14496-12, section 6.2.2) maps a pixel (x, y) to
    (a x + c y, b x + d y), up to a shift. Quarter turns and mirrors have either a = d = 0 or
    b = c = 0; FFmpeg applies them too.
    """
    matrix = cast(Mapping[str, Buffer], frame.side_data).get("DISPLAYMATRIX")
    if matrix is None:
        return Orientation()
    a, b, _, c, d = np.frombuffer(bytes(matrix), np.int32)[:5].tolist()
    small = max(abs(a), abs(b), abs(c), abs(d)) / 50  # about one degree
    if not small:
        return Orientation()  # an unset matrix
    if max(abs(b), abs(c)) < small < min(abs(a), abs(d)):
        return Orientation(False, a < 0, d < 0)
    if max(abs(a), abs(d)) < small < min(abs(b), abs(c)):
        return Orientation(True, c < 0, b < 0)
    degrees = round(float(np.degrees(np.arctan2(b, a)))) % 360
    raise VideoError(
        f"{name} is tagged as rotated by {degrees} degrees; rotate it by a multiple of 90 with a "
        "video editor"
    )
