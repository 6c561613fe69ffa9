"""A video is whatever holds frames; anything else is refused by a list of what is taken."""

import io
import os
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from PIL import Image
from support.clips import frame_numbers, numbered_frame, write_clip

from dycoke_jax.errors import RequestError, VideoError
from dycoke_jax.inputs import FrameSampling
from dycoke_jax.inputs.any_video import has_times, read_video

SIZE = 64
NUMBERS = [9, 4, 200, 7]
FRAMES = np.stack([numbered_frame(number) for number in NUMBERS])


def read(video):
    return read_video(video, FrameSampling(frames=4), SIZE)


class Wrapped:
    """An array of another library, which NumPy knows how to convert."""

    shape = FRAMES.shape

    def __array__(self, dtype=None, copy=None):
        return FRAMES


@pytest.mark.parametrize(
    "video",
    [
        FRAMES,
        jnp.asarray(FRAMES),
        torch.from_numpy(FRAMES.copy()),
        Wrapped(),
        [*FRAMES],
        (*FRAMES,),
        [*jnp.asarray(FRAMES)],
        [*torch.from_numpy(FRAMES.copy())],
        [Image.fromarray(frame) for frame in FRAMES],
        [Image.fromarray(FRAMES[0]), FRAMES[1], jnp.asarray(FRAMES[2]), FRAMES[3]],
    ],
    ids=lambda video: type(video).__name__,
)
def test_arrays_and_lists_of_frames_are_taken_as_they_are(video):
    clip = read(video)
    np.testing.assert_array_equal(clip.frames, read(FRAMES).frames)
    assert frame_numbers(clip.frames) == NUMBERS
    assert clip.times == (0.0, 1.0, 2.0, 3.0)
    assert not has_times(video)


def test_frames_of_different_sizes_and_modes_are_resized_alike():
    video = [numbered_frame(3), numbered_frame(5, 32, 64), Image.fromarray(numbered_frame(6))]
    video.append(Image.fromarray(numbered_frame(9)).convert("L"))
    assert frame_numbers(read(video).frames) == [3, 5, 6, 9]


def test_paths_bytes_open_files_and_folders_are_read(tmp_path):
    path = write_clip(tmp_path / "clip.mp4", 4)
    folder = tmp_path / "frames"
    folder.mkdir()
    for index in range(4):
        Image.fromarray(numbered_frame(index)).save(folder / f"{index}.png")
    with path.open("rb") as opened:
        for video in (str(path), path, os.fsencode(path), path.read_bytes(), opened):
            assert frame_numbers(read(video).frames) == [0, 1, 2, 3]
            assert has_times(video)
    for video in (str(folder), folder, os.fsencode(folder)):
        assert frame_numbers(read(video).frames) == [0, 1, 2, 3]
        assert not has_times(video)


@pytest.mark.parametrize(
    "video",
    [3, 0.5, True, object, {}, {"video": "clip.mp4"}, [], (), ["clip.mp4"], [None], [[1, 2], [3]],
     {1, 2}, iter([]), Image.fromarray(FRAMES[0])],
    ids=lambda video: type(video).__name__,
)  # fmt: skip
def test_what_holds_no_frames_is_refused_by_a_list_of_what_does(video):
    with pytest.raises(RequestError, match="it is a path of a video, of a picture") as caught:
        read(video)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("video", "says"),
    [
        ([FRAMES[0], FRAMES[1].astype(np.float32)], "frame 1 of the list is float32"),
        ([FRAMES[0][..., :1]], r"frame 0 of the list is uint8 \[64, 128, 1\]"),
        ([FRAMES], r"frame 0 of the list is uint8 \[4, 64, 128, 3\]"),
        (FRAMES.astype(np.float32), "uint8 values from 0 to 255, not float32"),
        (jnp.asarray(FRAMES[0]), r"\[frames, height, width, 3\], not \[64, 128, 3\]"),
        (torch.zeros(2, 3, 8, 8, dtype=torch.uint8), r"not \[2, 3, 8, 8\]"),
        (torch.zeros(2, 8, 8, 3, requires_grad=True), "cannot be read as an array|not float32"),
        (np.zeros((0, 8, 8, 3), np.uint8), "holds no pixels"),
        (io.BytesIO(b"text"), "is not a video"),
    ],
)
def test_arrays_of_another_kind_are_refused(video, says):
    with pytest.raises(VideoError, match=says) as caught:
        read(video)
    assert "\n" not in str(caught.value)


def test_a_path_object_of_another_library_is_a_path(tmp_path):
    class Remote(os.PathLike):
        def __fspath__(self):
            return str(Path(tmp_path) / "clip.mp4")

    write_clip(tmp_path / "clip.mp4", 4)
    assert frame_numbers(read(Remote()).frames) == [0, 1, 2, 3]


class Reader:
    """A file object of another library."""

    name = "odd\nname"

    def __init__(self, given):
        self.given = given

    def read(self):
        if isinstance(self.given, Exception):
            raise self.given
        return self.given


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (RuntimeError("two\nlines"), r"cannot be read \(two\\nlines\)"),
        (EOFError("it ended"), r"cannot be read \(it ended\)"),
        (None, "gives NoneType, not bytes"),
        ((True, FRAMES[0]), "gives tuple, not bytes"),
        (b"text\0", r"odd\\nname is not a video"),
    ],
)
def test_whatever_a_file_object_does_the_message_is_one_line(given, says):
    with pytest.raises(VideoError, match=says) as caught:
        read(Reader(given))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", [io.BytesIO, np.ndarray, torch.Tensor, Image.Image, Path])
def test_a_class_is_no_video(kind):
    with pytest.raises(RequestError, match="a video cannot be a "):
        read(kind)


def test_a_closed_file_is_refused(tmp_path):
    path = write_clip(tmp_path / "clip.mp4", 4)
    with path.open("rb") as opened:
        pass
    with pytest.raises(VideoError, match="cannot be read"):
        read(opened)


def test_an_endless_path_is_not_repeated_in_the_message():
    for video in ("x" * 100_000, b"x" * 100_000):
        with pytest.raises(VideoError, match=r"100000 characters") as caught:
            read(video)
        assert len(str(caught.value)) < 300


def test_an_image_whose_file_is_torn_or_closed_is_refused(tmp_path):
    path = tmp_path / "torn.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)).save(path)
    closed = Image.open(path)
    closed.close()
    path.write_bytes(path.read_bytes()[:-500])
    with Image.open(path) as torn:
        for image in (torn, closed):
            with pytest.raises(VideoError, match="frame 1 cannot be read"):
                read([FRAMES[0], image])


def test_a_sixteen_bit_image_keeps_its_greys():
    clip = read([Image.fromarray(np.full((8, 8), 20000, np.uint16))])
    assert (clip.frames == 20000 // 256).all()


@pytest.mark.parametrize("frames", [5 * 10**6, 10**12, 2**62, 2**63 - 1])
def test_more_frames_than_fit_in_memory_are_refused(tmp_path, frames):
    path = write_clip(tmp_path / "clip.mp4", 4)
    with pytest.raises(VideoError, match=f"{frames} frames"):
        read_video(path, FrameSampling(frames), 3072)  # 128 TiB
    assert len(read_video(path, FrameSampling(frames, fps=5.0), SIZE).frames) == 2


@pytest.mark.parametrize("fps", [5e-324, 1e-300, 1e-9, 1e9, 1e300])
def test_absurd_rates_give_the_first_frame_or_all(tmp_path, fps):
    path = write_clip(tmp_path / "clip.mp4", 4)
    numbers = frame_numbers(read_video(path, FrameSampling(8, fps=fps), SIZE).frames)
    assert numbers == ([0] if fps < 1 else [0, 1, 2, 3])
