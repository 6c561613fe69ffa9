"""A training run in a folder: steps, log, evaluation in between, checkpoints and exact resume.

FOLDER/run.json     what the run was started with
FOLDER/log.jsonl    loss and accuracy by step
FOLDER/state/       Orbax checkpoints of weights and optimiser
FOLDER/model/       the trained model in the llava-hf layout, at the end
"""

import json
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import numpy as np
from orbax.checkpoint import v1 as ocp

from dycoke_jax.checkpoint.save import save_llava_hf
from dycoke_jax.config import LlavaConfig
from dycoke_jax.errors import CheckpointError, ConfigError
from dycoke_jax.models.llava import Params, abstract_params
from dycoke_jax.progress import Progress
from dycoke_jax.training.scoring import Evaluate
from dycoke_jax.training.sources import Source
from dycoke_jax.training.step import Metrics, Optimisation, TrainState, start, train_step

RUN, LOG, STATE, MODEL = "run.json", "log.jsonl", "state", "model"


@dataclass(frozen=True)
class Intervals:
    """Steps between two entries of the log, two evaluations, and two checkpoints."""

    log: int = 10
    evaluate: int = 200
    save: int = 100

    def __post_init__(self) -> None:
        for name in ("log", "evaluate", "save"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} every {getattr(self, name)} steps; at least 1 works")


@dataclass(frozen=True)
class Run:
    """A training run.

    Attributes:
        folder: of the run; made if absent.
        config: the model.
        initial: gives the weights to start from; not called on resuming.
        source: gives the data of each step.
        optimisation: how weights are changed, and in how many steps.
        save_tokenizer: writes the tokenizer's files into the folder of the trained model.
        described: everything that decides the run's course, for ``run.json``; a folder with
            another description is not resumed.
        seed: of dropping at random.
        intervals: how often the run logs, evaluates and saves.
        evaluate: scores weights in between and at the end; None: no evaluation.
        extra: shapes and dtypes of what ``initial`` gives besides the model's own weights, by path.
    """

    folder: Path
    config: LlavaConfig
    initial: Callable[[], Params]
    source: Source
    optimisation: Optimisation
    save_tokenizer: Callable[[Path], None]
    described: Mapping[str, Any]
    seed: int = 0
    intervals: Intervals = field(default_factory=Intervals)
    evaluate: Evaluate | None = None
    extra: Mapping[str, jax.ShapeDtypeStruct] = field(default_factory=dict)


def train(run: Run, progress: Progress | None = None) -> Params:
    """Trains, or goes on where a run in the folder was cut off.

    A resumed run computes what the uninterrupted one would have: batches and random choices depend
    on the step alone, and the checkpoint holds everything else. On a CPU its weights are equal bit
    for bit.

    Args:
        run: what to train, on what, and where.
        progress: called after each step.

    Returns:
        The trained weights, float32.

    Raises:
        ConfigError: if the folder holds another run.
        CheckpointError: if the folder cannot be written or its state cannot be read.
    """
    _claim(run.folder, run.described)
    keep = ocp.training.preservation_policies.LatestN(2)
    try:
        with ocp.training.Checkpointer(
            (run.folder / STATE).absolute(), preservation_policy=keep
        ) as saved:
            state = _resume(run, saved)
            _cut_log(run.folder / LOG, int(state.step))
            return _loop(run, state, saved, progress)
    except OSError as error:
        raise CheckpointError(f"cannot write to {run.folder}: {error}") from error


def train_and_save(run: Run, progress: Progress | None = None) -> Path:
    """Trains, and writes the trained model in the llava-hf layout into the run's folder.

    Returns:
        The folder of the trained model. A finished run that is started again is left as it is.

    Raises:
        DycokeError: as ``train`` does.
    """
    params = train(run, progress)
    trained = run.folder / MODEL
    if not trained.exists():
        save_llava_hf(
            trained,
            run.config,
            lambda paths: ((path, jax.device_get(params[path])) for path in paths),
            run.save_tokenizer,
        )
    return trained


def _loop(
    run: Run, state: TrainState, saved: ocp.training.Checkpointer, progress: Progress | None
) -> Params:
    began, first, steps = time.perf_counter(), int(state.step), run.optimisation.steps
    # The next batch is drawn while the device computes.
    with ThreadPoolExecutor(1, thread_name_prefix="batches") as pool:
        following = pool.submit(run.source.step, first)
        for number in range(first, steps):
            data = following.result()
            if number + 1 < steps:
                following = pool.submit(run.source.step, number + 1)
            state, metrics = train_step(
                run.config,
                run.optimisation,
                state,
                data.batch,
                data.targets,
                dropping=data.dropping,
                auxiliary=data.auxiliary,
                seed=run.seed,
            )
            done = number + 1
            entry: dict[str, Any] = {}
            if done % run.intervals.log == 0 or done == steps:
                entry = _readable(metrics)
            if run.evaluate and (done % run.intervals.evaluate == 0 or done == steps):
                entry |= {"evaluation": run.evaluate(state.params)}
            if entry:
                seconds = round((time.perf_counter() - began) / (done - first), 3)
                _log(run.folder / LOG, {"step": done, **entry, "seconds_per_step": seconds})
            if done % run.intervals.save == 0 or done == steps:
                saved.save(done, state, overwrite=True)
            if progress:
                progress(f"training: {_line(metrics)}", done, steps)
    return state.params


def _claim(folder: Path, described: Mapping[str, Any]) -> None:
    """Writes what the run is, or checks that it is the one that the folder holds."""
    run = folder / RUN
    text = json.dumps(described, indent=2, sort_keys=True, default=str) + "\n"
    try:
        if not folder.exists():
            folder.mkdir(parents=True)
        if not run.exists():
            if any(folder.iterdir()):
                raise CheckpointError(f"{folder} is not empty and holds no training run")
            run.write_text(text, encoding="utf-8")
        elif run.read_text(encoding="utf-8") != text:
            before, now = json.loads(run.read_text(encoding="utf-8")), json.loads(text)
            changed = sorted(
                key for key in before.keys() | now.keys() if before.get(key) != now.get(key)
            )
            raise ConfigError(
                f"{folder} holds a run with other settings ({', '.join(changed)}); give the same "
                "ones to go on with it, or another folder"
            )
    except OSError as error:
        raise CheckpointError(f"cannot write to {folder}: {error}") from error


def _resume(run: Run, saved: ocp.training.Checkpointer) -> TrainState:
    if saved.latest is None:
        return start(run.optimisation, run.initial())
    shapes = {**abstract_params(run.config), **run.extra}
    fresh = jax.eval_shape(lambda: start(run.optimisation, _zeros(shapes)))
    place = jax.numpy.zeros(()).sharding
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), fresh)
    try:
        return saved.load(saved.latest.step, abstract)
    except Exception as error:  # Orbax and TensorStore raise many kinds for a damaged file
        line = " ".join(str(error).split())[:300]
        raise CheckpointError(
            f"the state of step {saved.latest.step} in {saved.directory} cannot be read ({line}); "
            "remove that folder to go on from the one before"
        ) from error


def _zeros(shapes: Mapping[str, jax.ShapeDtypeStruct]) -> Params:
    return {path: jax.numpy.zeros(leaf.shape, leaf.dtype) for path, leaf in shapes.items()}


def _cut_log(log: Path, step: int) -> None:
    """Drops entries of steps that will be done again."""
    if log.exists():
        lines = log.read_text(encoding="utf-8").splitlines()
        kept = [line for line in lines if json.loads(line)["step"] <= step]
        log.write_text("".join(line + "\n" for line in kept), encoding="utf-8")


def _log(log: Path, entry: Mapping[str, Any]) -> None:
    with log.open("a", encoding="utf-8") as file:
        file.write(json.dumps(entry) + "\n")


def _readable(metrics: Metrics) -> dict[str, float]:
    return {name: float(f"{float(value):.6g}") for name, value in metrics._asdict().items()}


def _line(metrics: Metrics) -> str:
    loss, accuracy = np.asarray(metrics.loss), np.asarray(metrics.answer_accuracy)
    return f"loss {loss:.3f}, answers {accuracy:.0%}"
