"""Reads still pictures and picture animations with Pillow, which also turns them upright.

FFmpeg would show one tile of an AVIF or HEIF picture, and ignores some EXIF orientations.
"""

import re
from fractions import Fraction
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from dycoke_jax.errors import VideoError, printable
from dycoke_jax.inputs.clip import Clip
from dycoke_jax.inputs.container import Source, find_source, open_container
from dycoke_jax.inputs.frames import resize
from dycoke_jax.inputs.limits import Watch
from dycoke_jax.inputs.sampling import (
    FrameSampling,
    Timeline,
    choose_frames,
    even_timeline,
    measure_timeline,
)
from dycoke_jax.progress import Progress

_FORMATS = ("AVIF", "BMP", "GIF", "HEIF", "JPEG", "JPEG2000", "MPO", "PNG", "PPM", "TIFF", "WEBP")
"""Pillow's names; HEIF is there if a plugin has registered it."""
_ANIMATED = ("AVIF", "GIF", "PNG", "WEBP")
"""Formats whose further pictures are an animation, and not pages or previews."""

_SHORTEST_GIF_MS, _DEFAULT_MS = 20, 100
"""Players show a picture of a GIF with a shorter delay for the default one, and so does FFmpeg.

In other formats only a delay of zero stands for the default one.
"""


def is_picture(source: Source) -> bool:
    """Whether a file is a still picture or a picture animation, by its first bytes."""
    image = _open(source)
    if image is None:
        return False
    with image:
        return image.format != "JPEG" or not _is_jpeg_stream(source)


def _is_jpeg_stream(source: Source) -> bool:
    """Whether a file holds JPEG pictures one after the other, which are a video (Motion JPEG)."""
    try:
        with open_container(source) as container:
            return container.format.name == "mjpeg"
    except VideoError:
        return False


def read_picture(
    source: Source, sampling: FrameSampling, size: int, progress: Progress | None = None
) -> Clip:
    """Reads a picture as a clip: a still gives one frame, an animation its frames and delays.

    Args:
        source: a file for which :func:`is_picture` holds.
        sampling: which frames to sample.
        size: side of the resized square frames, in pixels.
        progress: called after each decoded frame; counts frames.

    Raises:
        VideoError: if it cannot be decoded.
    """
    image = _open(source)
    assert image is not None
    try:
        with image:
            return _read(source, image, sampling, size, progress)
    except (VideoError, MemoryError):
        raise
    except Exception as error:  # of a damaged file, Pillow's readers raise whatever they stumble on
        raise VideoError(
            f"{source.name} is a damaged picture ({_reason(error)}); get the file again"
        ) from error


def _read(
    source: Source,
    image: Image.Image,
    sampling: FrameSampling,
    size: int,
    progress: Progress | None,
) -> Clip:
    notes = []
    pictures = getattr(image, "n_frames", 1)
    # Of an animated PNG the first picture may be for readers of stills only.
    first = int(getattr(image, "default_image", False))
    pictures -= first
    if image.format not in _ANIMATED:
        if image.format == "TIFF" and pictures > 1:
            notes.append(f"{source.name} holds {pictures} pages; the first is used")
        pictures = 1
    source.watch.check_frames(source.name, pictures)
    timeline = _timeline(source, image, first, pictures)
    indices, times = choose_frames(timeline, sampling)
    frames = {}
    goal = int(indices[-1]) + 1
    for index in np.unique(indices).tolist():
        source.check_time()
        image.seek(first + index)
        frames[index] = resize(ImageOps.exif_transpose(image), size)
        if progress is not None:
            progress("decoding frames", index + 1, goal)
    return Clip(
        np.stack([frames[index] for index in indices.tolist()]),
        times,
        timeline.duration,
        (*notes, *timeline.notes(source.name)),
    )


def _reason(error: Exception) -> str:
    """What an error of Pillow says, as part of a message."""
    return printable(str(error)[:200]) or type(error).__name__


def pictures_of(folder: Path, watch: Watch | None = None) -> tuple[list[Path], int]:
    """Finds the pictures in a folder.

    Args:
        folder: the folder.
        watch: the limits of reading it; None for the default ones without a deadline.

    Returns:
        The pictures, in natural order: 2.png before 10.png; and how many other things there are.
        What is hidden does not count.

    Raises:
        VideoError: if it holds no picture, or cannot be read.
    """
    watch = watch or Watch()
    try:
        shown = [file for file in folder.iterdir() if file.name[0] != "."]
        files = [file for file in shown if file.is_file()]
        watch.check_frames(str(folder), len(files))
        pictures = []
        for file in files:
            watch.check_time(str(folder))
            if file.stat().st_size and is_picture(find_source(file, watch)):
                pictures.append(file)
    except OSError as error:
        raise VideoError(f"{folder} cannot be read ({error.strerror})") from error
    if not pictures:
        raise VideoError(
            f"{folder} is a folder without pictures; name a video file or a folder of pictures"
        )
    others = len(shown) - len(pictures)
    return sorted(pictures, key=lambda file: _natural(file.name)), others


def read_pictures(
    folder: Path,
    sampling: FrameSampling,
    size: int,
    progress: Progress | None = None,
    watch: Watch | None = None,
) -> Clip:
    """Reads the pictures of a folder as the frames of a clip, one a second.

    If there are no more than ``sampling.frames`` pictures and ``sampling.fps`` is None, all are
    used once, since they are likely sampled already.

    Args:
        folder: a folder with pictures; of an animation the first one is used. Other files are left
            aside, with a note.
        sampling: which pictures to sample.
        size: side of the resized square frames, in pixels.
        progress: called after each picture; counts pictures.
        watch: as for ``pictures_of``.

    Raises:
        VideoError: if there is no picture, or one cannot be decoded.
    """
    files, others = pictures_of(folder, watch)
    notes = [f"{folder}: left aside what is no picture ({others})"] if others else []
    timeline = even_timeline(len(files), 1.0)
    if sampling.fps is None and len(files) <= sampling.frames:
        sampling = FrameSampling(len(files))
    indices, times = choose_frames(timeline, sampling)
    still = FrameSampling(1)
    frames = []
    for index in indices.tolist():
        frames.append(read_picture(find_source(files[index], watch), still, size).frames)
        if progress is not None:
            progress("reading pictures", len(frames), len(indices))
    return Clip(np.concatenate(frames), times, timeline.duration, tuple(notes))


def _natural(name: str) -> tuple[list[tuple[bool, int, str]], str]:
    """Sort key of a file name in which numbers count by their value, and case does not."""
    parts = re.findall(r"[0-9]+|[^0-9]+", name)
    numbered = [
        (False, int(p), "") if p[0] in "0123456789" else (True, 0, p.lower()) for p in parts
    ]
    return numbered, name


def _open(source: Source) -> Image.Image | None:
    Image.init()
    try:
        image = Image.open(source.open(), formats=[f for f in _FORMATS if f in Image.OPEN])
    except Image.UnidentifiedImageError:
        return None
    except MemoryError:
        raise
    except Exception as error:  # as above
        raise VideoError(
            f"{source.name} is a picture that cannot be read ({_reason(error)})"
        ) from error
    try:
        source.watch.check_size(source.name, *image.size)
    except VideoError:
        image.close()
        raise
    return image


def _timeline(source: Source, image: Image.Image, first: int, pictures: int) -> Timeline:
    """Returns the times of an image's pictures from the first one of the animation on."""
    if pictures == 1:
        return even_timeline(1, 1.0)
    shortest = _SHORTEST_GIF_MS if image.format == "GIF" else 0
    delays = []
    for index in range(first, first + pictures):
        source.check_time()
        image.seek(index)
        image.load()
        delay = image.info.get("duration", 0)
        delays.append(delay if delay > 0 and delay >= shortest else _DEFAULT_MS)
    unit = 10 if image.format == "GIF" else 1
    starts = np.rint(np.cumsum([0, *delays]) / unit).astype(int)
    rates = [1000 / delays[0]] if min(delays) == max(delays) else []
    return measure_timeline(starts[:-1], int(starts[-1]), Fraction(unit, 1000), rates)
