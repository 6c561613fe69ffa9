"""A clip is one file of a video format: which of its streams is read, and what it cannot reach."""

import io
from pathlib import Path

import av
import av.stream
import numpy as np
import pytest
from support.clips import frame_numbers, numbered_frame, real_clip, write_clip
from support.ffmpeg import ffmpeg, ffmpeg_frames

from dycoke_jax.errors import VideoError
from dycoke_jax.inputs import FrameSampling, check_clip, read_clip

SIZE = 64
ALL = FrameSampling(frames=1000, fps=1000.0)


def two_streams(path: Path, *, second_default: bool, sizes: tuple[int, int]) -> Path:
    """Two video streams: numbers 0..5 in the first, 20..25 in the second; widths in pixels."""
    kinds = av.stream.Disposition
    with av.open(str(path), "w") as container:
        streams = []
        for number, width in enumerate(sizes):
            stream = container.add_stream("libx264", rate=10)
            stream.height, stream.width, stream.pix_fmt = 64, width, "yuv420p"
            is_default = second_default == bool(number)
            stream.disposition = kinds.default if is_default else kinds(0)
            streams.append((stream, 20 * number, width))
        for index in range(6):
            for stream, first, width in streams:
                picture = numbered_frame(first + index, width=width)
                frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
                container.mux(stream.encode(frame))
        for stream, _, _ in streams:
            container.mux(stream.encode(None))
    return path


@pytest.mark.parametrize("second_default", [False, True])
@pytest.mark.parametrize("sizes", [(128, 256), (256, 128)])
@pytest.mark.parametrize("name", ["clip.mkv", "clip.mp4"])
def test_the_stream_that_ffmpeg_takes_is_read(
    tmp_path: Path, name: str, sizes: tuple[int, int], second_default: bool
) -> None:
    path = two_streams(tmp_path / name, second_default=second_default, sizes=sizes)
    numbers = frame_numbers(read_clip(path, ALL, SIZE).frames)
    assert numbers == frame_numbers(ffmpeg_frames(path))
    assert numbers[0] == (20 if second_default else 0)


def test_of_equal_streams_the_largest_is_read(tmp_path: Path) -> None:
    path = tmp_path / "clip.ts"  # marks none as the default one
    two_streams(path, second_default=False, sizes=(128, 256))
    numbers = frame_numbers(read_clip(path, ALL, SIZE).frames)
    assert numbers == frame_numbers(ffmpeg_frames(path))
    assert numbers[0] == 20


def test_a_cover_picture_before_the_video_is_left_aside(tmp_path: Path) -> None:
    path = tmp_path / "clip.mp4"
    kinds = av.stream.Disposition
    with av.open(str(path), "w") as container:
        cover = container.add_stream("mjpeg", rate=10)
        cover.height, cover.width, cover.pix_fmt = 256, 512, "yuvj420p"
        cover.disposition = kinds.attached_pic
        stream = container.add_stream("libx264", rate=10)
        stream.height, stream.width, stream.pix_fmt = 64, 128, "yuv420p"
        picture = numbered_frame(200, 256, 512)
        container.mux(cover.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(cover.encode(None))
        for number in range(5):
            frame = av.VideoFrame.from_ndarray(numbered_frame(number), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    assert frame_numbers(read_clip(path, ALL, SIZE).frames) == list(range(5))


# What a file may reach

CLIP = "clip.mp4"
SCRIPTS = {
    "concat": "ffconcat version 1.0\nfile clip.mp4\n",
    "concat of an absolute path": "ffconcat version 1.0\nfile '{folder}/clip.mp4'\n",
    "m3u8": "#EXTM3U\n#EXT-X-TARGETDURATION:3\n#EXTINF:2.4,\nclip.ts\n#EXT-X-ENDLIST\n",
    "m3u8 of absolute paths": (
        "#EXTM3U\n#EXT-X-TARGETDURATION:3\n#EXTINF:2.4,\n{folder}/clip.ts\n#EXT-X-ENDLIST\n"
    ),
    "m3u": "#EXTM3U\n#EXTINF:2,clip\n{folder}/clip.mp4\n",
    "sdp": "v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\n"
    "m=video 5004 RTP/AVP 96\na=rtpmap:96 H264/90000\n",
    "dash": '<?xml version="1.0"?><MPD xmlns="urn:mpeg:dash:schema:mpd:2011" type="static" '
    'profiles="urn:mpeg:dash:profile:isoff-main:2011"><Period><AdaptationSet><Representation '
    'id="0" bandwidth="1" mimeType="video/mp4"><BaseURL>clip.mp4</BaseURL></Representation>'
    "</AdaptationSet></Period></MPD>",
    "playlist of a player": "[playlist]\nFile1=clip.mp4\n",
}


@pytest.mark.parametrize("kind", SCRIPTS)
@pytest.mark.parametrize("name", ["list.mp4", "list.m3u8", "list.ffconcat", "list.mpd", "list.sdp"])
def test_a_script_or_playlist_is_refused_whatever_its_name(
    tmp_path: Path, kind: str, name: str
) -> None:
    write_clip(tmp_path / CLIP, 24)
    write_clip(tmp_path / "clip.ts", 24)
    path = tmp_path / name
    path.write_text(SCRIPTS[kind].format(folder=tmp_path))
    for given in (path, path.read_bytes() + b"\0"):
        for read in (lambda it: read_clip(it, ALL, SIZE), check_clip):
            with pytest.raises(VideoError, match="is not a video") as caught:
                read(given)
            assert "\n" not in str(caught.value)


def test_a_pattern_of_numbered_pictures_is_refused(tmp_path: Path) -> None:
    write_clip(tmp_path / "00%d.png", [numbered_frame(1)] * 2, codec="png", pix_fmt="rgb24")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["001.png", "002.png"]
    with pytest.raises(VideoError, match="no such file"):
        read_clip(tmp_path / "00%d.png", ALL, SIZE)


def test_a_movie_that_refers_to_another_file_does_not_open_it(tmp_path: Path) -> None:
    path = write_clip(tmp_path / "refers.mov", 3)
    data = path.read_bytes()
    # A data reference of type "alis" without the flag for "in this file".
    changed = data.replace(b"url \0\0\0\1", b"alis\0\0\0\0")
    changed = changed.replace(b"alis\0\0\0\1", b"alis\0\0\0\0")
    assert changed != data
    path.write_bytes(changed)
    assert frame_numbers(read_clip(path, ALL, SIZE).frames) == [0, 1, 2]


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("clip.mpg", {"codec": "mpeg2video", "fps": 25}),
        ("clip.flv", {}),
        ("clip.wmv", {"codec": "wmv2"}),
        ("clip.nut", {}),
        ("clip.mxf", {"codec": "mpeg2video", "fps": 25}),
        ("clip.ivf", {"codec": "libvpx"}),
        ("clip.h264", {}),
        ("clip.hevc", {"codec": "libx265", "options": {"x265-params": "log-level=none"}}),
        ("clip.y4m", {"codec": "wrapped_avframe"}),
        ("clip.mjpeg", {"codec": "mjpeg", "pix_fmt": "yuvj420p"}),
        ("clip.3gp", {}),
        ("clip.m2ts", {}),
    ],
)
def test_every_usual_video_format_is_allowed(
    tmp_path: Path, name: str, settings: dict[str, object]
) -> None:
    path = tmp_path / name
    source = write_clip(tmp_path / "source.mkv", 12)
    if settings.get("codec") == "wrapped_avframe":
        ffmpeg("-i", source, "-pix_fmt", "yuv420p", path)
    else:
        write_clip(path, 12, **settings)  # type: ignore[arg-type]
    assert frame_numbers(read_clip(path, ALL, SIZE).frames) == list(range(12))


# Bytes and open files


def test_a_clip_is_read_from_bytes_and_open_files_as_from_its_path() -> None:
    expected = read_clip(real_clip(), FrameSampling(5), SIZE)
    data = real_clip().read_bytes()
    with real_clip().open("rb") as opened:
        givens = [data, bytearray(data), memoryview(data), io.BytesIO(data), opened]
        givens.append(str(real_clip()).encode())
        for given in givens:
            clip = read_clip(given, FrameSampling(5), SIZE)
            np.testing.assert_array_equal(clip.frames, expected.frames)
            assert (clip.times, clip.duration) == (expected.times, expected.duration)
    check_clip(data)


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (b"", "empty"),
        (b"nowhere.mp4", "nowhere.mp4: no such file"),
        (b"no video\0", "is not a video"),
        (io.BytesIO(b""), "empty"),
        (io.StringIO("text"), "mode 'rb'"),
        ("a\0b.mp4", r"a\\x00b.mp4(: no such file| is no path)"),
        ("two\nlines.mp4", r"two\\nlines.mp4: no such file"),
        ("y" * 300, "cannot be opened|no such file"),
    ],
)
def test_bytes_files_and_paths_that_hold_no_clip(given: object, says: str) -> None:
    with pytest.raises(VideoError, match=says) as caught:
        read_clip(given, ALL, SIZE)  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)
