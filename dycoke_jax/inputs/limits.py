"""Limits of what reading one clip may take, so that no file can occupy a machine."""

import time
from dataclasses import dataclass

from dycoke_jax import checks
from dycoke_jax.errors import VideoError


def setting(name: str) -> str:
    """What messages call a limit: by its name here and by that of its option."""
    return f"DecodingLimits.{name} (--clip-{name})"


class LimitError(VideoError):
    """A clip that takes more than it may."""


@dataclass(frozen=True)
class DecodingLimits:
    """What reading one clip may take.

    Numbers of NumPy are converted to those of Python.

    Attributes:
        seconds: longest wall time for reading and decoding a clip, above 0.
        pixels: largest width times height of the frames of a clip as stored, at least 1; the
            default is that of a square of 8,192 pixels.
        frames: largest number of frames of a clip, sampled or not, at least 1; the default is that
            of 9 hours at 30 frames a second.
        megabytes: most memory, in millions of bytes, that reading a clip may take in a process of
            its own (``inputs.decoding_pool``), at least 1; without such a process it limits
            nothing.

    Raises:
        ConfigError: naming the setting and its range.
    """

    seconds: float = 600.0
    pixels: int = 2**26
    frames: int = 10**6
    megabytes: int = 4096

    def __post_init__(self) -> None:
        """Checks the types and ranges of the settings."""
        seconds = checks.number(setting("seconds"), self.seconds, 0, with_low=False)
        object.__setattr__(self, "seconds", seconds)
        for name in ("pixels", "frames", "megabytes"):
            number = checks.whole_number(setting(name), getattr(self, name), 1)
            object.__setattr__(self, name, number)


@dataclass(frozen=True)
class Watch:
    """The limits of a clip that is being read, with the time that is left.

    Attributes:
        limits: the limits.
        deadline: value of ``time.monotonic`` at which reading must be over.
    """

    limits: DecodingLimits = DecodingLimits()
    deadline: float = float("inf")

    @classmethod
    def begin(cls, limits: DecodingLimits) -> "Watch":
        """Begins to count the seconds."""
        return cls(limits, time.monotonic() + limits.seconds)

    def check_time(self, name: str) -> None:
        """Raises a LimitError that names the clip if its time is over."""
        if time.monotonic() > self.deadline:
            raise LimitError(too_slow(name, self.limits))

    def check_size(self, name: str, width: int, height: int) -> None:
        """Raises a LimitError that names the clip if its frames are too large."""
        if width * height > self.limits.pixels:
            raise LimitError(
                f"{name} has frames of {width}x{height} pixels, more than the limit of "
                f"{self.limits.pixels} pixels; make them smaller, or raise {setting('pixels')}"
            )

    def check_frames(self, name: str, frames: int) -> None:
        """Raises a LimitError that names the clip if it has too many frames."""
        if frames > self.limits.frames:
            raise LimitError(
                f"{name} has more frames than the limit of {self.limits.frames}; cut it into "
                f"parts, or raise {setting('frames')}"
            )


def too_slow(name: str, limits: DecodingLimits) -> str:
    """The message about a clip whose reading takes too long."""
    return (
        f"{name} takes more than the limit of {limits.seconds:g} seconds to read; cut it, or raise "
        f"{setting('seconds')}"
    )
