"""Turns decoded video frames the way players display them."""

from collections.abc import Mapping
from typing import cast

import av
import numpy as np
from av.buffer import Buffer
from jaxtyping import UInt8

from dycoke_jax.errors import VideoError


def upright(name: str, frame: av.VideoFrame) -> UInt8[np.ndarray, "height width 3"]:
    """Returns the RGB values of a frame with the file's display matrix applied.

    The matrix ``[a b u; c d v; x y w]`` (ISO/IEC 14496-12, section 6.2.2) maps a pixel (x, y) to
    (a x + c y, b x + d y), up to a shift. Quarter turns and mirrors have either a = d = 0 or
    b = c = 0; FFmpeg applies them too.

    Args:
        name: name of the file, for the error.
        frame: the frame, which carries the matrix if there is one.

    Raises:
        VideoError: if the matrix turns the frame by anything but a multiple of 90 degrees.
    """
    picture = frame.to_ndarray(format="rgb24")
    matrix = cast(Mapping[str, Buffer], frame.side_data).get("DISPLAYMATRIX")
    if matrix is None:
        return picture
    a, b, _, c, d = np.frombuffer(bytes(matrix), np.int32)[:5] / 65536
    largest = max(abs(a), abs(b), abs(c), abs(d))
    small = largest / 50  # about one degree
    if not largest:
        return picture  # an unset matrix
    if max(abs(b), abs(c)) < small < min(abs(a), abs(d)):
        flip_x, flip_y = a < 0, d < 0
    elif max(abs(a), abs(d)) < small < min(abs(b), abs(c)):
        picture = picture.transpose(1, 0, 2)
        flip_x, flip_y = c < 0, b < 0
    else:
        degrees = round(float(np.degrees(np.arctan2(b, a)))) % 360
        raise VideoError(
            f"{name} is tagged as rotated by {degrees} degrees; rotate it by a multiple of "
            "90 with a video editor"
        )
    return picture[:: -1 if flip_y else 1, :: -1 if flip_x else 1]
