"""Chooses which frames of a clip are used, from their number and their times."""

from dataclasses import dataclass, replace
from fractions import Fraction
from numbers import Real

import numpy as np
from jaxtyping import Float, Int

from dycoke_jax import checks
from dycoke_jax.errors import ConfigError, VideoError


@dataclass(frozen=True)
class FrameSampling:
    """Which frames of a clip are sampled as model input.

    Attributes:
        frames: number of frames, at least 1, spread evenly over the clip, with its first and its
            last frame among them, as LLaVA-OneVision does; a shorter clip repeats some. With
            ``fps``, the maximum number.
        fps: frames a second, above 0, as LLaVA-Video samples them; where that would be more than
            ``frames`` frames, ``frames`` are spread evenly. Without it, ``frames`` alone decides.

    Raises:
        ConfigError: naming the setting and its range.
    """

    frames: int = 32
    fps: float | None = None

    def __post_init__(self) -> None:
        """Checks the types and ranges of the settings."""
        allowed = "be at least 1, since one frame is needed"
        frames = checks.whole_number("frames", self.frames, 1, allowed=allowed)
        object.__setattr__(self, "frames", frames)
        if self.fps is not None:
            if isinstance(self.fps, Real) and not 0 < self.fps < float("inf"):
                raise ConfigError(f"fps is {self.fps}; a number above 0 is needed")
            object.__setattr__(self, "fps", checks.number("fps", self.fps, 0, with_low=False))


_MOST_FRAMES = 10**8
"""More are surely too many for any memory, and too many for NumPy in the end."""
_LONG = 0.5
"""Seconds; less is often only a false rate in the header, by which FFmpeg guesses a duration."""


@dataclass(frozen=True, eq=False)
class Timeline:
    """When each frame of a clip is on screen.

    Attributes:
        starts: seconds from the first frame to each frame, in ascending order; at least one.
        duration: seconds from the first frame to the end of the last.
        rate: frames a second, if the times are even; None if they are uneven.
    """

    starts: Float[np.ndarray, "frames"]
    duration: float
    rate: float | None

    @property
    def total(self) -> int:
        """Number of frames of the clip."""
        return len(self.starts)

    def notes(self, name: str) -> tuple[str, ...]:
        """Returns a note on a clip of this name if its times are uneven, otherwise nothing."""
        if self.rate is not None:
            return ()
        uneven = "its frames are unevenly spaced in time, so frames are chosen by their timestamps"
        return (f"{name}: {uneven}",)


def even_timeline(total: int, rate: float) -> Timeline:
    """Returns the timeline of ``total`` frames, at least 1, at ``rate`` frames a second."""
    return Timeline(np.arange(total) / rate, total / rate, rate)


def measure_timeline(
    ticks: Int[np.ndarray, "frames"], end: int, tick: Fraction, header_rates: list[float]
) -> Timeline:
    """Returns the timeline that timestamps give.

    They count as even if they are those of a constant rate, each rounded to a tick. The reference
    computes with the header's rate, so that comes first if the timestamps agree with it.

    Args:
        ticks: timestamp of each frame, in ascending order; at least one.
        end: timestamp of the end of the last frame; not above the last timestamp if unknown.
        tick: unit of the timestamps, in seconds.
        header_rates: frame rates that the file's header suggests, in frames a second, the
            preferred one first. They may be wrong.
    """
    total = len(ticks)
    if total == 1 or ticks[-1] == ticks[0]:
        seconds = float((end - int(ticks[0])) * tick)
        rate = header_rates[0] if header_rates else total / seconds if seconds > 0 else 1.0
        return even_timeline(total, rate)
    starts = (ticks - ticks[0]) * float(tick)
    measured = (total - 1) / float(starts[-1])
    for rate in _candidates(measured, header_rates, int(ticks[1] - ticks[0]) * tick):
        if _is_even(ticks, 1 / (rate * float(tick))):
            even = even_timeline(total, rate)
            seconds = float((end - int(ticks[0])) * tick)
            # The last picture may stay on screen for longer than the others.
            is_longer = seconds > even.duration + max(1 / rate, _LONG)
            return replace(even, duration=seconds) if is_longer else even
    last = float((end - int(ticks[-1])) * tick)
    if last <= 0:
        last = float(np.median(np.diff(starts)))
    return Timeline(starts, float(starts[-1]) + last, None)


def _candidates(measured: float, header_rates: list[float], first_step: Fraction) -> list[float]:
    """Returns the constant rates that timestamps of a measured mean rate may have."""
    halves = max(1, round(2 * measured)) / 2
    ntsc = max(1, round(2.002 * measured)) / 2.002
    constant = [float(1 / first_step)] if first_step > 0 else []
    return [*header_rates, *constant, halves, ntsc]


def _is_even(ticks: Int[np.ndarray, "frames"], step: float) -> bool:
    """Whether timestamps are multiples of a step in ticks, each rounded.

    Rounding moves a timestamp by less than a tick, and a second rounding, to the unit of another
    container, by as much again. Where a frame lasts only a few ticks, so much tolerance would hide
    a missing frame, and less is allowed.
    """
    offsets = (ticks - ticks[0]) - np.arange(len(ticks)) * step
    return bool(np.ptp(offsets) < min(2.0, max(1.0, step / 10), step / 2))


def choose_frames(
    timeline: Timeline, sampling: FrameSampling
) -> tuple[Int[np.ndarray, "F"], tuple[float, ...]]:
    """Returns the indices of the frames to sample and their times in seconds.

    Where the times are even, these are :func:`frame_indices` and :func:`frame_times`, which equal
    the reference's. Where they are uneven, sampling at ``sampling.fps`` takes the frames that are
    on screen at 0, 1/fps, 2/fps, ... seconds, and gives them these times; sampling a number of
    frames spreads them evenly over the indices and gives them their true times.
    """
    if timeline.rate is not None:
        arguments = timeline.total, timeline.rate, sampling
        return frame_indices(*arguments), frame_times(*arguments)
    frames = sampling.frames
    if sampling.fps is not None:
        # Timestamps in floating point: a frame that starts at k / fps is on screen at k / fps.
        tolerance = 1e-6
        if (timeline.duration - tolerance) * sampling.fps <= frames:
            count = max(1, int(np.ceil((timeline.duration - tolerance) * sampling.fps)))
            moments = np.arange(count) / sampling.fps
            indices = np.searchsorted(timeline.starts, moments + tolerance, side="right") - 1
            return indices, tuple(moments.tolist())
        frames = min(frames, timeline.total)
    indices = _spread(timeline.total, frames)
    return indices, tuple(timeline.starts[indices].tolist())


def frame_indices(total: int, average_fps: float, sampling: FrameSampling) -> Int[np.ndarray, "F"]:
    """Returns the indices of the frames to sample from a clip of even times.

    They equal those of ``load_video`` (LLaVA-OneVision) and ``process_video_with_decord``
    (LLaVA-Video) of the reference.

    Args:
        total: number of frames of the clip, at least 1.
        average_fps: the clip's average frame rate, in frames a second.
        sampling: which frames to sample.

    Returns:
        int64 indices in [0, total), in ascending order: ``sampling.frames`` of them if
        ``sampling.fps`` is None, otherwise at most that many. Short clips repeat some.

    Raises:
        VideoError: if ``total`` is below 1.
    """
    if total < 1:
        raise VideoError("a clip without frames has none to choose from")
    step = _fps_step(total, average_fps, sampling)
    if step is not None:
        return np.arange(0, total, step)
    return _spread(total, sampling.frames)


def _spread(total: int, frames: int) -> Int[np.ndarray, "F"]:
    """Returns indices that are spread evenly, from the first to the last."""
    if frames > _MOST_FRAMES:
        raise VideoError(f"{frames} frames do not fit in memory; sample fewer")
    return np.linspace(0, total - 1, frames, dtype=int)


def frame_times(total: int, average_fps: float, sampling: FrameSampling) -> tuple[float, ...]:
    """Returns the times in seconds of the frames that :func:`frame_indices` selects.

    Frames sampled at ``sampling.fps`` get their nominal times, 0, 1/fps, 2/fps, ... These differ
    slightly from the true times, for instance in a clip of 29.97 frames a second, but the reference
    computes them in this way and LLaVA-Video was trained on them.
    """
    indices = frame_indices(total, average_fps, sampling)
    step = _fps_step(total, average_fps, sampling)
    if step is None or sampling.fps is None:
        return tuple((indices / average_fps).tolist())
    return tuple((indices / (step * sampling.fps)).tolist())


def _fps_step(total: int, average_fps: float, sampling: FrameSampling) -> int | None:
    """Returns the index step of sampling at ``sampling.fps``; None for even sampling."""
    if sampling.fps is None:
        return None
    # A step beyond the end takes the first frame alone; the quotient may be infinite.
    step = max(1, round(min(average_fps / sampling.fps, total)))
    return step if len(range(0, total, step)) <= sampling.frames else None
