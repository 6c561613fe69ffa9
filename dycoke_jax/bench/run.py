"""One run: combinations, the machine and transformers, measured in the same rounds."""

from collections.abc import Collection, Hashable, Sequence
from dataclasses import replace

import jax.numpy as jnp
import numpy as np

from dycoke_jax.bench.against import check_against, torch_model, torch_run
from dycoke_jax.bench.machine import Rates, Sizes, cost_of_run, described, machine_run
from dycoke_jax.bench.measure import Run, Spread, measure, spread
from dycoke_jax.bench.results import Results, row, theirs_of
from dycoke_jax.bench.stages import Combination, prepare, stages_run
from dycoke_jax.config import LlavaConfig, Storage
from dycoke_jax.model import Model
from dycoke_jax.models.llava import abstract_params, random_param
from dycoke_jax.models.quantisation import quantised
from dycoke_jax.progress import Progress


def untrained(config: LlavaConfig, dtype: str, progress: Progress | None = None) -> Model:
    """A model with random weights.

    Args:
        config: its sizes.
        dtype: name of the dtype of weights and computation.
        progress: called after each weight.
    """
    params, shapes = {}, abstract_params(config)
    for number, (path, leaf) in enumerate(shapes.items()):
        params[path] = jnp.asarray(random_param(path, leaf.shape, 0), dtype)
        if progress:
            progress("making weights", number + 1, len(shapes))
    return Model(params, config, dtype)


def bench(
    name: str,
    model: Model,
    combinations: Sequence[Combination],
    *,
    new_tokens: int,
    rounds: int,
    stages: Collection[str],
    sizes: Sizes,
    against: bool = False,
    progress: Progress | None = None,
) -> Results:
    """Measures all combinations.

    Args:
        name: name of the model in the results.
        model: the model.
        combinations: what is run; no two are equal.
        new_tokens: number of tokens that each request generates, at least 2.
        rounds: number of rounds, at least 1.
        stages: names of the stages that are timed, of ``stages.STAGES``.
        sizes: sizes of what is measured of the machine.
        against: also run the plain model in transformers, in the same rounds.
        progress: called before each run.

    Raises:
        ConfigError: if a compression cannot work on the model or clip length, or the model cannot
            be compared with transformers.
        RequestError: if a request does not fit into the model's positions.
    """
    if against:
        check_against(model.config, model.dtype)
    stored: dict[Storage | None, Model] = {None: model}
    if any(combination.weights == "int8" for combination in combinations):
        stored["int8"] = _int8(model)
    works = [
        prepare(replace(stored[combination.weights], kv=combination.kv), combination, new_tokens)
        for combination in combinations
    ]
    network = torch_model(model) if against else None
    groups: dict[tuple[int, int], dict[Hashable, Run]] = {}
    for number, work in enumerate(works):
        size = work.combination.batch, work.combination.frames
        group = groups.setdefault(size, {})
        group[number] = stages_run(work, stages)
        if against:
            # Once for all compressions of the same batch size and frames: the pairs of the ratios.
            group.setdefault(("transformers", *size), torch_run(network, work, stages))
    machine: dict[Hashable, Run] = {"machine": machine_run(model.dtype, sizes)}
    measured = measure([*groups.values(), machine], rounds, progress=progress)

    seconds, done = measured["machine"].seconds, cost_of_run(sizes)
    matrix = _rate(done.flops, seconds["matrix rate"])
    bandwidth = _rate(done.bytes, seconds["bandwidth"])
    rates = Rates(matrix.median, bandwidth.median)
    plain = {
        _without_compression(work.combination): measured[number]
        for number, work in enumerate(works)
        if work.combination.compression is None
    }
    rows = []
    for number, work in enumerate(works):
        size = work.combination.batch, work.combination.frames
        theirs = measured.get(("transformers", *size))
        without = plain.get(_without_compression(work.combination))
        rows.append(row(work, measured[number], theirs, rates, without))
    return Results(
        model=name,
        machine=described(model.dtype),
        rounds=rounds,
        new_tokens=new_tokens,
        weights=sum(weight.nbytes for weight in model.params.values()),
        matrix=matrix,
        bandwidth=bandwidth,
        rows=tuple(rows),
        theirs=tuple(
            theirs_of(Combination(*size, "none", None), measured[("transformers", *size)])
            for size in groups
            if against
        ),
    )


def _without_compression(combination: Combination) -> Combination:
    """What a combination is compared with to see what its compression saves."""
    return replace(combination, name="none", compression=None)


def _int8(model: Model) -> Model:
    """The model with the matrices of its language model as int8; it shares all other weights."""
    host = ((path, np.asarray(weight)) for path, weight in model.params.items())
    params = {
        path: jnp.asarray(array)
        if path not in model.params or array.dtype == np.int8
        else model.params[path]
        for path, array in quantised(host)
    }
    return replace(model, params=params)


def _rate(amount: int, seconds: Sequence[float]) -> Spread:
    return spread([amount / each for each in seconds])
