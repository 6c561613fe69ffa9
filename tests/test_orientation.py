"""Pictures are shown as FFmpeg's program and Pillow show them: turned and mirrored."""

from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image
from support.clips import write_clip
from support.ffmpeg import ffmpeg_frames

from dycoke_jax.inputs import FrameSampling, read_clip

SIZE = 64
ONE = 65536  # of the display matrix, in 16.16 fixed point
MATRICES = {
    "as stored": (1, 0, 0, 1),
    "mirrored left to right": (-1, 0, 0, 1),
    "mirrored top to bottom": (1, 0, 0, -1),
    "turned by 180 degrees": (-1, 0, 0, -1),
    "turned by 90 degrees": (0, 1, -1, 0),
    "turned by 270 degrees": (0, -1, 1, 0),
    "transposed": (0, 1, 1, 0),
    "transposed along the other diagonal": (0, -1, -1, 0),
}


def four_colors() -> np.ndarray:
    picture = np.zeros((64, 128, 3), np.uint8)
    picture[:32, :64], picture[:32, 64:] = (255, 0, 0), (0, 255, 0)
    picture[32:, :64], picture[32:, 64:] = (0, 0, 255), (255, 255, 255)
    return picture


def corners(frame: np.ndarray) -> str:
    """The colours of the quarters, row by row."""
    names = {(1, 0, 0): "R", (0, 1, 0): "G", (0, 0, 1): "B", (1, 1, 1): "W"}
    places = [(16, 16), (16, 48), (48, 16), (48, 48)]
    return "".join(names[tuple(int(value > 127) for value in frame[place])] for place in places)


def with_matrix(path: Path, a: int, b: int, c: int, d: int) -> Path:
    """Writes a clip of four colours whose track has a display matrix."""
    pictures = [four_colors()] * 3
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=10)
        stream.height, stream.width, stream.pix_fmt = 64, 128, "yuv444p"
        stream.set_display_matrix([a, b, 0, c, d, 0, 0, 0, 1 << 30])
        for picture in pictures:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode(None))
    return path


@pytest.mark.parametrize("matrix", MATRICES.values(), ids=MATRICES)
@pytest.mark.parametrize("name", ["clip.mp4", "clip.mov"])
def test_a_display_matrix_is_applied_as_ffmpeg_applies_it(
    tmp_path: Path, name: str, matrix: tuple[int, int, int, int]
) -> None:
    path = with_matrix(tmp_path / name, *(ONE * value for value in matrix))
    clip = read_clip(path, FrameSampling(2), SIZE)
    assert corners(clip.frames[0]) == corners(ffmpeg_frames(path)[0])
    assert corners(clip.frames[1]) == corners(clip.frames[0])


def test_the_eight_display_matrices_give_eight_pictures(tmp_path: Path) -> None:
    seen = set()
    for number, matrix in enumerate(MATRICES.values()):
        path = with_matrix(tmp_path / f"{number}.mp4", *(ONE * value for value in matrix))
        seen.add(corners(read_clip(path, FrameSampling(1), SIZE).frames[0]))
    assert len(seen) == 8


def test_a_scale_in_the_display_matrix_does_not_matter(tmp_path: Path) -> None:
    path = with_matrix(tmp_path / "clip.mp4", 0, 2 * ONE, -2 * ONE, 0)
    expected = with_matrix(tmp_path / "plain.mp4", 0, ONE, -ONE, 0)
    frame = read_clip(path, FrameSampling(1), SIZE).frames[0]
    assert corners(frame) == corners(ffmpeg_frames(expected)[0])


@pytest.mark.parametrize("orientation", range(1, 9))
def test_an_exif_orientation_of_a_jpeg_is_applied_as_ffmpeg_applies_it(
    tmp_path: Path, orientation: int
) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / "picture.jpg"
    Image.fromarray(four_colors()).save(path, exif=exif, quality=95)
    clip = read_clip(path, FrameSampling(1), SIZE)
    assert corners(clip.frames[0]) == corners(ffmpeg_frames(path)[0])


# Rows of the EXIF specification (CIPA DC-008, tag 274): the side of the stored picture that the
# first row and the first column are.
EXIF_SIDES = {2: "GRWB", 3: "WBGR", 4: "BWRG", 5: "RBGW", 6: "BRWG", 7: "WGBR", 8: "GWRB"}


@pytest.mark.parametrize("orientation", EXIF_SIDES)
@pytest.mark.parametrize("name", ["still.png", "still.webp", "still.tiff", "still.avif"])
def test_an_exif_orientation_of_other_pictures_is_applied(
    tmp_path: Path, name: str, orientation: int
) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / name
    Image.fromarray(four_colors()).save(path, exif=exif)
    assert corners(read_clip(path, FrameSampling(1), SIZE).frames[0]) == EXIF_SIDES[orientation]


def test_an_upright_clip_stays_as_it_is(tmp_path: Path) -> None:
    path = write_clip(tmp_path / "clip.mp4", [four_colors()] * 3, pix_fmt="yuv444p")
    assert corners(read_clip(path, FrameSampling(1), SIZE).frames[0]) == "RGBW"
