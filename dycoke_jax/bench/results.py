"""The results of a run: one row a combination, made of what was measured."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from dycoke_jax.bench.costs import Cost
from dycoke_jax.bench.machine import Limit, Rates, limit
from dycoke_jax.bench.measure import Measured, Spread, ratios, spread
from dycoke_jax.bench.memory import Peak
from dycoke_jax.bench.stages import Combination, Counts, Work, stage_costs
from dycoke_jax.compilation import Compilations


@dataclass(frozen=True)
class Stage:
    """What was measured of a stage of a combination.

    Attributes:
        seconds: time of each round; of decoding, that of a step.
        spread: their median and quartiles.
        cost: what the stage needs at least; None end to end, which is several stages.
        limit: the least time that this takes at the measured rates of the machine.
        share: share of its median that the limit is: 1 is as fast as the machine can.
        faster: how many times as long transformers takes, as median and quartiles of the ratios of
            pairs; None where it was not run.
    """

    seconds: tuple[float, ...]
    spread: Spread
    cost: Cost | None
    limit: Limit
    share: float
    faster: Spread | None


@dataclass(frozen=True)
class Row:
    """What was measured of a combination.

    Attributes:
        combination: what was run.
        counts: numbers of tokens; None if nothing behind vision was run.
        stages: by name.
        compiled: the programs that were compiled; those of rows above are shared.
        peak: peak memory; None where the system does not tell.
        same_ids: of the plain model, how many of the generated tokens equal those of transformers
            up to the first that differs in each request, and how many there are; None where they
            were not compared.
        of_saved: time of the token stage as a share of the time of prefill that is saved, by
            medians; None if one of them was not timed, if the plain model was not run, or if
            nothing is saved.
    """

    combination: Combination
    counts: Counts | None
    stages: Mapping[str, Stage]
    compiled: Compilations
    peak: Peak | None
    same_ids: tuple[int, int] | None
    of_saved: float | None = None


@dataclass(frozen=True)
class Theirs:
    """What was measured of transformers.

    Attributes:
        batch: number of requests.
        frames: frames of each clip.
        stages: times by stage.
        peak: peak memory of a run; None where the system does not tell.
    """

    batch: int
    frames: int
    stages: Mapping[str, Spread]
    peak: Peak | None


@dataclass(frozen=True)
class Results:
    """All that a run measured.

    Attributes:
        model: name of the model.
        machine: where it was measured, see ``machine.described``.
        rounds: number of rounds.
        new_tokens: number of tokens that each request generated.
        weights: bytes of the weights of the model as it was loaded.
        matrix: the matrix rate in operations a second.
        bandwidth: the memory bandwidth in bytes a second.
        rows: one a combination.
        theirs: one for each batch size and number of frames, if transformers was run.
    """

    model: str
    machine: Mapping[str, str | int]
    rounds: int
    new_tokens: int
    weights: int
    matrix: Spread
    bandwidth: Spread
    rows: tuple[Row, ...]
    theirs: tuple[Theirs, ...]


def row(
    work: Work,
    measured: Measured,
    theirs: Measured | None,
    rates: Rates,
    plain: Measured | None = None,
) -> Row:
    """Makes the row of a combination.

    Args:
        work: what was run.
        measured: what was measured of it.
        theirs: what was measured of transformers in the same rounds; None if it was not run.
        rates: what was measured of the machine.
        plain: what was measured without compression, all else being equal; None if it was not run.
    """
    costs = stage_costs(work)
    limits = {name: limit(cost, rates) for name, cost in costs.items()}
    counts: Counts | None = measured.result
    same = None
    if counts is not None and theirs is not None and theirs.result is not None:
        same = same_ids(counts.token_ids, theirs.result)
    stages = {}
    for name, seconds in measured.seconds.items():
        of_pairs = None
        if theirs is not None and name in theirs.seconds:
            of_pairs = ratios(theirs.seconds[name], seconds)
        least = limits[name] if name in limits else _whole(limits, work.new_tokens - 1)
        found = spread(seconds)
        share = least.seconds / found.median
        stages[name] = Stage(tuple(seconds), found, costs.get(name), least, share, of_pairs)
    return Row(
        work.combination,
        counts,
        stages,
        measured.compiled,
        measured.peak,
        same if work.combination.compression is None else None,
        None if plain is None else _of_saved(stages, plain.seconds),
    )


def _of_saved(stages: Mapping[str, Stage], plain: Mapping[str, Sequence[float]]) -> float | None:
    """``Row.of_saved``. Prefill begins with the token stage, which counts as cost and not there."""
    if not {"token stage", "prefill"} <= stages.keys() or "prefill" not in plain:
        return None
    stage, prefill = stages["token stage"].spread.median, stages["prefill"].spread.median
    saved = spread(plain["prefill"]).median - (prefill - stage)
    return stage / saved if saved > 0 else None


def theirs_of(combination: Combination, measured: Measured) -> Theirs:
    """What was measured of transformers with the batch size and frames of a combination."""
    times = {name: spread(seconds) for name, seconds in measured.seconds.items()}
    return Theirs(combination.batch, combination.frames, times, measured.peak)


def same_ids(
    ours: Sequence[Sequence[int]], theirs: Sequence[Sequence[int]]
) -> tuple[int, int] | None:
    """How many tokens are equal before the first that differs, of how many; over all requests.

    None if they did not generate equally many.
    """
    if [len(ids) for ids in ours] != [len(ids) for ids in theirs]:
        return None
    same = 0
    for mine, other in zip(ours, theirs, strict=True):
        differ = [index for index, (a, b) in enumerate(zip(mine, other, strict=True)) if a != b]
        same += differ[0] if differ else len(mine)
    return same, sum(map(len, ours))


def _whole(limits: Mapping[str, Limit], steps: int) -> Limit:
    """The least time of vision, prefill and all decode steps one after another."""
    parts = {
        "vision": limits["vision"].seconds,
        "prefill": limits["prefill"].seconds,
        "decode": steps * limits["decode"].seconds,
    }
    longest = max(parts, key=lambda name: parts[name])
    return Limit(sum(parts.values()), limits[longest].bound)
