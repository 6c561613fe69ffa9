"""Peak memory of a piece of work: of the device, or on the CPU of the process."""

import ctypes
import re
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_PROCESS = Path("/proc/self")


Statistics = Callable[[], Mapping[str, Any] | None]
"""Gives what a device tells of its memory: ``jax.Device.memory_stats``."""


@dataclass(frozen=True)
class Peak:
    """The most memory that was in use at a time.

    Attributes:
        whole: bytes, all that was there before included: weights, and on the CPU the process.
        above: bytes above what was in use when the work began: its activations and caches.
    """

    whole: int
    above: int


def watch_memory(statistics: Statistics) -> Callable[[], Peak | None]:
    """Begins to watch the memory of a device, or else the resident memory of this process.

    Args:
        statistics: of the device; it gives None on the CPU.

    Returns:
        A function that gives the peak since then. It gives None where the system does not tell,
        and on accelerators, whose high-water mark cannot be reset, if the mark has not risen.
    """
    before = statistics()
    if before is not None and "peak_bytes_in_use" in before:
        mark, used = before["peak_bytes_in_use"], before["bytes_in_use"]

        def of_device() -> Peak | None:
            peak = (statistics() or {}).get("peak_bytes_in_use", 0)
            return Peak(peak, peak - used) if peak > mark else None

        return of_device
    _give_back()
    try:
        # 5 sets the high-water mark (VmHWM) to what is resident now (VmRSS); see proc(5).
        (_PROCESS / "clear_refs").write_text("5")
        resident = _status("VmRSS")
    except OSError:  # not Linux, or not allowed
        return lambda: None

    def of_process() -> Peak:
        peak = _status("VmHWM")
        # The system keeps these counts to some pages, so a peak may seem to lie below the start.
        return Peak(peak, max(peak - resident, 0))

    return of_process


def _status(name: str) -> int:
    """A line of /proc/self/status in bytes."""
    found = re.search(rf"^{name}:\s+(\d+) kB$", (_PROCESS / "status").read_text(), re.MULTILINE)
    if found is None:
        raise OSError(f"the system tells no {name}")
    return int(found[1]) * 1024


def _give_back() -> None:
    """Gives memory that the C library holds unused back to the system, where it can.

    It would count as in use before the work, and what the work takes of it would not be seen.
    """
    with suppress(OSError, AttributeError):  # only the GNU C library has it
        ctypes.CDLL(None).malloc_trim(0)
