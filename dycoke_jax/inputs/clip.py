"""A clip as model input: its sampled frames and their times."""

from dataclasses import dataclass

import numpy as np
from jaxtyping import UInt8
from numpy.typing import ArrayLike

from dycoke_jax.errors import ConfigError, VideoError
from dycoke_jax.inputs.frames import resize


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


def clip_from_array(frames: ArrayLike, size: int, *, fps: float = 1.0) -> Clip:
    """Makes a clip of frames that the caller has sampled already; all are used, in order.

    Args:
        frames: uint8 RGB values [F, height, width, 3].
        size: side of the resized square frames, in pixels.
        fps: rate of the given frames in frames a second, above 0; it determines their times.

    Returns:
        The clip, with frames resized as in ``inputs.video.read_clip``.

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
