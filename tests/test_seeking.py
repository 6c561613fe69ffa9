"""Seeking gives the frames that decoding in order gives, bit for bit, or is not used."""

from pathlib import Path

import av
import numpy as np
import pytest
from support.clips import cut, frame_numbers, real_clip, scramble, textured, write_clip
from support.ffmpeg import ffmpeg, ffmpeg_frames

from dycoke_jax.errors import VideoError
from dycoke_jax.inputs import FrameSampling, read_clip, seeking
from dycoke_jax.inputs.container import find_source
from dycoke_jax.inputs.decoding import pick_in_order
from dycoke_jax.inputs.entry_points import is_referenced
from dycoke_jax.inputs.scan import scan
from dycoke_jax.inputs.seeking import pick_by_seeking, plan_seeks

SIZE = 64
DATA = Path(__file__).parent / "data"
FRAMES = 60
MD5 = ("-f", "framemd5", "-")
WANTED = [0, 4, 33, 34, 47, 58]
H264 = {"g": "10", "keyint_min": "10", "sc_threshold": "0"}
X265 = "keyint=10:min-keyint=10:scenecut=0:bframes=3:log-level=none"
REALTIME = {"g": "10", "cpu-used": "8", "deadline": "realtime"}

SOUGHT = {
    "clip.mp4": {"options": H264 | {"bf": "0"}},
    "bframes.mp4": {"options": H264 | {"bf": "3"}},
    "fast.mp4": {"options": H264, "muxer": {"movflags": "faststart"}},
    "fragments.mp4": {"options": H264, "muxer": {"movflags": "frag_keyframe+empty_moov"}},
    "clip.mov": {"options": H264},
    "clip.3gp": {"options": H264},
    "clip.mkv": {"options": H264 | {"bf": "3"}},
    "clip.ts": {"options": H264 | {"bf": "3"}},
    "clip.flv": {"options": H264 | {"bf": "3"}},
    "clip.avi": {"options": H264 | {"bf": "0"}},
    "hevc.mp4": {"codec": "libx265", "options": {"x265-params": f"{X265}:open-gop=0"}},
    "hevc.mkv": {"codec": "libx265", "options": {"x265-params": f"{X265}:open-gop=0"}},
    "vp9.webm": {"codec": "libvpx-vp9", "options": REALTIME},
    "vp9.mp4": {"codec": "libvpx-vp9", "options": REALTIME},
    "vp8.webm": {"codec": "libvpx", "options": REALTIME | {"auto-alt-ref": "0"}},
    "mpeg2.ts": {"codec": "mpeg2video", "fps": 25, "options": {"g": "10", "bf": "0"}},
    "mjpeg.mov": {"codec": "mjpeg", "pix_fmt": "yuvj420p"},
    "ffv1.mkv": {"codec": "ffv1", "options": {"g": "10"}},
}
"""Clips in which seeking is exact."""

OPEN = {"x264-params": "open-gop=1:keyint=10:min-keyint=10:scenecut=0:bframes=3:b-adapt=0"}
IN_ORDER = {
    "open.mp4": {"options": OPEN},
    "open.mkv": {"options": OPEN},
    "refresh.mp4": {"options": {"x264-params": "intra-refresh=1:keyint=10"}},
    "open_hevc.mkv": {"codec": "libx265", "options": {"x265-params": X265}},
    "one_key.mp4": {"options": {"g": "600", "sc_threshold": "0"}},
    "bframes.avi": {"options": H264 | {"bf": "3"}},
    "raw.h264": {"options": H264},
    "mpeg4.avi": {"codec": "mpeg4", "options": {"g": "10"}},
    "mpeg2_b.ts": {"codec": "mpeg2video", "fps": 25, "options": {"g": "12", "bf": "2"}},
}
"""Clips in which it is not, or not worth it."""


@pytest.fixture
def eager(monkeypatch: pytest.MonkeyPatch) -> None:
    """Seeking counts as worth it however few frames it saves."""
    monkeypatch.setattr(seeking, "_LEAST_SAVED", 10)
    monkeypatch.setattr(seeking, "_SEEK_COST", 1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where clips are kept that several tests read."""
    return tmp_path_factory.mktemp("clips")


def write(path: Path, settings: dict[str, object]) -> Path:
    """Writes a clip, if it is not there yet."""
    if not path.exists():
        write_clip(path, textured(FRAMES), **settings)  # type: ignore[arg-type]
    return path


def same_without_seeking(path: Path, sampling: FrameSampling, patch: pytest.MonkeyPatch) -> None:
    clip = read_clip(path, sampling, SIZE)
    with patch.context() as patched:
        patched.setattr(seeking, "_LEAST_SAVED", 10**9)
        plain = read_clip(path, sampling, SIZE)
    np.testing.assert_array_equal(clip.frames, plain.frames)
    assert (clip.times, clip.duration) == (plain.times, plain.duration)
    assert clip.notes == plain.notes


@pytest.mark.usefixtures("eager")
@pytest.mark.parametrize("name", SOUGHT)
def test_seeking_gives_the_frames_of_decoding_in_order(folder: Path, name: str) -> None:
    source = find_source(write(folder / name, SOUGHT[name]))
    found = scan(source)
    stretches = plan_seeks(found, WANTED)
    assert stretches is not None
    assert len(stretches) >= 3
    in_order = pick_in_order(source, np.array(WANTED), SIZE, packets=len(found.packets))
    sought = pick_by_seeking(source, found, stretches, SIZE)
    assert sought is not None, "seeking gave up"
    np.testing.assert_array_equal(sought, in_order.frames)
    assert frame_numbers(sought) == WANTED


@pytest.mark.usefixtures("eager")
@pytest.mark.parametrize("name", [*SOUGHT, *IN_ORDER])
def test_a_clip_is_the_same_with_and_without_seeking(
    folder: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(folder / name, {**SOUGHT, **IN_ORDER}[name])
    for sampling in (FrameSampling(5), FrameSampling(64, fps=1.0), FrameSampling(1)):
        same_without_seeking(path, sampling, monkeypatch)


@pytest.mark.usefixtures("eager")
@pytest.mark.parametrize("name", IN_ORDER)
def test_where_seeking_is_not_exact_it_is_not_planned_or_gives_up(folder: Path, name: str) -> None:
    source = find_source(write(folder / name, IN_ORDER[name]))
    found = scan(source)
    stretches = plan_seeks(found, WANTED)
    if stretches is not None:
        sought = pick_by_seeking(source, found, stretches, SIZE)
        assert sought is None or frame_numbers(sought) == WANTED


@pytest.mark.usefixtures("eager")
@pytest.mark.parametrize("name", ["fields.ts", "not_coded.avi", "empty_chunks.avi", "bunny.mp4"])
def test_odd_and_real_files_are_the_same_with_and_without_seeking(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for sampling in (FrameSampling(3), FrameSampling(64, fps=5.0)):
        same_without_seeking(DATA / name, sampling, monkeypatch)


def test_a_long_clip_is_sought_and_equals_ffmpegs_frames(tmp_path: Path) -> None:
    pictures = (numbered for _ in range(15) for numbered in textured(50))
    path = write_clip(tmp_path / "clip.mp4", pictures, options={"g": "50"})
    seen: list[tuple[str, int, int]] = []
    clip = read_clip(path, FrameSampling(8), SIZE, progress=lambda *step: seen.append(step))
    assert seen == [("decoding frames", done, 8) for done in range(1, 9)], "not sought"
    indices = np.linspace(0, 749, 8, dtype=int)
    assert frame_numbers(clip.frames) == frame_numbers(ffmpeg_frames(path)[indices])
    assert clip.notes == ()


def test_a_short_clip_is_decoded_in_order() -> None:
    source = find_source(real_clip())
    assert plan_seeks(scan(source), [0, 60, 131]) is None


@pytest.mark.usefixtures("eager")
def test_damage_at_a_wanted_frame_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "clip.mp4", SOUGHT["fast.mp4"])
    scramble(path, 0.4, 0.7)
    with pytest.raises(VideoError, match="is damaged"):
        read_clip(path, FrameSampling(4), SIZE)


@pytest.mark.usefixtures("eager")
def test_a_cut_clip_is_refused(tmp_path: Path) -> None:
    path = cut(write(tmp_path / "clip.mp4", SOUGHT["fast.mp4"]), 0.5)
    with pytest.raises(VideoError, match="is cut"):
        read_clip(path, FrameSampling(4), SIZE)


@pytest.mark.usefixtures("eager")
def test_a_clip_in_memory_is_sought_too(tmp_path: Path) -> None:
    path = write(tmp_path / "clip.mp4", SOUGHT["bframes.mp4"])
    expected = read_clip(path, FrameSampling(3), SIZE)
    np.testing.assert_array_equal(
        read_clip(path.read_bytes(), FrameSampling(3), SIZE).frames, expected.frames
    )


@pytest.mark.parametrize("name", ["clip.mkv", "clip.mp4", "clip.ts"])
def test_frames_that_none_refers_to_are_those_that_ffmpeg_can_skip(
    tmp_path: Path, name: str
) -> None:
    path = write(tmp_path / name, {"options": H264 | {"bf": "3"}})
    with av.open(str(path)) as container:
        context = container.streams.video[0].codec_context
        packets = [packet for packet in container.demux(video=0) if packet.size]
        referenced = [is_referenced(packet, "h264", context.extradata) for packet in packets]
    skipping = ffmpeg("-skip_frame", "noref", "-i", path, "-fps_mode", "passthrough", *MD5)
    assert sum(referenced) == len([line for line in skipping.splitlines() if line[:1] != b"#"])
    assert 0.4 < np.mean(referenced) < 0.7


@pytest.mark.usefixtures("eager")
@pytest.mark.parametrize("name", ["open.mp4", "open.mkv", "open_hevc.mkv", "mpeg2_b.ts"])
def test_decoding_does_not_start_at_the_key_frame_of_an_open_group(folder: Path, name: str) -> None:
    """Frames that are shown before it follow it, so it is no place to start at."""
    found = scan(find_source(write(folder / name, IN_ORDER[name])))
    assert found.packets.is_key.sum() >= 4
    assert plan_seeks(found, WANTED) is None
