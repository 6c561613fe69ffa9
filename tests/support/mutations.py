"""Clips of several containers and codecs, and damaged copies of them."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from support.clips import numbered_frame, textured, write_clip

COUNT = 12  # frames of a clip


def seeds(folder: Path) -> list[bytes]:
    """One small file of each kind that is mutated."""
    made = [
        write_clip(folder / "a.mp4", textured(COUNT)),
        write_clip(folder / "b.mp4", COUNT, muxer={"movflags": "faststart"}),
        write_clip(
            folder / "c.mkv", COUNT, codec="libx265", options={"x265-params": "log-level=none"}
        ),
        write_clip(folder / "d.webm", COUNT, codec="libvpx-vp9"),
        write_clip(folder / "e.webm", COUNT, codec="libvpx"),
        write_clip(folder / "f.avi", COUNT, codec="mpeg4"),
        write_clip(folder / "g.ts", COUNT),
        write_clip(folder / "h.mpg", COUNT, codec="mpeg2video", fps=25),
        write_clip(folder / "i.mov", COUNT, codec="mjpeg", pix_fmt="yuvj420p"),
        write_clip(folder / "j.flv", COUNT),
    ]
    pictures = [Image.fromarray(numbered_frame(number)) for number in range(4)]
    for name in ("k.gif", "l.png", "m.webp"):
        pictures[0].save(folder / name, save_all=True, append_images=pictures[1:], duration=100)
        made.append(folder / name)
    for name in ("n.jpg", "o.tiff", "p.avif", "q.jp2"):
        pictures[1].save(folder / name)
        made.append(folder / name)
    return [path.read_bytes() for path in made]


def mutations(files: list[bytes], count: int, seed: int = 0) -> Iterator[bytes]:
    """Damaged copies: all files in turn, each in one of several ways, or in several at once."""
    rng = np.random.default_rng(seed)
    for number in range(count):
        data = bytearray(files[number % len(files)])
        for _ in range(int(rng.integers(1, 4))):
            _mutate(data, files, rng)
        yield bytes(data)


def _mutate(data: bytearray, files: list[bytes], rng: np.random.Generator) -> None:
    if len(data) < 16:
        return
    at = int(rng.integers(len(data)))
    # Most of what a parser believes stands in the first bytes.
    head = int(rng.integers(min(len(data), 256)))
    match int(rng.integers(9)):
        case 0:  # bits flipped anywhere
            for place in rng.integers(len(data), size=int(rng.integers(1, 30))):
                data[place] ^= 1 << int(rng.integers(8))
        case 1:  # bits flipped in the header
            for place in rng.integers(min(len(data), 1024), size=int(rng.integers(1, 8))):
                data[place] ^= 1 << int(rng.integers(8))
        case 2:  # cut
            del data[at:]
        case 3:  # a piece left out
            del data[at : at + int(rng.integers(1, 500))]
        case 4:  # a piece twice
            data[at:at] = data[at : at + int(rng.integers(1, 500))]
        case 5:  # noise
            length = int(rng.integers(1, 200))
            data[at : at + length] = rng.bytes(length)
        case 6:  # the beginning of another file
            other = files[int(rng.integers(len(files)))]
            length = int(rng.integers(8, 512))
            data[:length] = other[:length]
        case 7:  # a number that is as large as it can be
            data[head : head + 4] = (
                b"\xff\xff\xff\xff" if rng.random() < 0.5 else b"\x7f\xff\xff\xff"
            )
        case 8:  # a number that is 0
            data[head : head + 4] = bytes(4)
