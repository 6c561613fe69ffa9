"""Streams that look odd and lose nothing are read without complaint; torn ones are refused."""

import struct
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from support.clips import frame_numbers, numbered_frame, textured, write_clip
from support.ffmpeg import ffmpeg, ffmpeg_frames

from dycoke_jax.errors import VideoError
from dycoke_jax.inputs import FrameSampling, check_clip, read_clip

SIZE = 64
DATA = Path(__file__).parent / "data"
ALL = FrameSampling(frames=1000, fps=1000.0)
X265 = "keyint=20:min-keyint=20:scenecut=0:bframes=4:b-adapt=0:repeat-headers=1:log-level=none"
X264 = "open-gop=1:keyint=20:min-keyint=20:scenecut=0:bframes=4:b-adapt=0:repeat-headers=1"
OPEN_GOPS = {
    "h264": {"options": {"x264-params": X264}},
    "hevc": {"codec": "libx265", "options": {"x265-params": X265}},
    "mpeg2": {"codec": "mpeg2video", "fps": 25, "options": {"g": "12", "bf": "2"}},
}


def read_all(path: Path) -> tuple[list[int], float]:
    """The numbers of all frames, and the duration; nothing may be remarked."""
    check_clip(path)
    clip = read_clip(path, ALL, SIZE)
    assert clip.notes == ()
    return frame_numbers(clip.frames), clip.duration


# Fields


@pytest.mark.parametrize("name", ["fields.ts", "fields.mkv", "fields.mp4", "fields.avi"])
def test_two_packets_of_one_field_are_one_frame(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    ffmpeg("-i", DATA / "fields.ts", "-c", "copy", path)
    numbers, duration = read_all(path)
    assert numbers == list(range(20)) == frame_numbers(ffmpeg_frames(path))
    assert duration == pytest.approx(0.8)
    clip = read_clip(path, FrameSampling(frames=64, fps=5.0), SIZE)
    assert frame_numbers(clip.frames) == [0, 5, 10, 15]
    assert clip.times == pytest.approx((0.0, 0.2, 0.4, 0.6))


# Open groups of pictures


def cut_at_key_frame(path: Path, later: Path, number: int) -> Path:
    """Copies a clip from a key frame on, as a cut without coding again does."""
    with av.open(str(path)) as old, av.open(str(later), "w") as new:
        stream = new.add_stream_from_template(old.streams.video[0])
        packets = [packet for packet in old.demux(video=0) if packet.size]
        keys = [index for index, packet in enumerate(packets) if packet.is_keyframe]
        kept = packets[keys[number] :]
        first = min(packet.pts for packet in kept)
        for packet in kept:
            packet.pts -= first
            packet.dts = None if packet.dts is None else packet.dts - first
            packet.stream = stream
            new.mux(packet)
    return later


@pytest.mark.parametrize("name", ["cut.mkv", "cut.ts", "cut.mp4"])
@pytest.mark.parametrize("codec", OPEN_GOPS)
def test_leading_pictures_behind_a_cut_do_not_count(tmp_path: Path, codec: str, name: str) -> None:
    """They refer to frames before the cut, and no decoder shows them."""
    whole = write_clip(tmp_path / "whole.mkv", 60, **OPEN_GOPS[codec])  # type: ignore[arg-type]
    path = cut_at_key_frame(whole, tmp_path / name, 1)
    with av.open(str(path)) as container:
        packets = [packet for packet in container.demux(video=0) if packet.size]
    numbers, duration = read_all(path)
    assert numbers == frame_numbers(ffmpeg_frames(path))
    assert numbers == list(range(numbers[0], 60))
    assert len(numbers) < len(packets), "the cut leaves no leading pictures"
    rate = 25 if codec == "mpeg2" else 10
    assert duration == pytest.approx(len(numbers) / rate)


def test_leading_pictures_behind_the_cut_of_a_joined_part_do_not_count(tmp_path: Path) -> None:
    options = {"x265-params": "keyint=12:bframes=3:log-level=none"}
    whole = tmp_path / "whole.ts"
    write_clip(whole, textured(60), fps=25, codec="libx265", options=options)
    parts = []
    for start, seconds in ((0, 0.9), (0.96, 1.4), (1.92, 0.5)):
        part = tmp_path / f"{start}.ts"
        ffmpeg("-ss", start, "-i", whole, "-t", seconds, "-c", "copy", "-copyts", part)
        parts.append(part.read_bytes())
    path = tmp_path / "joined.ts"
    path.write_bytes(b"".join(parts))
    with av.open(str(path)) as container:
        packets = sum(packet.size > 0 for packet in container.demux(video=0))
    clip = read_clip(path, ALL, SIZE)
    numbers = frame_numbers(clip.frames)
    assert numbers == frame_numbers(ffmpeg_frames(path))
    assert len(numbers) == packets - 3, "no leading pictures are lost"
    assert len(clip.notes) == 1
    assert "unevenly spaced" in clip.notes[0]


# Pictures that are not coded


@pytest.mark.parametrize("source", ["not_coded.avi", "empty_chunks.avi"])
@pytest.mark.parametrize("name", ["clip.avi", "clip.mkv", "clip.mp4"])
def test_pictures_that_are_not_coded_repeat_the_one_before(
    tmp_path: Path, source: str, name: str
) -> None:
    path = tmp_path / name
    ffmpeg("-i", DATA / source, "-c", "copy", path)
    check_clip(path)
    clip = read_clip(path, ALL, SIZE)
    numbers = frame_numbers(clip.frames)
    assert list(dict.fromkeys(numbers)) == list(range(10))
    assert numbers == sorted(numbers)
    assert clip.duration == pytest.approx(3.0, abs=0.15)
    assert all("unevenly spaced" in note for note in clip.notes)
    one = read_clip(path, FrameSampling(frames=64, fps=1.0), SIZE)
    # Of 10 pictures a second every third is coded: those at 0, 10 and 20 repeat 0, 9 and 18.
    assert frame_numbers(one.frames)[:3] == [0, 3, 6]


# Joined files


@pytest.mark.parametrize("name", ["joined.ts", "joined.mpg"])
def test_whole_files_that_were_joined_are_read_one_after_the_other(
    tmp_path: Path, name: str
) -> None:
    settings = {} if name.endswith("ts") else {"codec": "mpeg2video"}
    parts = [
        write_clip(tmp_path / f"{count}{name[-4:]}", count, fps=25, **settings)  # type: ignore[arg-type]
        for count in (24, 30, 12)
    ]
    path = tmp_path / name
    path.write_bytes(b"".join(part.read_bytes() for part in parts))
    numbers, duration = read_all(path)
    assert numbers == [*range(24), *range(30), *range(12)]
    assert duration == pytest.approx(66 / 25, abs=0.05)
    clip = read_clip(path, FrameSampling(frames=64, fps=1.0), SIZE)
    assert frame_numbers(clip.frames) == [0, 1, 26]


def test_joined_files_of_different_sizes_are_read(tmp_path: Path) -> None:
    small = write_clip(tmp_path / "small.ts", 20).read_bytes()
    pictures = [numbered_frame(number, 128, 256) for number in range(20, 40)]
    large = write_clip(tmp_path / "large.ts", pictures).read_bytes()
    path = tmp_path / "joined.ts"
    path.write_bytes(small + large + small)
    numbers, duration = read_all(path)
    assert numbers == [*range(40), *range(20)]
    assert duration == pytest.approx(6.0)


def test_a_counter_that_jumps_is_no_damage(tmp_path: Path) -> None:
    path = write_clip(tmp_path / "clip.ts", textured(40))
    data = bytearray(path.read_bytes())
    marked = 0
    for place in range(len(data) // 2 // 188 * 188, len(data), 188):
        pid = int.from_bytes(data[place + 1 : place + 3], "big") & 0x1FFF
        if pid == 0x100:  # the video's packets count to 15 in four bits
            data[place + 3] = (data[place + 3] & 0xF0) | ((data[place + 3] + 5) & 0x0F)
            marked += 1
    assert marked
    path.write_bytes(bytes(data))
    numbers, duration = read_all(path)
    assert numbers == list(range(40))
    assert duration == pytest.approx(4.0)


@pytest.mark.parametrize("share", [0.4, 0.5, 0.7])
def test_a_torn_transport_stream_is_still_refused(tmp_path: Path, share: float) -> None:
    path = write_clip(tmp_path / "clip.ts", textured(40))
    data = path.read_bytes()
    place = int(len(data) * share) // 188 * 188
    path.write_bytes(data[:place] + data[place + 3 * 188 :])
    with pytest.raises(VideoError, match="is damaged"):
        read_clip(path, ALL, SIZE)


def test_timestamps_of_a_clip_without_any_are_those_of_its_rate(tmp_path: Path) -> None:
    path = write_clip(tmp_path / "clip.h264", 30)
    with av.open(str(path)) as container:
        rate = container.streams.video[0].average_rate
    clip = read_clip(path, FrameSampling(frames=30), SIZE)
    assert frame_numbers(clip.frames) == list(range(30))
    assert clip.times == pytest.approx(tuple(np.arange(30) / float(rate or Fraction(25))))


@pytest.mark.parametrize(
    ("codec", "name", "options"),
    [
        ("libx264", "joined.ts", {"bf": "3"}),
        ("mpeg2video", "joined.ts", {"bf": "2", "g": "12"}),
        ("mpeg2video", "joined.mpg", {"bf": "2", "g": "12"}),
        ("mpeg1video", "joined.mpg", {"bf": "2", "g": "12"}),
    ],
)
def test_joined_files_with_b_frames_are_of_even_times(
    tmp_path: Path, codec: str, name: str, options: dict[str, str]
) -> None:
    path = tmp_path / name
    parts = []
    for count in (24, 30, 12, 40):
        part = tmp_path / f"{count}{name[-4:]}"
        write_clip(part, count, fps=25, codec=codec, options=options)
        parts.append(part.read_bytes())
    path.write_bytes(b"".join(parts))
    numbers, duration = read_all(path)
    assert numbers == [*range(24), *range(30), *range(12), *range(40)]
    assert duration == pytest.approx(106 / 25)


@pytest.mark.parametrize("tick", range(8, 36, 3))
def test_a_transport_stream_torn_between_frames_is_refused(tmp_path: Path, tick: int) -> None:
    """The decoder conceals what is missing; only a counter and the times show the hole."""
    path = write_clip(tmp_path / "clip.ts", textured(40), options={"g": "40", "bf": "3"})
    data = path.read_bytes()
    place = len(data) // 188 * tick // 40 * 188
    path.write_bytes(data[:place] + data[place + 10 * 188 :])
    for read in (lambda: read_clip(path, ALL, SIZE), lambda: check_clip(path)):
        with pytest.raises(VideoError, match="is damaged"):
            read()
    clip = read_clip(path, ALL, SIZE, allow_damaged=True)
    assert len(clip.frames) < 40
    assert "is damaged" in clip.notes[0]


# Empty chunks of AVI


def with_empty_chunks(path: Path, places: list[int], total: int) -> Path:
    """Rewrites an AVI file so that its chunks are at these places and all others are empty."""
    data = path.read_bytes()
    movi = data.index(b"movi")
    header, place, end = bytearray(data[: movi - 8]), movi + 4, data.index(b"idx1")
    chunks = []
    while place < end:
        size = int.from_bytes(data[place + 4 : place + 8], "little")
        chunks.append(data[place + 8 : place + 8 + size])
        place += 8 + size + size % 2
    chunks = [chunk for chunk in chunks if chunk]
    body, index = b"movi", b""
    for number in range(total):
        chunk = chunks[places.index(number)] if number in places else b""
        index += struct.pack("<4sIII", b"00dc", 0x10 * (number == places[0]), len(body), len(chunk))
        body += struct.pack("<4sI", b"00dc", len(chunk)) + chunk + b"\0" * (len(chunk) % 2)
    for name, offset in ((b"avih", 24), (b"strh", 40)):
        start = header.index(name) + offset
        header[start : start + 4] = struct.pack("<I", total)
    lists = struct.pack("<4sI", b"LIST", len(body)) + body
    lists += struct.pack("<4sI", b"idx1", len(index)) + index
    header[4:8] = struct.pack("<I", len(header) + len(lists) - 8)
    path.write_bytes(bytes(header) + lists)
    return path


@pytest.mark.parametrize("codec", ["mpeg4", "libx264", "mjpeg"])
@pytest.mark.parametrize(
    ("places", "total"),
    [
        ([*range(5, 15)], 15),
        ([*range(10)], 18),
        ([*range(3, 13)], 21),
        ([*range(0, 20, 2)], 20),
        ([0, 1, 2, 3, 8, 9, 10, 11, 12, 13], 14),
    ],
    ids=["start", "end", "both", "every second", "middle"],
)
def test_empty_chunks_keep_the_picture_before_on_screen(
    tmp_path: Path, codec: str, places: list[int], total: int
) -> None:
    pix_fmt = "yuvj420p" if codec == "mjpeg" else "yuv420p"
    options = {"bf": "0"} if codec == "libx264" else {}
    path = write_clip(tmp_path / "clip.avi", 10, codec=codec, pix_fmt=pix_fmt, options=options)
    with_empty_chunks(path, places, total)
    check_clip(path)
    clip = read_clip(path, FrameSampling(10), SIZE)
    assert frame_numbers(clip.frames) == list(range(10))
    starts = [place - places[0] for place in places]
    assert clip.times == pytest.approx([start / 10 for start in starts])
    assert clip.duration == pytest.approx((total - places[0]) / 10)
    is_even = len(set(np.diff(places).tolist())) == 1
    assert len(clip.notes) == (0 if is_even else 1)
    assert is_even or "unevenly spaced" in clip.notes[0]


def test_an_avi_that_is_cut_is_said_to_lack_frames(tmp_path: Path) -> None:
    path = write_clip(tmp_path / "clip.avi", textured(30), codec="mjpeg", pix_fmt="yuvj420p")
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    notes = read_clip(path, FrameSampling(2), SIZE, allow_damaged=True).notes
    assert any("its header promises 30 frames" in note for note in notes)
