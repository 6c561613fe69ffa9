"""Clips for tests: encoded here with PyAV, each frame showing its own number, and one real one."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import av
import av.stream
import numpy as np

HEIGHT, WIDTH = 64, 128
_BITS = 8  # stripes across a frame, dark for 0 and bright for 1


def real_clip() -> Path:
    """H.264 in MP4, 384x216, 25 frames a second, 132 frames (see data/ATTRIBUTION.md)."""
    return Path(__file__).parent.parent / "data" / "bunny.mp4"


def numbered_frame(number: int, height: int = HEIGHT, width: int = WIDTH) -> np.ndarray:
    """A picture of eight stripes that spell ``number`` in binary, legible after compression."""
    bits = [(number >> bit) & 1 for bit in range(_BITS)]
    stripes = np.repeat([40 + 170 * bit for bit in bits], width // _BITS)
    return np.broadcast_to(stripes[None, :, None], (height, width, 3)).astype(np.uint8)


def frame_numbers(frames: np.ndarray) -> list[int]:
    """Reads the numbers back from frames of any size [F, height, width, 3]."""
    width = frames.shape[2]
    middles = [(2 * bit + 1) * width // (2 * _BITS) for bit in range(_BITS)]
    columns = frames[:, :, middles].mean(axis=(1, 3))
    return [int(sum(1 << b for b in range(_BITS) if row[b] > 125)) for row in columns]


def textured(count: int) -> list[np.ndarray]:
    """Numbered frames under moving noise, so that each takes its share of the file's bytes."""
    noise = np.random.default_rng(0).integers(0, 40, (count, HEIGHT, WIDTH, 3), np.uint8)
    return [numbered_frame(i) + noise[i] for i in range(count)]


def write_clip(
    path: Path,
    frames: int | Iterable[np.ndarray] = 24,
    *,
    fps: int = 10,
    codec: str = "libx264",
    pix_fmt: str = "yuv420p",
    rotation: float | None = None,
    options: dict[str, str] | None = None,
    muxer: dict[str, str] | None = None,
) -> Path:
    """Encodes numbered frames, or the given ones, in the container that the name asks for."""
    pictures = [numbered_frame(i) for i in range(frames)] if isinstance(frames, int) else [*frames]
    with av.open(str(path), "w", options=muxer or {}) as container:
        stream: Any = container.add_stream(codec, rate=fps, options=options or {})
        stream.height, stream.width = pictures[0].shape[:2]
        stream.pix_fmt = pix_fmt
        if rotation is not None:
            stream.set_display_rotation(rotation)
        for picture in pictures:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode(None))
    return path


def write_sound(path: Path, seconds: float = 1.0, cover: bool = False) -> Path:
    """Encodes silence, with a cover picture if asked."""
    rate = 8000
    with av.open(str(path), "w") as container:
        sound = container.add_stream("aac", rate=rate, layout="mono")
        if cover:
            picture = container.add_stream("mjpeg", rate=1)
            picture.height, picture.width, picture.pix_fmt = HEIGHT, WIDTH, "yuvj420p"
            picture.disposition = av.stream.Disposition.attached_pic
            container.mux(picture.encode(av.VideoFrame.from_ndarray(numbered_frame(1), "rgb24")))
            container.mux(picture.encode(None))
        samples = np.zeros((1, int(seconds * rate)), np.float32)
        frame = av.AudioFrame.from_ndarray(samples, format="fltp", layout="mono")
        frame.sample_rate = rate
        container.mux(sound.encode(frame))
        container.mux(sound.encode(None))
    return path


def cut(path: Path, share: float) -> Path:
    """Keeps the first part of a file's bytes, as a broken-off download does."""
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])
    return path


def scramble(path: Path, start: float, stop: float) -> Path:
    """Overwrites the bytes between two places (shares of the length) with noise."""
    data = bytearray(path.read_bytes())
    low, high = int(len(data) * start), int(len(data) * stop)
    data[low:high] = np.random.default_rng(0).bytes(high - low)
    path.write_bytes(bytes(data))
    return path


def trim_by_edit_list(path: Path, start: float, seconds: float) -> Path:
    """Rewrites an MP4's edit list, as phones do to trim a clip without touching its frames."""
    data = bytearray(path.read_bytes())
    place = data.index(b"elst") + 12
    movie_scale = _timescale(data, b"mvhd")
    media_scale = _timescale(data, b"mdhd")
    old = int.from_bytes(data[place + 4 : place + 8], "big")
    data[place : place + 4] = int(seconds * movie_scale).to_bytes(4, "big")
    data[place + 4 : place + 8] = (old + int(start * media_scale)).to_bytes(4, "big")
    path.write_bytes(bytes(data))
    return path


def _timescale(data: bytearray, box: bytes) -> int:
    place = data.index(box) + 16  # behind the name: version and flags, two dates
    return int.from_bytes(data[place : place + 4], "big")
