"""Reading clips: the right frames at the right times, and one clear line about every bad file."""

import subprocess
import sys
from pathlib import Path

import av
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from support.clips import (
    cut,
    frame_numbers,
    numbered_frame,
    real_clip,
    scramble,
    textured,
    trim_by_edit_list,
    write_clip,
    write_sound,
)

from dycoke_jax.errors import ConfigError, VideoError
from dycoke_jax.inputs import (
    Clip,
    FrameSampling,
    clip_from_array,
    frame_indices,
    frame_times,
    read_clip,
    resize,
)

SIZE = 64
ALL = FrameSampling(frames=1000, fps=1000.0)  # every frame once
FASTSTART = {"movflags": "faststart"}


def even(total: int, frames: int) -> list[int]:
    return np.linspace(0, total - 1, frames, dtype=int).tolist()


def numbers(clip: Clip) -> list[int]:
    return frame_numbers(clip.frames)


def total(clip: Clip, fps: float = 10.0) -> int:
    """Frames that there were to choose from, in a clip of a known rate."""
    count = round(clip.duration * fps)
    assert clip.duration == pytest.approx(count / fps)
    return count


def refused(path: Path, says: str) -> str:
    """The message that a file is refused with: one line, with the file's name and ``says``."""
    with pytest.raises(VideoError, match=says) as caught:
        read_clip(path, FrameSampling(frames=4), SIZE)
    message = str(caught.value)
    assert str(path) in message
    assert "\n" not in message
    return message


# Which frames, and when


def test_even_sampling_is_the_reference_formula() -> None:
    assert frame_indices(132, 25.0, FrameSampling()).tolist() == even(132, 32)
    assert frame_indices(5, 25.0, FrameSampling(frames=8)).tolist() == [0, 0, 1, 1, 2, 2, 3, 4]
    assert frame_indices(1, 25.0, FrameSampling(frames=3)).tolist() == [0, 0, 0]
    assert frame_indices(9, 25.0, FrameSampling(frames=1)).tolist() == [0]


def test_fps_sampling_is_the_reference_formula() -> None:
    one = FrameSampling(frames=64, fps=1.0)
    assert frame_indices(100, 25.0, one).tolist() == [0, 25, 50, 75]
    assert frame_times(100, 25.0, one) == (0.0, 1.0, 2.0, 3.0)
    # Nominal times at 29.97 frames a second: index / 30.
    assert frame_indices(100, 29.97, one).tolist() == [0, 30, 60, 90]
    assert frame_times(100, 29.97, one) == (0.0, 1.0, 2.0, 3.0)
    two = FrameSampling(frames=64, fps=2.0)
    assert frame_indices(30, 10.0, two).tolist() == [0, 5, 10, 15, 20, 25]
    assert frame_times(30, 10.0, two) == (0.0, 0.5, 1.0, 1.5, 2.0, 2.5)
    # More than the clip has: every frame.
    assert frame_indices(4, 10.0, FrameSampling(frames=64, fps=100.0)).tolist() == [0, 1, 2, 3]


def test_fps_sampling_spreads_evenly_when_frames_are_too_many() -> None:
    sampling = FrameSampling(frames=4, fps=1.0)
    assert frame_indices(125, 25.0, sampling).tolist() == even(125, 4)
    assert frame_times(125, 25.0, sampling) == tuple(i / 25 for i in even(125, 4))
    assert frame_indices(100, 25.0, sampling).tolist() == [0, 25, 50, 75]


@given(
    st.integers(1, 100_000),
    st.floats(0.1, 240.0),
    st.integers(1, 128),
    st.none() | st.floats(0.01, 300.0),
)
def test_indices_are_in_range_and_times_go_with_them(
    total: int, average_fps: float, frames: int, fps: float | None
) -> None:
    sampling = FrameSampling(frames=frames, fps=fps)
    indices = frame_indices(total, average_fps, sampling)
    assert indices[0] == 0
    assert indices.max() < total
    assert (np.diff(indices) >= 0).all()
    assert len(indices) <= frames if fps else len(indices) == frames
    times = frame_times(total, average_fps, sampling)
    assert len(times) == len(indices)
    assert times[0] == 0
    assert list(times) == sorted(times)
    if fps is None and frames > 1:
        assert indices[-1] == total - 1


@pytest.mark.parametrize(
    ("frames", "fps"), [(0, None), (-1, None), (4, 0.0), (4, -1.0), (4, float("nan"))]
)
def test_settings_that_choose_nothing_are_refused(frames: int, fps: float | None) -> None:
    with pytest.raises(ConfigError, match="needed"):
        FrameSampling(frames=frames, fps=fps)


def test_no_frames_to_choose_from() -> None:
    with pytest.raises(VideoError, match="without frames"):
        frame_indices(0, 25.0, FrameSampling())


# Good files


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("clip.mp4", {}),
        ("fast.mp4", {"muxer": FASTSTART}),
        ("fragments.mp4", {"muxer": {"movflags": "frag_keyframe+empty_moov"}}),
        ("bframes.mp4", {"options": {"bf": "3", "g": "12"}}),
        ("clip.mov", {}),
        ("clip.mkv", {}),
        ("clip.ts", {}),
        ("clip.avi", {"codec": "mpeg4"}),
        (
            "clip.webm",
            {"codec": "libvpx-vp9", "options": {"cpu-used": "8", "deadline": "realtime"}},
        ),
        ("clip.gif", {"codec": "gif", "pix_fmt": "rgb8"}),
    ],
)
def test_the_chosen_frames_are_the_right_ones(
    tmp_path: Path, name: str, settings: dict[str, object]
) -> None:
    path = write_clip(tmp_path / name, 24, **settings)  # type: ignore[arg-type]
    clip = read_clip(path, FrameSampling(frames=7), SIZE)
    assert clip.frames.shape == (7, SIZE, SIZE, 3)
    assert clip.frames.dtype == np.uint8
    assert numbers(clip) == even(24, 7)
    assert clip.times == pytest.approx([i / 10 for i in even(24, 7)])
    assert total(clip) == 24
    assert clip.notes == ()
    assert numbers(read_clip(path, ALL, SIZE)) == list(range(24))
    assert numbers(read_clip(path, FrameSampling(fps=2.0), SIZE)) == [0, 5, 10, 15, 20]


def test_vp8_frames_that_are_never_shown_do_not_count(tmp_path: Path) -> None:
    # VP8 keeps frames that only serve as references in packets of their own.
    path = write_clip(tmp_path / "clip.webm", 24, codec="libvpx")
    hidden = tmp_path / "hidden.webm"
    with av.open(str(path)) as old, av.open(str(hidden), "w") as new:
        stream = new.add_stream_from_template(old.streams.video[0])
        packets = [packet for packet in old.demux(video=0) if packet.size]
        shown = 0
        for number, packet in enumerate(packets):
            data = bytearray(bytes(packet))
            time = 100 * shown
            if number in (5, 11, 17):
                data[0] &= ~0x10  # show_frame
                time -= 1  # an encoder puts it right before the next frame
            else:
                shown += 1
            copy = av.Packet(bytes(data))
            copy.pts, copy.dts, copy.time_base = time, time, packet.time_base
            copy.is_keyframe, copy.stream = packet.is_keyframe, stream
            new.mux(copy)
    clip = read_clip(hidden, ALL, SIZE)
    assert numbers(clip) == [i for i in range(24) if i not in (5, 11, 17)]
    assert total(clip) == 21
    assert clip.notes == ()


def test_real_clip_equals_plain_decoding() -> None:
    clip = read_clip(real_clip(), FrameSampling(frames=9), 96)
    with av.open(str(real_clip())) as container:
        decoded = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    assert len(decoded) == total(clip, 25.0) == 132
    expected = np.stack([resize(decoded[i], 96) for i in even(132, 9)])
    np.testing.assert_array_equal(clip.frames, expected)
    assert clip.duration == pytest.approx(5.28)
    assert clip.notes == ()


def test_short_clip_repeats_frames(tmp_path: Path) -> None:
    path = write_clip(tmp_path / "clip.mp4", 3)
    seen: list[tuple[str, int, int]] = []
    clip = read_clip(path, FrameSampling(frames=8), SIZE, progress=lambda *step: seen.append(step))
    assert numbers(clip) == even(3, 8)
    assert seen == [("decoding frames", done, 3) for done in (1, 2, 3)]


def test_decoding_stops_behind_the_last_wanted_frame() -> None:
    seen: list[tuple[str, int, int]] = []
    read_clip(real_clip(), FrameSampling(fps=0.2), 8, progress=lambda *step: seen.append(step))
    assert seen[-1] == ("decoding frames", 126, 126)
    seen.clear()
    read_clip(real_clip(), FrameSampling(frames=1), 8, progress=lambda *step: seen.append(step))
    assert seen == [("decoding frames", 1, 1)]


def test_odd_names_and_relative_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_clip(tmp_path / "clip.mp4", 3)
    monkeypatch.chdir(tmp_path)
    for name in ("12:30 ünï.mp4", "concat:a|b.mp4", "file%03d.mp4", "no suffix"):
        path.rename(name)
        path = Path(name)
        assert numbers(read_clip(name, FrameSampling(frames=3), SIZE)) == [0, 1, 2]


def test_still_image_is_a_clip_of_one_frame(tmp_path: Path) -> None:
    path = tmp_path / "still.png"
    Image.fromarray(numbered_frame(77)).save(path)
    clip = read_clip(path, FrameSampling(frames=2), SIZE)
    assert numbers(clip) == [77, 77]
    assert clip.times == (0.0, 0.0)


def four_colors() -> np.ndarray:
    picture = np.zeros((64, 128, 3), np.uint8)
    picture[:32, :64], picture[:32, 64:] = (255, 0, 0), (0, 255, 0)
    picture[32:, :64], picture[32:, 64:] = (0, 0, 255), (255, 255, 255)
    return picture


@pytest.mark.parametrize(
    ("degrees", "top_left", "top_right"),
    [
        # Counterclockwise, as `ffmpeg` and players show these tags.
        (0, (255, 0, 0), (0, 255, 0)),
        (90, (0, 255, 0), (255, 255, 255)),
        (180, (255, 255, 255), (0, 0, 255)),
        (-90, (0, 0, 255), (255, 0, 0)),
    ],
)
def test_rotation_tag_is_applied(
    tmp_path: Path, degrees: int, top_left: tuple[int, ...], top_right: tuple[int, ...]
) -> None:
    path = write_clip(
        tmp_path / "clip.mp4", [four_colors()] * 3, rotation=degrees, pix_fmt="yuv444p"
    )
    frame = read_clip(path, FrameSampling(frames=1), SIZE).frames[0].astype(int)
    np.testing.assert_allclose(frame[8, 8], top_left, atol=12)
    np.testing.assert_allclose(frame[8, -8], top_right, atol=12)


def test_slanted_rotation_tag_is_refused(tmp_path: Path) -> None:
    path = write_clip(tmp_path / "clip.mp4", 3, rotation=30)
    refused(path, r"rotated by \d+ degrees; rotate it by a multiple of 90")


def test_trimmed_by_an_edit_list_is_not_taken_for_cut(tmp_path: Path) -> None:
    path = write_clip(tmp_path / "clip.mp4", 40, options={"g": "4", "bf": "0"})
    trim_by_edit_list(path, start=1.0, seconds=2.0)
    clip = read_clip(path, ALL, SIZE)
    assert numbers(clip) == list(range(10, 30))
    assert clip.notes == ()


# Damaged files


def test_cut_mp4_is_refused_unless_allowed(tmp_path: Path) -> None:
    path = tmp_path / "clip.mp4"
    path.write_bytes(real_clip().read_bytes())
    cut(path, 0.5)
    message = refused(path, r"is cut: \d+ of its 132 frames are there; .*--allow-damaged")
    there = int(message.split(" is cut: ")[1].split()[0])
    assert 20 < there < 120
    clip = read_clip(path, FrameSampling(frames=5), 96, allow_damaged=True)
    whole = read_clip(real_clip(), ALL, 96)
    # Not the last one: packets are stored in the order of decoding, so the frames shown last
    # before the cut have lost some of those between them.
    np.testing.assert_array_equal(clip.frames[:-1], whole.frames[even(there, 5)[:-1]])
    assert clip.duration == pytest.approx(there / 25)
    assert len(clip.notes) == 1
    assert f"is cut: {there} of its 132 frames" in clip.notes[0]


def test_cut_fragmented_mp4_is_refused_unless_allowed(tmp_path: Path) -> None:
    muxer = {"movflags": "frag_keyframe+empty_moov"}
    path = cut(write_clip(tmp_path / "clip.mp4", 60, options={"g": "10"}, muxer=muxer), 0.5)
    refused(path, "is cut: ")
    clip = read_clip(path, ALL, SIZE, allow_damaged=True)
    assert numbers(clip) == list(range(total(clip)))


def test_mp4_cut_before_its_index(tmp_path: Path) -> None:
    refused(cut(write_clip(tmp_path / "clip.mp4"), 0.5), r"without its index \(moov\)")


def test_noise_in_the_middle_is_refused_unless_allowed(tmp_path: Path) -> None:
    path = write_clip(tmp_path / "clip.mp4", 60, options={"g": "10", "bf": "0"}, muxer=FASTSTART)
    scramble(path, 0.5, 0.56)
    message = refused(path, r"is damaged: \d+ of its 60 frames can be decoded")
    assert "--allow-damaged" in message
    clip = read_clip(path, FrameSampling(frames=6), SIZE, allow_damaged=True)
    assert 30 < total(clip) <= 60
    assert numbers(clip)[0] == 0
    assert "is damaged" in clip.notes[0]


def test_noise_behind_the_last_wanted_frame_does_not_matter(tmp_path: Path) -> None:
    path = write_clip(tmp_path / "clip.mp4", 60, options={"g": "10", "bf": "0"}, muxer=FASTSTART)
    scramble(path, 0.8, 0.9)
    assert numbers(read_clip(path, FrameSampling(frames=1), SIZE)) == [0]


def test_nothing_but_noise_inside(tmp_path: Path) -> None:
    path = write_clip(tmp_path / "clip.mp4", 24, muxer=FASTSTART)
    data = bytearray(path.read_bytes())
    start = data.index(b"mdat") + 4
    data[start:] = bytes(len(data) - start)
    path.write_bytes(bytes(data))
    refused(path, "not one of its video frames can be decoded")
    with pytest.raises(VideoError, match="not one of its video frames"):
        read_clip(path, FrameSampling(frames=4), SIZE, allow_damaged=True)


def test_cut_avi_says_what_its_header_promised(tmp_path: Path) -> None:
    path = cut(
        write_clip(tmp_path / "clip.avi", textured(60), codec="mpeg4", options={"b": "4000k"}), 0.5
    )
    clip = read_clip(path, ALL, SIZE)
    assert 10 < total(clip) < 50
    assert numbers(clip) == list(range(total(clip)))
    assert len(clip.notes) == 1
    assert f"header promises 60 frames, {total(clip)} are there" in clip.notes[0]


@pytest.mark.parametrize("name", ["clip.mkv", "clip.webm"])
def test_cut_matroska_says_what_its_header_promised(tmp_path: Path, name: str) -> None:
    settings = {"codec": "libx264", "options": {"bf": "0"}}
    if name.endswith("webm"):
        settings = {"codec": "libvpx-vp9", "options": {"cpu-used": "8", "deadline": "realtime"}}
    path = cut(write_clip(tmp_path / name, textured(60), **settings), 0.5)  # type: ignore[arg-type]
    clip = read_clip(path, ALL, SIZE)
    assert 10 < total(clip) < 50
    assert numbers(clip) == list(range(total(clip)))
    assert "header says 6.0 s, the frames end after" in clip.notes[0]


def test_transport_stream_with_a_gap_is_refused_unless_allowed(tmp_path: Path) -> None:
    path = write_clip(tmp_path / "clip.ts", textured(40))
    data = path.read_bytes()
    middle = len(data) // 2 // 188 * 188
    path.write_bytes(data[:middle] + data[middle + 3 * 188 :])
    refused(path, r"is damaged \(incomplete packets: 1\)")
    clip = read_clip(path, FrameSampling(frames=4), SIZE, allow_damaged=True)
    assert total(clip) >= 30
    assert "is damaged (incomplete packets: 1)" in clip.notes[0]


def drop_packets(path: Path, count: int) -> Path:
    """Copies a clip without its first packets."""
    later = path.with_name("later.mkv")
    with av.open(str(path)) as old, av.open(str(later), "w") as new:
        stream = new.add_stream_from_template(old.streams.video[0])
        for number, packet in enumerate(old.demux(video=0)):
            if number >= count and packet.size:
                packet.stream = stream
                new.mux(packet)
    return later


def test_start_between_key_frames_is_refused_unless_allowed(tmp_path: Path) -> None:
    options = {"g": "20", "bf": "0", "sc_threshold": "0"}
    path = drop_packets(write_clip(tmp_path / "clip.mkv", 40, options=options), 10)
    refused(path, "20 of its 30 frames can be decoded")
    clip = read_clip(path, ALL, SIZE, allow_damaged=True)
    assert numbers(clip) == list(range(20, 40))


def test_two_missing_frames_are_only_noted(tmp_path: Path) -> None:
    options = {"g": "20", "bf": "0", "sc_threshold": "0"}
    path = drop_packets(write_clip(tmp_path / "clip.mkv", 40, options=options), 18)
    clip = read_clip(path, ALL, SIZE)
    assert numbers(clip) == [*range(20, 40), 39, 39]
    assert len(clip.notes) == 1
    assert "2 of its 22 frames could not be decoded" in clip.notes[0]


# Files that are no clips


def test_missing_file_and_folder(tmp_path: Path) -> None:
    refused(tmp_path / "nowhere.mp4", "no such file")
    refused(tmp_path, "is a folder")


def test_device_file_is_refused() -> None:
    refused(Path("/dev/null"), "is no regular file")


def test_empty_file(tmp_path: Path) -> None:
    path = tmp_path / "clip.mp4"
    path.touch()
    refused(path, r"is empty \(0 bytes\)")


@pytest.mark.parametrize("name", ["clip.mp4", "clip.avi", "clip"])
def test_text_and_noise(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_text("This is no video.\n" * 100)
    refused(path, "is not a video")
    path.write_bytes(np.random.default_rng(1).bytes(50_000))
    refused(path, "is not a video")


def test_text_file_is_not_drawn(tmp_path: Path) -> None:
    path = tmp_path / "notes.txt"
    path.write_text("FFmpeg would show this in a terminal.\n" * 100)
    refused(path, "is a text file")


def test_sound_only_and_cover_pictures(tmp_path: Path) -> None:
    refused(write_sound(tmp_path / "sound.m4a"), "has no video stream, only audio")
    path = write_sound(tmp_path / "song.mp4", cover=True)
    with av.open(str(path)) as container:
        assert container.streams.video
    refused(path, "has no video stream, only audio")


def test_subtitles(tmp_path: Path) -> None:
    path = tmp_path / "clip.srt"
    path.write_text("1\n00:00:01,000 --> 00:00:02,000\nhello\n\n")
    refused(path, "has no video stream, only subtitle")


# Arrays


def test_array_is_taken_as_it_is() -> None:
    frames = np.stack([numbered_frame(i) for i in (9, 4, 200)])
    clip = clip_from_array(frames, SIZE, fps=2.0)
    assert numbers(clip) == [9, 4, 200]
    np.testing.assert_array_equal(clip.frames[1], resize(frames[1], SIZE))
    assert clip.times == (0.0, 0.5, 1.0)
    assert (clip.duration, clip.notes) == (1.5, ())
    listed = clip_from_array(list(frames), SIZE)
    np.testing.assert_array_equal(listed.frames, clip.frames)
    assert listed.times == (0.0, 1.0, 2.0)


@pytest.mark.parametrize(
    ("array", "says"),
    [
        (np.zeros((2, 8, 8, 3), np.float32), "uint8 values from 0 to 255, not float32"),
        (np.zeros((2, 8, 8, 3), np.int64), "not int64"),
        (np.zeros((8, 8, 3), np.uint8), r"\[frames, height, width, 3\], not \[8, 8, 3\]"),
        (np.zeros((2, 3, 8, 8), np.uint8), r"not \[2, 3, 8, 8\]"),
        (np.zeros((2, 8, 8, 4), np.uint8), r"not \[2, 8, 8, 4\]"),
        (np.zeros((0, 8, 8, 3), np.uint8), "holds no pixels"),
        (np.zeros((2, 0, 8, 3), np.uint8), "holds no pixels"),
    ],
)
def test_arrays_that_are_no_video(array: np.ndarray, says: str) -> None:
    with pytest.raises(VideoError, match=says):
        clip_from_array(array, SIZE)


def test_array_needs_a_rate() -> None:
    with pytest.raises(ConfigError, match="fps is 0"):
        clip_from_array(np.zeros((2, 8, 8, 3), np.uint8), SIZE, fps=0.0)


# The package


def test_importing_needs_no_torch() -> None:
    code = "import dycoke_jax.inputs, sys; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
