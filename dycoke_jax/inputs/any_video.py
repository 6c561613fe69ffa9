"""Makes a clip of whatever a caller gives as a video."""

import os
from collections.abc import Callable, Sequence
from typing import Any

from numpy.typing import ArrayLike
from PIL import Image

from dycoke_jax.errors import RequestError
from dycoke_jax.inputs.clip import Clip, clip_from_array, is_frame
from dycoke_jax.inputs.container import OpenFile, Readable, folder_of
from dycoke_jax.inputs.limits import DecodingLimits
from dycoke_jax.inputs.sampling import FrameSampling
from dycoke_jax.inputs.video import read_clip
from dycoke_jax.progress import Progress

Video = Readable | ArrayLike | Sequence[ArrayLike | Image.Image] | Clip
"""What holds frames.

A path (text, ``Path`` or bytes) of a video, a picture or a folder of pictures; the bytes of a file
or an open binary file; uint8 RGB frames [F, height, width, 3] as an array of NumPy, JAX or PyTorch;
or a list of frames, each an array [height, width, 3] or a Pillow image. Frames of arrays and lists
are all used, and so are those of a ``Clip``, which has been read already in the model's size.
"""


ReadVideo = Callable[..., Clip]
"""Reads a clip: :func:`read_video`, with or without some of its settings, or the ``read`` of an
``inputs.decoding_pool.DecodingPool``."""


def read_video(
    video: Any,
    sampling: FrameSampling,
    size: int,
    *,
    allow_damaged: bool = False,
    progress: Progress | None = None,
    limits: DecodingLimits = DecodingLimits(),  # noqa: B008 (frozen)
) -> Clip:
    """Makes a clip of anything that holds frames.

    Args:
        video: see ``Video``.
        sampling: which frames of a file or folder to sample.
        size: side of the resized square frames, in pixels.
        allow_damaged: see ``inputs.video.read_clip``.
        progress: called after each decoded frame; counts frames.
        limits: what reading a file may take.

    Raises:
        RequestError: if ``video`` is of another kind.
        VideoError: if it cannot be read.
    """
    if is_readable(video):
        return read_clip(
            video,
            sampling,
            size,
            allow_damaged=allow_damaged,
            progress=progress,
            limits=limits,
        )
    if isinstance(video, Clip):
        return _read_already(video, size)
    frames = list(video) if isinstance(video, list | tuple) else None
    if hasattr(video, "shape") and is_frame(video) and not isinstance(video, type):
        return clip_from_array(video, size)
    if frames and all(is_frame(frame) for frame in frames):
        return clip_from_array(frames, size)
    held = f" of {type(frames[0]).__name__}" if frames else ""
    raise RequestError(
        f"a video cannot be a {type(video).__name__}{held}; it is a path of a video, of a picture "
        "or of a folder of pictures, the bytes of a file, an open binary file, an array "
        "[frames, height, width, 3], a list of arrays or Pillow images, or a Clip"
    )


def _read_already(clip: Clip, size: int) -> Clip:
    frames = clip.frames
    if not len(frames) or frames.shape[1:] != (size, size, 3):
        raise RequestError(
            f"the clip has frames of shape {list(frames.shape)}, and the model takes at least one, "
            f"of shape [{size}, {size}, 3]; read it in this size"
        )
    return clip


def is_readable(video: Any) -> bool:
    """Whether a video is a path, the bytes of a file or an open file."""
    kinds = str | os.PathLike | bytes | bytearray | memoryview | OpenFile
    return isinstance(video, kinds) and not isinstance(video, type)


def has_times(video: Any) -> bool:
    """Whether a video says when its frames were filmed: frames and folders of pictures do not."""
    return isinstance(video, Clip) or (is_readable(video) and folder_of(video) is None)
