"""A damaged file has one outcome: how the threads of a decoder run decides nothing."""

import os
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from support.clips import cut, real_clip, textured, write_clip
from support.ffmpeg import ffmpeg

from dycoke_jax.errors import VideoError
from dycoke_jax.inputs import FrameSampling, read_clip, video
from dycoke_jax.inputs.container import find_source
from dycoke_jax.inputs.decoding import pick_in_order
from dycoke_jax.inputs.scan import scan

READS = 20
SIZE = 16
FAST = {"cpu-used": "8", "deadline": "realtime"}
KINDS: dict[str, dict[str, Any]] = {
    "h264.mp4": {"muxer": {"movflags": "faststart"}},
    "h264.ts": {},
    "h264.mkv": {},
    "mpeg4.avi": {"codec": "mpeg4", "options": {"b": "4000k", "bf": "2"}},
    "vp9.webm": {"codec": "libvpx-vp9", "options": FAST},
    "mpeg2.mpg": {"codec": "mpeg2video", "fps": 25, "options": {"b": "4000k", "bf": "2"}},
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("whole")
    return {
        name: write_clip(folder / name, textured(20), **settings)
        for name, settings in KINDS.items()
    }


def copy(path: Path, folder: Path) -> Path:
    new = folder / path.name
    new.write_bytes(path.read_bytes())
    return new


def outcome(path: Path, sampling: FrameSampling) -> tuple[object, ...]:
    """What a caller sees of reading a file."""
    try:
        clip = read_clip(path, sampling, SIZE)
    except VideoError as error:
        return ("refused", str(error))
    return ("read", clip.notes, clip.duration, clip.times, clip.frames.tobytes())


def only_outcome(path: Path) -> tuple[object, ...]:
    """The outcome of reading a file many times, which is the same each time."""
    outcomes = {outcome(path, FrameSampling(frames=4)) for _ in range(READS)}
    assert len(outcomes) == 1
    return outcomes.pop()


def plain_faults(path: Path) -> int:
    """Errors and corrupt frames that PyAV reports when a single thread decodes a file."""
    faults = 0
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        stream.thread_type = "NONE"
        for packet in container.demux(stream):
            if packet.is_corrupt:  # torn, and the last one: our reader leaves it out
                continue
            try:
                faults += sum(frame.is_corrupt for frame in packet.decode())
            except av.FFmpegError:
                faults += 1
    return faults


@pytest.mark.parametrize("name", KINDS)
def test_a_whole_clip_is_read_without_a_note(whole: dict[str, Path], name: str) -> None:
    result = only_outcome(whole[name])
    assert result[:2] == ("read", ())


@pytest.mark.parametrize("share", [0.45, 0.6, 0.9])
@pytest.mark.parametrize("name", KINDS)
def test_a_cut_clip_has_one_outcome_and_is_not_taken_for_whole(
    whole: dict[str, Path], tmp_path: Path, name: str, share: float
) -> None:
    path = cut(copy(whole[name], tmp_path), share)
    result = only_outcome(path)
    if name.endswith(".mp4"):
        assert "is cut: " in str(result[1])
    elif name.endswith((".ts", ".mpg")):  # without a header that says how much there should be
        assert (result[0] == "refused") == (plain_faults(path) > 0)
    elif scan(find_source(path)).total < 18:
        assert result[0] == "read"
        assert "its header " in str(result[1])


@pytest.mark.parametrize("place", [0.45, 0.97])
@pytest.mark.parametrize("name", ["h264.mkv", "mpeg4.avi"])
def test_a_clip_with_noise_inside_is_refused_if_a_single_thread_finds_a_fault(
    whole: dict[str, Path], tmp_path: Path, name: str, place: float
) -> None:
    path = copy(whole[name], tmp_path)
    data = bytearray(path.read_bytes())
    start = int(len(data) * place)
    data[start : start + 40] = np.random.default_rng(0).bytes(len(data[start : start + 40]))
    path.write_bytes(data)
    result = only_outcome(path)
    assert (result[0] == "refused") == (plain_faults(path) > 0)


@pytest.mark.parametrize("b_frames", ["0", "2"])
@pytest.mark.parametrize("name", ["clip.ts", "clip.mkv"])
def test_threads_find_the_faults_of_a_single_thread(
    tmp_path: Path, name: str, b_frames: str
) -> None:
    options = {"bf": b_frames, "b-pyramid": "normal", "g": "8"}
    path = write_clip(tmp_path / name, textured(30), options=options)
    data = bytearray(path.read_bytes())
    for start in np.linspace(0.2, 0.98, 6) * len(data):
        data[int(start)] ^= 0xFF
    path.write_bytes(data)
    source = find_source(path)
    packets = len(scan(source).packets)
    expected = plain_faults(path)
    assert expected
    for _ in range(READS):
        picked = pick_in_order(source, np.arange(30), SIZE, packets=packets)
        assert picked.faults == expected


def test_the_threads_of_the_decoder_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    def most_threads() -> int:
        counts = []
        read_clip(
            real_clip(),
            FrameSampling(frames=132),
            SIZE,
            progress=lambda *_: counts.append(len(os.listdir("/proc/self/task"))),
        )
        return max(counts)

    several = most_threads()
    monkeypatch.setattr(video, "MOST_REORDERED", -1)
    assert several > most_threads()


def test_a_clip_is_the_same_if_a_single_thread_reads_it(monkeypatch: pytest.MonkeyPatch) -> None:
    sampling = FrameSampling(frames=132)
    several = outcome(real_clip(), sampling)
    monkeypatch.setattr(video, "MOST_REORDERED", -1)
    assert outcome(real_clip(), sampling) == several


@pytest.mark.parametrize("b_frames", ["0", "1", "3"])
def test_reordering_is_how_many_frames_are_decoded_before_and_shown_after(
    tmp_path: Path, b_frames: str
) -> None:
    options = {"bf": b_frames, "b-pyramid": "normal", "b_strategy": "0"}
    path = write_clip(tmp_path / "clip.mkv", 30, options=options)
    with av.open(str(path)) as container:
        pts = [packet.pts for packet in container.demux(video=0) if packet.pts is not None]
    brute = max(sum(before > own for before in pts[:i]) for i, own in enumerate(pts))
    assert scan(find_source(path)).reordering == brute
    assert brute == {"0": 0, "1": 1, "3": 2}[b_frames]


def with_sound(path: Path, seconds: int) -> Path:
    """Copies a clip to Matroska and adds a sound that lasts longer."""
    new = path.with_name(f"{path.stem}_sound.mkv")
    sound = ("-f", "lavfi", "-t", seconds, "-i", "sine")
    ffmpeg("-i", path, *sound, "-c:v", "copy", "-c:a", "aac", new)
    return new


def test_a_longer_sound_is_no_sign_that_frames_are_missing(tmp_path: Path) -> None:
    path = with_sound(write_clip(tmp_path / "clip.mkv", 20), 6)
    assert read_clip(path, FrameSampling(frames=4), SIZE).notes == ()


def test_a_short_matroska_clip_with_sound_says_what_its_header_promised(tmp_path: Path) -> None:
    path = cut(with_sound(write_clip(tmp_path / "clip.mkv", textured(20)), 2), 0.5)
    (note,) = read_clip(path, FrameSampling(frames=4), SIZE).notes
    assert "its header says 2.0 s, the frames end after" in note


def test_the_length_of_a_copied_tag_is_not_believed_beyond_that_of_the_file(
    tmp_path: Path,
) -> None:
    path = write_clip(tmp_path / "clip.mkv", 20)
    data = path.read_bytes()
    assert data.count(b"00:00:02.000000000") == 1
    path.write_bytes(data.replace(b"00:00:02.000000000", b"00:09:02.000000000"))
    assert read_clip(path, FrameSampling(frames=4), SIZE).notes == ()


def test_a_last_frame_that_may_stay_as_long_as_others_is_no_sign_of_a_cut(tmp_path: Path) -> None:
    still = tmp_path / "still.mkv"
    pause = "setpts='if(lt(N,10),PTS,PTS+1.5/TB)'"
    clip = write_clip(tmp_path / "clip.mkv", 11)
    ffmpeg("-i", clip, "-vf", pause, "-fps_mode", "vfr", still)
    data = still.read_bytes()
    assert data.count(b"00:00:02.600000000") == 1
    assert not any("header" in note for note in read_clip(still, FrameSampling(4), SIZE).notes)
