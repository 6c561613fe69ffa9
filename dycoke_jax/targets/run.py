"""Compiles workloads for a target, one after another."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from dycoke_jax.bench import costs
from dycoke_jax.engine.batch import rows_for
from dycoke_jax.progress import Progress
from dycoke_jax.sharding import data_size
from dycoke_jax.targets.measure import (
    Compiled,
    DoesNotFit,
    Limit,
    caches_of,
    compile_stage,
    size_on_device,
)
from dycoke_jax.targets.programs import Programs, Stage, Workload, programs
from dycoke_jax.targets.topology import Target

MOST_ROWS = 1 << 14
"""The largest batch that is considered."""


@dataclass(frozen=True)
class StageResult:
    """A stage of a workload.

    Attributes:
        name: its name.
        runs: how often its program runs for a batch; that of decoding is a step.
        compiled: what the compiler made of it; None if it does not fit.
        fits: whether everything is in the memory of a device at the same time.
        reason: what the compiler says where it does not fit.
        flops: operations of its matrix products on a device, from shapes alone.
        limit: the least time of a run.
    """

    name: str
    runs: int
    compiled: Compiled | None
    fits: bool
    reason: str
    flops: float
    limit: Limit | None


@dataclass(frozen=True)
class Largest:
    """The largest batch.

    Attributes:
        batch: number of rows; 0 if not even the weights fit.
        confirmed: whether it was compiled, rather than computed from a smaller batch.
    """

    batch: int
    confirmed: bool


@dataclass(frozen=True)
class Result:
    """What was found for a workload.

    Attributes:
        name: name of the compression.
        work: the workload.
        rows: rows of its batch, empty ones included.
        slots: for each group of layers, the slots of its caches.
        cache: bytes of the key/value caches on a device, with what a compression keeps of them.
        state: bytes of the state of decoding on a device, of which the caches are nearly all.
        stages: the stages that were compiled.
        largest: the largest batch, None if it was not looked for or a stage does not fit.
    """

    name: str
    work: Workload
    rows: int
    slots: tuple[int, ...]
    cache: int
    state: int
    stages: tuple[StageResult, ...]
    largest: Largest | None

    @property
    def fits(self) -> bool:
        """Whether all stages fit."""
        return all(stage.fits for stage in self.stages)


def compile_workload(
    name: str,
    work: Workload,
    target: Target,
    devices: Sequence[jax.Device],
    mesh: Mesh | None,
    stages: Sequence[str],
    *,
    confirm: bool = False,
    progress: Progress | None = None,
) -> Result:
    """Compiles the stages of a workload.

    Args:
        name: name of its compression.
        work: the workload.
        target: what is compiled for.
        devices: its devices.
        mesh: the mesh of these devices; None for a single one.
        stages: names of the stages to compile.
        confirm: whether the largest batch is compiled too.
        progress: called before each program is compiled.
    """
    made = programs(work, devices[0], mesh)
    chosen = [stage for stage in made.stages if stage.name in stages]
    results = []
    for number, stage in enumerate(chosen):
        if progress is not None:
            progress(f"compiling {stage.name}", number, len(chosen))
        results.append(_result(made, stage, target, len(devices)))
    result = Result(
        name,
        work,
        made.layout.rows,
        tuple(group.slots.prompt + group.slots.generated for group in made.layout.groups),
        size_on_device(caches_of(made.stages[-1])),
        size_on_device(made.state),
        tuple(results),
        None,
    )
    if not result.fits:
        return result
    batch = largest_batch(result, target.chip.memory, data_size(mesh))
    largest = Largest(batch, confirmed=batch == result.rows)
    while confirm and not largest.confirmed:
        # The compiler has the last word; temporaries grow otherwise than by rows.
        larger = programs(replace(work, batch=largest.batch), devices[0], mesh)
        fits = all(
            _result(larger, stage, target, len(devices)).fits
            for stage in larger.stages
            if stage.name in stages
        )
        batch = largest.batch if fits else largest.batch // 2
        largest = Largest(batch, confirmed=fits or batch == result.rows)
    return replace(result, largest=largest)


def _result(made: Programs, stage: Stage, target: Target, devices: int) -> StageResult:
    flops = _flops(made, stage) / devices
    try:
        compiled = compile_stage(stage, target.chip)
    except DoesNotFit as error:
        return StageResult(stage.name, stage.runs, None, False, str(error), flops, None)
    fits = compiled.memory.total <= target.chip.memory
    limit = compiled.costs.limit(target.chip, flops)
    return StageResult(stage.name, stage.runs, compiled, fits, "", flops, limit)


def _flops(made: Programs, stage: Stage) -> int:
    """Operations of the matrix products of a run, all devices together."""
    model, layout = made.model, made.layout
    width = jnp.dtype(model.dtype).itemsize
    if stage.name == "vision":
        shards, chunk = stage.arguments[2].shape[:2]
        return costs.vision(model.config, shards * chunk, 0, width).flops
    if stage.name == "prefill":
        return costs.prefill(model.config, layout, 0, width).flops
    slots = [cache.slots for view in made.state.views for cache in view.caches]
    return costs.decode_step(model.config, layout.rows, slots, 0, 0).flops


def largest_batch(result: Result, memory: int, data: int) -> int:
    """The largest batch by arithmetic.

    Caches, other arguments and temporaries are taken to grow with the rows, but for the temporaries
    of the vision tower, whose chunks are of a fixed size.

    Args:
        result: a result whose stages all fit.
        memory: bytes of a device.
        data: shards that rows are spread over; the rows of a batch are these, doubled.
    """

    def fits(rows: int) -> bool:
        for stage in result.stages:
            assert stage.compiled is not None
            of = stage.compiled.memory
            fixed, growing = of.weights + of.code, of.cache + of.others + of.temporaries
            if stage.name == "vision":
                fixed, growing = fixed + of.temporaries, growing - of.temporaries
            if fixed + growing * rows / result.rows > memory:
                return False
        return True

    return max(rows for rows in _batches(data) if rows <= result.rows or fits(rows))


def _batches(data: int) -> Iterator[int]:
    rows = rows_for(1, None) * data
    while rows <= MOST_ROWS:
        yield rows
        rows *= 2
