"""Timestamps decide when a frame is shown; what a header says about the rate is only a guess."""

from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.clips import frame_numbers, write_clip
from support.ffmpeg import ffmpeg, ffmpeg_frames

from dycoke_jax.inputs import (
    FrameSampling,
    count_frames,
    frame_indices,
    frame_times,
    read_clip,
)
from dycoke_jax.inputs.sampling import choose_frames, measure_timeline

SIZE = 64
ALL = FrameSampling(frames=1000, fps=1000.0)
PAUSE = [*range(0, 2000, 100), *range(11000, 13000, 100)]  # milliseconds: a pause of nine seconds
BROWSER = [0, 1, 34, 67, 117, 150, 250, 350, 417, 450, 1483, 1533, 2600, 2683, 3750, 3800, 4833]


def timed_clip(path: Path, milliseconds: list[int], codec: str = "libx264") -> Path:
    """Writes frames 0, 1, ... that are shown at the given times."""
    settings = {"bf": "0"} if codec == "libx264" else {"deadline": "realtime", "cpu-used": "8"}
    plain = write_clip(
        path.with_name("plain.mkv"), len(milliseconds), codec=codec, options=settings
    )
    with av.open(str(plain)) as old, av.open(str(path), "w") as new:
        stream = new.add_stream_from_template(old.streams.video[0])
        stream.time_base = Fraction(1, 1000)
        packets = [packet for packet in old.demux(video=0) if packet.size]
        for packet, time in zip(packets, milliseconds, strict=True):
            packet.pts = packet.dts = time
            packet.time_base = Fraction(1, 1000)
            packet.duration = 0
            packet.stream = stream
            new.mux(packet)
    return path


def on_screen(starts: list[int], times: list[float]) -> list[int]:
    """The last frame that starts no later than each time; starts in milliseconds."""
    return [max(i for i, start in enumerate(starts) if start <= 1000 * time) for time in times]


@pytest.mark.parametrize(
    ("name", "starts", "codec"),
    [
        ("pause.mkv", PAUSE, "libx264"),
        ("pause.mp4", PAUSE, "libx264"),
        ("pause.flv", PAUSE, "libx264"),
        ("pause.mov", PAUSE, "libx264"),
        ("pause.nut", PAUSE, "libx264"),
        ("browser.webm", BROWSER, "libvpx"),
        ("browser.mkv", BROWSER, "libx264"),
        ("browser.mp4", BROWSER, "libx264"),
    ],
)
def test_of_uneven_times_the_frames_on_screen_are_taken(
    tmp_path: Path, name: str, starts: list[int], codec: str
) -> None:
    path = timed_clip(tmp_path / name, starts, codec)
    for fps in (1.0, 2.0):
        clip = read_clip(path, FrameSampling(frames=64, fps=fps), SIZE)
        times = [k / fps for k in range(100) if k / fps < clip.duration - 1e-6]
        assert list(clip.times) == times
        assert frame_numbers(clip.frames) == on_screen(starts, times)
        assert starts[-1] / 1000 < clip.duration < starts[-1] / 1000 + 0.5
        assert len(clip.notes) == 1
        assert "unevenly spaced" in clip.notes[0]


def test_uneven_times_agree_with_ffmpeg_at_a_constant_rate(tmp_path: Path) -> None:
    path = timed_clip(tmp_path / "clip.mkv", PAUSE)
    # Without rounding to the nearest: what is on screen at 0, 1, 2, ... seconds.
    one = tmp_path / "one.mkv"
    ffmpeg("-i", path, "-vf", "fps=1:round=up", "-c:v", "ffv1", one)
    expected = frame_numbers(ffmpeg_frames(one))
    clip = read_clip(path, FrameSampling(frames=64, fps=1.0), SIZE)
    assert frame_numbers(clip.frames)[: len(expected)] == expected
    assert len(clip.frames) - len(expected) in (0, 1)


@pytest.mark.parametrize("name", ["pause.mkv", "pause.mp4"])
def test_uneven_clips_are_spread_by_index_with_true_times(tmp_path: Path, name: str) -> None:
    path = timed_clip(tmp_path / name, PAUSE)
    clip = read_clip(path, FrameSampling(frames=4), SIZE)
    assert frame_numbers(clip.frames) == [0, 13, 26, 39]
    assert clip.times == pytest.approx((0.0, 1.3, 11.6, 12.9))
    # A rate that would give too many frames spreads them too.
    many = read_clip(path, FrameSampling(frames=4, fps=1.0), SIZE)
    np.testing.assert_array_equal(many.frames, clip.frames)
    assert many.times == clip.times


def test_no_frame_of_an_uneven_clip_is_repeated_to_reach_a_high_rate(tmp_path: Path) -> None:
    path = timed_clip(tmp_path / "clip.mkv", BROWSER)
    assert frame_numbers(read_clip(path, ALL, SIZE).frames) == list(range(len(BROWSER)))


@pytest.mark.parametrize(
    ("name", "fps", "settings"),
    [
        ("clip.mkv", 30, {}),
        ("clip.mkv", 24, {}),
        ("clip.mkv", 60, {}),
        ("clip.flv", 25, {}),
        ("clip.flv", 30, {}),
        ("clip.webm", 30, {"codec": "libvpx"}),
        ("clip.mp4", 30, {}),
        ("clip.ts", 24, {}),
        ("clip.avi", 25, {"codec": "mpeg4"}),
        ("clip.avi", 25, {}),
        ("clip.gif", 30, {"codec": "gif", "pix_fmt": "rgb8"}),
    ],
)
def test_even_times_in_whole_ticks_count_as_even(
    tmp_path: Path, name: str, fps: int, settings: dict[str, str]
) -> None:
    """Matroska and FLV count milliseconds, so 30 frames a second come at 0, 33, 67, 100, ..."""
    path = write_clip(tmp_path / name, 70, fps=fps, **settings)  # type: ignore[arg-type]
    clip = read_clip(path, FrameSampling(frames=64, fps=1.0), SIZE)
    assert frame_numbers(clip.frames) == list(range(0, 70, fps))
    assert clip.times == tuple(range(len(clip.frames)))
    assert clip.notes == ()
    assert clip.duration == pytest.approx(70 / fps, abs=0.02)


@pytest.mark.parametrize("name", ["clip.mkv", "clip.flv", "clip.mp4"])
def test_a_false_rate_in_the_header_does_not_matter(tmp_path: Path, name: str) -> None:
    """FFmpeg guesses 1000 frames a second where a file does not tell how long a frame lasts."""
    path = timed_clip(tmp_path / name, list(range(0, 4000, 40)))
    clip = read_clip(path, FrameSampling(frames=64, fps=1.0), SIZE)
    assert frame_numbers(clip.frames) == [0, 25, 50, 75]
    assert clip.times == (0.0, 1.0, 2.0, 3.0)
    assert clip.duration == pytest.approx(4.0, abs=0.05)
    assert clip.notes == ()


def test_a_late_start_does_not_shift_the_times(tmp_path: Path) -> None:
    path = timed_clip(tmp_path / "clip.mkv", [5000 + time for time in PAUSE])
    clip = read_clip(path, FrameSampling(frames=64, fps=1.0), SIZE)
    assert frame_numbers(clip.frames)[:3] == [0, 10, 19]
    assert clip.times[:3] == (0.0, 1.0, 2.0)


# Timelines


@given(
    st.integers(2, 400),
    st.sampled_from([5, 10, 12, 15, 23.976, 24, 25, 29.97, 30, 50, 59.94, 60, 120]),
    st.sampled_from([Fraction(1, 1000), Fraction(1, 600), Fraction(1, 90000), Fraction(1, 15360)]),
    st.sampled_from([np.round, np.floor]),
)
def test_rounded_timestamps_of_a_constant_rate_are_even(
    total: int, rate: float, tick: Fraction, rounding: np.ufunc
) -> None:
    ticks = rounding(np.arange(total) / rate / float(tick) + 1e-9).astype(np.int64)
    timeline = measure_timeline(ticks, int(ticks[-1]), tick, [rate])
    assert timeline.rate == rate
    for sampling in (FrameSampling(8), FrameSampling(64, 1.0), FrameSampling(4, 2.0)):
        indices, times = choose_frames(timeline, sampling)
        np.testing.assert_array_equal(indices, frame_indices(total, rate, sampling))
        assert times == frame_times(total, rate, sampling)


@given(st.lists(st.integers(1, 3000), min_size=1, max_size=60), st.floats(0.2, 5.0))
def test_sampling_by_time_takes_what_is_on_screen(steps: list[int], fps: float) -> None:
    ticks = np.cumsum([0, 7, 3000, *steps])
    end = int(ticks[-1]) + 500
    timeline = measure_timeline(ticks, end, Fraction(1, 1000), [])
    assert timeline.rate is None
    indices, times = choose_frames(timeline, FrameSampling(10_000, fps))
    assert times == tuple(k / fps for k in range(len(times)))
    assert len(times) / fps >= timeline.duration - 1e-5 > times[-1]
    expected = [max(i for i, t in enumerate(ticks) if t / 1000 <= time + 1e-6) for time in times]
    assert indices.tolist() == expected


def test_a_missing_frame_in_coarse_ticks_is_seen() -> None:
    """AVI counts frames: 0, 1, 2, 3, 5, 6 is a clip in which one is missing."""
    ticks = np.array([0, 1, 2, 3, 5, 6])
    assert measure_timeline(ticks, 7, Fraction(1, 10), [10.0]).rate is None
    assert measure_timeline(np.arange(6), 6, Fraction(1, 10), [10.0]).rate == 10.0


@pytest.mark.parametrize("name", ["pause.mkv", "even.mp4"])
def test_frames_are_counted_as_they_are_read(tmp_path: Path, name: str) -> None:
    starts = PAUSE if name == "pause.mkv" else list(range(0, 4000, 100))
    path = timed_clip(tmp_path / name, starts)
    for sampling in (FrameSampling(5), FrameSampling(64, fps=1.0), FrameSampling(6, fps=3.0)):
        assert count_frames(path, sampling) == len(read_clip(path, sampling, SIZE).frames)


@pytest.mark.parametrize("name", ["clip.mp4", "clip.mkv"])
def test_a_last_picture_that_stays_is_part_of_the_duration(tmp_path: Path, name: str) -> None:
    plain = write_clip(tmp_path / "plain.mp4", 20, options={"bf": "0"})
    path = tmp_path / name
    with av.open(str(plain)) as old, av.open(str(path), "w") as new:
        stream = new.add_stream_from_template(old.streams.video[0])
        packets = [packet for packet in old.demux(video=0) if packet.size]
        packets[-1].duration = 31 * packets[0].duration
        for packet in packets:
            packet.stream = stream
            new.mux(packet)
    clip = read_clip(path, FrameSampling(20), SIZE)
    assert clip.times == pytest.approx(tuple(np.arange(20) / 10))
    assert clip.duration == pytest.approx(5.0)
