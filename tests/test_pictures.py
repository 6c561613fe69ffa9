"""Still pictures, picture animations and folders of pictures, read by Pillow."""

import io
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageSequence
from support.clips import frame_numbers, numbered_frame, write_clip
from support.ffmpeg import ffmpeg, ffmpeg_frames

from dycoke_jax.errors import VideoError
from dycoke_jax.inputs import FrameSampling, check_clip, read_clip, resize

SIZE = 64
ALL = FrameSampling(frames=1000, fps=1000.0)
DATA = Path(__file__).parent / "data"
NUMBERS = [3, 5, 9, 17, 33, 65]


def animation(path: Path, delays: list[int]) -> Path:
    """Writes numbered pictures with their delays in milliseconds."""
    pictures = [Image.fromarray(numbered_frame(number)) for number in NUMBERS[: len(delays)]]
    settings = {"lossless": True} if path.suffix == ".webp" else {}
    pictures[0].save(path, save_all=True, append_images=pictures[1:], duration=delays, **settings)
    return path


@pytest.mark.parametrize("name", ["a.gif", "a.webp", "a.png", "a.avif"])
def test_an_animation_is_read_with_its_delays(tmp_path: Path, name: str) -> None:
    path = animation(tmp_path / name, [100, 100, 100, 1000, 500, 200])
    clip = read_clip(path, ALL, SIZE)
    assert frame_numbers(clip.frames) == NUMBERS
    assert clip.times == pytest.approx((0.0, 0.1, 0.2, 0.3, 1.3, 1.8))
    assert clip.duration == pytest.approx(2.0)
    assert len(clip.notes) == 1
    assert "unevenly spaced" in clip.notes[0]
    one = read_clip(path, FrameSampling(frames=64, fps=2.0), SIZE)
    # On screen at 0, 0.5, 1 and 1.5 seconds.
    assert frame_numbers(one.frames) == [3, 17, 17, 33]
    assert one.times == (0.0, 0.5, 1.0, 1.5)


@pytest.mark.parametrize("name", ["a.gif", "a.webp", "a.png", "a.avif"])
def test_an_animation_of_equal_delays_is_a_clip_of_that_rate(tmp_path: Path, name: str) -> None:
    clip = read_clip(animation(tmp_path / name, [250] * 6), FrameSampling(frames=3), SIZE)
    assert frame_numbers(clip.frames) == [3, 9, 65]
    assert clip.times == (0.0, 0.5, 1.25)
    assert (clip.duration, clip.notes) == (1.5, ())


def test_delays_of_zero_last_as_long_as_in_players(tmp_path: Path) -> None:
    path = animation(tmp_path / "a.gif", [0] * 6)
    assert read_clip(path, ALL, SIZE).duration == pytest.approx(0.6)


def test_an_avif_sequence_is_an_animation_and_its_tiles_are_one_picture() -> None:
    assert frame_numbers(read_clip(DATA / "animated.avif", ALL, SIZE).frames) == list(range(6))
    clip = read_clip(DATA / "grid.avif", ALL, SIZE)
    assert len(clip.frames) == 1
    with Image.open(DATA / "grid.avif") as image:
        np.testing.assert_array_equal(clip.frames[0], resize(image, SIZE))
    quarters = clip.frames[0][[16, 16, 48, 48], [16, 48, 16, 48]] > 127
    assert quarters.astype(int).tolist() == [[1, 0, 0], [0, 1, 0], [0, 0, 1], [1, 1, 1]]


@pytest.mark.parametrize("name", ["s.jpg", "s.png", "s.webp", "s.avif", "s.gif", "s.tiff", "s.bmp"])
def test_a_still_picture_is_a_clip_of_one_frame(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    Image.fromarray(numbered_frame(77)).save(path)
    check_clip(path)
    clip = read_clip(path, FrameSampling(frames=2), SIZE)
    assert frame_numbers(clip.frames) == [77, 77]
    assert (clip.times, clip.notes) == ((0.0, 0.0), ())
    assert len(read_clip(path, ALL, SIZE).frames) == 1


def test_a_picture_is_known_by_its_content_and_not_by_its_name(tmp_path: Path) -> None:
    path = tmp_path / "picture.mp4"
    Image.fromarray(numbered_frame(5)).save(path, format="png")
    assert frame_numbers(read_clip(path, FrameSampling(1), SIZE).frames) == [5]
    video = write_clip(tmp_path / "clip.mp4", 3).rename(tmp_path / "clip.jpg")
    assert frame_numbers(read_clip(video, ALL, SIZE).frames) == [0, 1, 2]


def test_a_sixteen_bit_picture_keeps_its_greys(tmp_path: Path) -> None:
    values = np.linspace(0, 65535, 64 * 64).astype(np.uint16).reshape(64, 64)
    path = tmp_path / "grey.png"
    Image.fromarray(values).save(path)
    frame = read_clip(path, FrameSampling(1), SIZE).frames[0].astype(int)
    assert np.abs(frame - ffmpeg_frames(path)[0]).max() <= 1


@pytest.mark.parametrize("mode", ["L", "P", "LA", "RGBA", "CMYK", "1"])
def test_pictures_of_every_mode_become_rgb(tmp_path: Path, mode: str) -> None:
    path = tmp_path / ("picture.tiff" if mode == "CMYK" else "picture.png")
    Image.fromarray(numbered_frame(90)).convert(mode).save(path)
    assert frame_numbers(read_clip(path, FrameSampling(1), SIZE).frames) == [90]


def test_of_a_document_the_first_page_is_used_and_said(tmp_path: Path) -> None:
    path = tmp_path / "pages.tiff"
    pages = [Image.fromarray(numbered_frame(number)) for number in (4, 6, 8)]
    pages[0].save(path, save_all=True, append_images=pages[1:])
    clip = read_clip(path, ALL, SIZE)
    assert frame_numbers(clip.frames) == [4]
    assert clip.notes == (f"{path} holds 3 pages; the first is used",)


@pytest.mark.parametrize("name", ["s.jpg", "s.png", "s.webp", "s.gif", "s.avif"])
def test_a_torn_picture_is_refused(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)
    Image.fromarray(noise).save(path)
    path.write_bytes(path.read_bytes()[:-200])
    for read in (lambda: read_clip(path, ALL, SIZE), lambda: check_clip(path)):
        with pytest.raises(VideoError) as caught:
            read()
        assert str(path) in str(caught.value)
        assert "\n" not in str(caught.value)


def test_a_heif_picture_without_a_reader_is_refused_and_not_shown_in_part(tmp_path: Path) -> None:
    path = tmp_path / "photo.heic"
    data = bytearray((DATA / "grid.avif").read_bytes())
    data[8:12] = b"heic"
    path.write_bytes(bytes(data).replace(b"avif", b"heic"))
    with pytest.raises(VideoError, match="is a HEIF or AVIF picture"):
        read_clip(path, ALL, SIZE)


# Folders


def folder_of_pictures(folder: Path, count: int) -> Path:
    folder.mkdir()
    for number in range(count):
        Image.fromarray(numbered_frame(number)).save(folder / f"frame{number}.png")
    return folder


def test_pictures_of_a_folder_are_frames_in_natural_order(tmp_path: Path) -> None:
    folder = folder_of_pictures(tmp_path / "frames", 12)
    check_clip(folder)
    clip = read_clip(folder, FrameSampling(32), SIZE)
    assert frame_numbers(clip.frames) == list(range(12))
    assert clip.times == tuple(range(12))
    assert clip.notes == ()


def test_of_many_pictures_frames_are_sampled_evenly(tmp_path: Path) -> None:
    folder = folder_of_pictures(tmp_path / "frames", 12)
    assert frame_numbers(read_clip(folder, FrameSampling(3), SIZE).frames) == [0, 5, 11]


def test_other_files_of_a_folder_are_left_aside_and_said(tmp_path: Path) -> None:
    folder = folder_of_pictures(tmp_path / "frames", 2)
    (folder / "notes.txt").write_text("These are frames.")
    (folder / "empty.png").touch()
    (folder / ".hidden").write_text("")
    clip = read_clip(folder, FrameSampling(32), SIZE)
    assert frame_numbers(clip.frames) == [0, 1]
    assert clip.notes == (f"{folder}: left aside what is no picture (2)",)


def test_a_folder_without_pictures_is_refused(tmp_path: Path) -> None:
    write_clip(tmp_path / "clip.mp4", 3)
    for read in (lambda: read_clip(tmp_path, ALL, SIZE), lambda: check_clip(tmp_path)):
        with pytest.raises(VideoError, match="is a folder without pictures"):
            read()


def test_a_picture_in_memory_is_read(tmp_path: Path) -> None:
    file = io.BytesIO()
    Image.fromarray(numbered_frame(12)).save(file, format="png")
    assert frame_numbers(read_clip(file.getvalue(), FrameSampling(1), SIZE).frames) == [12]
    file.seek(0)
    assert frame_numbers(read_clip(file, FrameSampling(1), SIZE).frames) == [12]


# Details of animations


@pytest.mark.parametrize("count", [1, 3])
def test_a_picture_of_an_animated_png_for_readers_of_stills_is_no_frame(
    tmp_path: Path, count: int
) -> None:
    path = tmp_path / "a.png"
    pictures = [Image.fromarray(numbered_frame(number)) for number in NUMBERS[:count]]
    still = Image.fromarray(numbered_frame(200))
    still.save(path, save_all=True, append_images=pictures, default_image=True, duration=200)
    clip = read_clip(path, FrameSampling(count), SIZE)
    assert frame_numbers(clip.frames) == NUMBERS[:count]
    assert clip.times == pytest.approx(tuple(np.arange(count) / 5))
    assert clip.notes == ()


@pytest.mark.parametrize("name", ["a.webp", "a.png", "a.avif"])
@pytest.mark.parametrize("delay", [8, 16, 17])
def test_short_delays_are_kept_where_players_keep_them(
    tmp_path: Path, name: str, delay: int
) -> None:
    clip = read_clip(animation(tmp_path / name, [delay] * 6), FrameSampling(6), SIZE)
    assert clip.times == pytest.approx(tuple(delay * index / 1000 for index in range(6)))
    assert clip.duration == pytest.approx(delay * 6 / 1000)


def test_delays_of_a_fraction_of_a_millisecond_add_up(tmp_path: Path) -> None:
    path = tmp_path / "clip.apng"
    ffmpeg("-f", "lavfi", "-i", "testsrc=r=30:d=3:s=64x64", path)
    clip = read_clip(path, FrameSampling(2), SIZE)
    assert clip.times == pytest.approx((0.0, 89 / 30))
    assert clip.duration == pytest.approx(3.0)


@pytest.mark.parametrize("name", ["a.gif", "a.webp", "a.png", "a.avif"])
@pytest.mark.parametrize("disposal", [0, 1, 2])
def test_frames_of_an_animation_are_composed_as_pillow_composes_them(
    tmp_path: Path, name: str, disposal: int
) -> None:
    pictures = []
    for number in NUMBERS[:4]:
        values = np.zeros((64, 128, 4), np.uint8)
        values[..., :3] = numbered_frame(number)
        values[:, number : number + 40, 3] = 255
        pictures.append(Image.fromarray(values))
    path = tmp_path / name
    settings = {"lossless": True} if name.endswith("webp") else {"disposal": disposal}
    delays = [100, 300, 50, 200]
    pictures[0].save(path, save_all=True, append_images=pictures[1:], duration=delays, **settings)
    with Image.open(path) as image:
        expected = [resize(frame, SIZE) for frame in ImageSequence.Iterator(image)]
    clip = read_clip(path, FrameSampling(4), SIZE)
    np.testing.assert_array_equal(clip.frames, expected)
    assert clip.times == pytest.approx((0.0, 0.1, 0.4, 0.45))
    assert clip.duration == pytest.approx(0.65)


# Names in folders


def test_names_of_every_kind_are_sorted_and_links_are_followed(tmp_path: Path) -> None:
    folder = tmp_path / "frames"
    folder.mkdir()
    names = ["1.png", "2.png", "010.png", "A.png", "a.png", "IMG_2.png", "img_10.png", "\u0663.png"]
    for number, name in reversed([*enumerate(names)]):
        Image.fromarray(numbered_frame(number)).save(folder / name)
    (folder / "a2.png").symlink_to(folder / "a.png")
    (folder / "broken.png").symlink_to(folder / "nowhere.png")
    (folder / "inner").mkdir()
    os.mkfifo(folder / "pipe.png")
    clip = read_clip(folder, FrameSampling(32), SIZE)
    assert frame_numbers(clip.frames) == [0, 1, 2, 4, 3, 4, 5, 6, 7]
    assert clip.notes == (f"{folder}: left aside what is no picture (3)",)
    with pytest.raises(VideoError, match="is no regular file"):
        read_clip(folder / "pipe.png", ALL, SIZE)
