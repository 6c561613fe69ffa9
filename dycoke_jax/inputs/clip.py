"""A clip as model input: its sampled frames and their times."""

from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Real

import numpy as np
from jaxtyping import UInt8
from numpy.typing import ArrayLike
from PIL import Image

from dycoke_jax import checks
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


def clip_from_array(
    frames: ArrayLike | Sequence[ArrayLike | Image.Image], size: int, *, fps: float = 1.0
) -> Clip:
    """Makes a clip of frames that the caller has sampled already; all are used, in order.

    Args:
        frames: uint8 RGB values [F, height, width, 3] as an array of NumPy, JAX or PyTorch, or a
            sequence of F arrays [height, width, 3] or Pillow images, whose sizes may differ.
        size: side of the resized square frames, in pixels.
        fps: rate of the given frames in frames a second, above 0; it determines their times.

    Returns:
        The clip, with frames resized as in ``inputs.video.read_clip``.

    Raises:
        VideoError: if an array has another shape or dtype, or there are no frames.
        ConfigError: if ``fps`` is not above 0.
    """
    if isinstance(fps, Real) and not 0 < fps < float("inf"):
        raise ConfigError(f"fps is {fps}; a number above 0 is needed")
    fps = checks.number("fps", fps, 0, with_low=False)
    if isinstance(frames, list | tuple) and any(is_frame(frame) for frame in frames):
        pictures = [_picture(frame, number) for number, frame in enumerate(frames)]
    else:
        pictures = [*_array(frames)]
    return Clip(
        frames=np.stack([_resized(picture, n, size) for n, picture in enumerate(pictures)]),
        times=tuple(index / fps for index in range(len(pictures))),
        duration=len(pictures) / fps,
    )


def is_frame(value: object) -> bool:
    """Whether a value is an array or a Pillow image, and not a nested list of numbers."""
    return isinstance(value, Image.Image) or hasattr(value, "__array__")


def _resized(
    picture: Image.Image | UInt8[np.ndarray, "height width 3"], number: int, size: int
) -> UInt8[np.ndarray, "size size 3"]:
    try:
        return resize(picture, size)
    except (OSError, ValueError, SyntaxError) as error:  # Pillow reads a file as late as here
        raise VideoError(f"frame {number} cannot be read ({error})") from error


def _picture(frame: object, number: int) -> Image.Image | UInt8[np.ndarray, "height width 3"]:
    if isinstance(frame, Image.Image):
        return frame
    array = _to_numpy(frame)
    if array.dtype != np.uint8 or array.ndim != 3 or array.shape[-1] != 3 or not array.size:
        raise VideoError(
            f"frame {number} of the list is {array.dtype} {list(array.shape)}; a frame is a Pillow "
            "image or uint8 [height, width, 3]"
        )
    return array


def _array(frames: object) -> UInt8[np.ndarray, "F height width 3"]:
    array = _to_numpy(frames)
    if array.ndim != 4 or array.shape[-1] != 3:
        raise VideoError(
            f"a video array has the shape [frames, height, width, 3], not {list(array.shape)}"
        )
    if array.dtype != np.uint8:
        raise VideoError(f"a video array holds uint8 values from 0 to 255, not {array.dtype}")
    if array.size == 0:
        raise VideoError(f"a video array of shape {list(array.shape)} holds no pixels")
    return array


def _to_numpy(value: object) -> np.ndarray:
    try:
        return np.asarray(value)
    except (TypeError, ValueError, RuntimeError) as error:
        reason = str(error).partition("\n")[0]
        raise VideoError(
            f"a {type(value).__name__} cannot be read as an array of frames ({reason})"
        ) from error
