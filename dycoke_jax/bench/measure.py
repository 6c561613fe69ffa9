"""Times in interleaved rounds: every case once a round, in an order that changes."""

import gc
import time
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

import jax
import numpy as np

from dycoke_jax.bench.memory import Peak, watch_memory
from dycoke_jax.compilation import Compilations, counted
from dycoke_jax.progress import Progress

T = TypeVar("T")
Clock = Callable[[], float]


class Watch:
    """Takes the times of the stages of one run.

    Attributes:
        seconds: time of each stage that was run.
    """

    def __init__(self, clock: Clock, compiled: Compilations | None) -> None:
        """Begins a run.

        Args:
            clock: gives the time in seconds.
            compiled: counts the programs that are compiled; None where compiling is allowed.
        """
        self.seconds: dict[str, float] = {}
        self._clock, self._compiled = clock, compiled

    @contextmanager
    def time(self, stage: str, parts: int = 1) -> Iterator[None]:
        """Times a block, which must wait for its results.

        Args:
            stage: name of the stage.
            parts: equal parts of the block; the time of one of them is taken.

        Raises:
            AssertionError: if a program is compiled meanwhile, which would be timed too.
        """
        before = self._programs()
        began = self._clock()
        yield
        self.seconds[stage] = (self._clock() - began) / parts
        if self._programs() > before:
            raise AssertionError(f"{stage}: a program was compiled while it was timed")

    def _programs(self) -> int:
        return 0 if self._compiled is None else self._compiled.programs


Run = Callable[[Watch], Any]
"""A case: runs its stages once, each timed by the watch, and returns what is to be kept of it."""


@dataclass
class Measured:
    """What was measured of a case.

    Attributes:
        compiled: the programs that were compiled for it; those of cases before it are shared.
        result: what its last run returned.
        seconds: times of each stage, one a round.
        peak: peak memory of a run; None where the system does not tell.
    """

    compiled: Compilations
    result: Any
    seconds: dict[str, list[float]] = field(default_factory=dict)
    peak: Peak | None = None


@dataclass(frozen=True)
class Spread:
    """Median and quartiles of several measurements."""

    median: float
    low: float
    high: float


def spread(values: Sequence[float]) -> Spread:
    """Median and quartiles of at least one value, interpolated linearly."""
    low, median, high = np.percentile(values, [25, 50, 75]).tolist()
    return Spread(median, low, high)


def ratios(over: Sequence[float], under: Sequence[float]) -> Spread:
    """Median and quartiles of the ratios of pairs, the two of a pair being of the same round."""
    return spread([a / b for a, b in zip(over, under, strict=True)])


def order(items: Sequence[T], number: int) -> list[T]:
    """The order of a round: a row of a Latin square that is balanced for what comes before.

    In as many rounds as there are items each has every place once, and for an even number of items
    each follows every other once (E. J. Williams, 1949).

    Args:
        items: what is run in each round.
        number: number of the round, from 0.
    """
    count = len(items)
    zigzag = [(step + 1) // 2 if step % 2 else -step // 2 for step in range(count)]
    return [items[(place + number) % count] for place in zigzag]


def measure(
    groups: Sequence[Mapping[Hashable, Run]],
    rounds: int,
    *,
    clock: Clock = time.perf_counter,
    progress: Progress | None = None,
) -> dict[Hashable, Measured]:
    """Runs each case once to compile its programs, then once in each round.

    Args:
        groups: cases by unique keys. Those of a group run one after another, so that they can be
            compared in pairs; the order of the groups and within each changes from round to round.
        rounds: number of rounds, at least 1.
        clock: gives the time in seconds.
        progress: called before each run.

    Raises:
        AssertionError: if a program is compiled in a round.
    """
    device = jax.devices()[0]
    runs = {key: run for group in groups for key, run in group.items()}
    assert len(runs) == sum(map(len, groups)), "a key is used twice"
    measured: dict[Hashable, Measured] = {}
    for number, (key, run) in enumerate(runs.items()):
        if progress:
            progress("warming up", number, len(runs))
        with counted() as compiled:
            result, peak = _once(run, Watch(clock, None), device)
        measured[key] = Measured(compiled, result, peak=peak)
    gc.collect()  # what compiling has left behind
    peaks: dict[Hashable, list[Peak]] = {key: [] for key in runs}
    done = 0
    with counted() as compiled:
        for number in range(rounds):
            for group in order(groups, number):
                for key in order(list(group), number):
                    if progress:
                        progress("measuring", done, rounds * len(runs))
                    watch = Watch(clock, compiled)
                    measured[key].result, peak = _once(runs[key], watch, device)
                    for stage, seconds in watch.seconds.items():
                        measured[key].seconds.setdefault(stage, []).append(seconds)
                    if peak is not None:
                        peaks[key].append(peak)
                    done += 1
    for key, of_rounds in peaks.items():
        # Compiling takes memory too, so the first run counts only where the rounds tell nothing.
        whole = max(of_rounds, key=lambda peak: peak.whole, default=measured[key].peak)
        measured[key].peak = whole
    return measured


def _once(run: Run, watch: Watch, device: jax.Device) -> tuple[Any, Peak | None]:
    peak = watch_memory(device.memory_stats)
    result = run(watch)
    return result, peak()
