"""A training run in a folder: steps, log, evaluations, checkpoints and exact resumption.

FOLDER/run.json     description of the run: its data and settings
FOLDER/log.jsonl    metrics and evaluations, one entry a line with the number of its step
FOLDER/state/       Orbax checkpoints of weights and optimiser state; the last two are preserved
FOLDER/model/       the trained model in the llava-hf layout, written after the last step
"""

import json
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
from jax.sharding import Mesh
from jaxtyping import Array, Int
from orbax.checkpoint import v1 as ocp

from dycoke_jax.checkpoint.save import save_llava_hf
from dycoke_jax.checks import whole_number
from dycoke_jax.config import LlavaConfig
from dycoke_jax.errors import CheckpointError, ConfigError
from dycoke_jax.files import read_json_object
from dycoke_jax.model import Model
from dycoke_jax.models.llava import Params, abstract_params
from dycoke_jax.progress import Progress
from dycoke_jax.training.placement import as_weights
from dycoke_jax.training.sources import Source
from dycoke_jax.training.step import Metrics, Optimisation, TrainState, start, train_step

RUN, LOG, STATE, MODEL = "run.json", "log.jsonl", "state", "model"


@dataclass(frozen=True)
class Intervals:
    """How often a run logs, evaluates and saves.

    After the last step a run always does all three.

    Attributes:
        log_every: steps between two entries of the log, at least 1.
        evaluate_every: steps between two evaluations, at least 1.
        save_every: steps between two saved training states, at least 1.

    Raises:
        ConfigError: naming the interval that is no whole number of at least 1.
    """

    log_every: int = 10
    evaluate_every: int = 200
    save_every: int = 100

    def __post_init__(self) -> None:
        for name in ("log_every", "evaluate_every", "save_every"):
            object.__setattr__(self, name, whole_number(name, getattr(self, name), 1))


@dataclass(frozen=True)
class Run:
    """A training run.

    Attributes:
        folder: folder of the run; it is made if absent.
        config: sizes and layout of the model.
        initial: returns the model to start from, which has this ``config``; not called when a run
            is resumed.
        source: the data of each step.
        optimisation: settings of the optimiser, and the number of steps.
        save_tokenizer: writes the files of the tokenizer into the folder it is called with.
        described: all settings that decide the result, as values that JSON can hold (others are
            written as text). They are the content of ``run.json``; a run is resumed only if its
            description is the same.
        seed: seed of random token dropping, 0 or more.
        intervals: how often the run logs, evaluates and saves.
        evaluate: evaluates the model at intervals and at the end. Its result, which JSON must be
            able to hold, goes into the log. None: no evaluation.
        extra: shapes and dtypes, by path, of those weights from ``initial`` that the network does
            not have, such as weights of auxiliary losses.
        mesh: the devices to train on; None for a single one. A run may be resumed on another mesh.
        fsdp: spread weights and moments over the mesh's ``data`` too. The model from ``initial``
            lies as these two say.
    """

    folder: Path
    config: LlavaConfig
    initial: Callable[[], Model]
    source: Source
    optimisation: Optimisation
    save_tokenizer: Callable[[Path], None]
    described: Mapping[str, Any]
    seed: int = 0
    intervals: Intervals = field(default_factory=Intervals)
    evaluate: Callable[[Model], Mapping[str, Any]] | None = None
    extra: Mapping[str, jax.ShapeDtypeStruct] = field(default_factory=dict)
    mesh: Mesh | None = None
    fsdp: bool = False


class SavedState(NamedTuple):
    """A ``TrainState`` as a checkpoint holds it; its names are those in the files."""

    step: Int[Array, ""]
    params: Params
    optimiser: optax.OptState


def train(run: Run, progress: Progress | None = None) -> Model:
    """Trains from the first step, or resumes an interrupted run from its last checkpoint.

    A resumed run computes the same as an uninterrupted one, because batches and random numbers
    depend only on the seed and the step, and the checkpoint holds the rest of the state. On a CPU
    the weights are equal bit for bit, unless the mesh is another one.

    Args:
        run: the model, the data, the settings and the folder.
        progress: called after each step.

    Returns:
        The trained model; its weights are in float32 and hold those of auxiliary losses too.

    Raises:
        ConfigError: if the folder holds a run with another description, or other processes run
            together with this one.
        CheckpointError: if the folder holds other files, cannot be written, or holds a checkpoint
            that cannot be read.
        DycokeError: as the source of the data does.
    """
    if jax.process_count() > 1:
        raise ConfigError(
            f"{jax.process_count()} processes run together, and training works in one: start it "
            "in one process, which uses all devices of its host"
        )
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
    """Trains, and then writes the trained model in the llava-hf layout into the run's folder.

    If the run is finished already, nothing is trained or overwritten.

    Args:
        run: the model, the data, the settings and the folder.
        progress: called after each step.

    Returns:
        The folder of the trained model.

    Raises:
        DycokeError: as ``train`` does, or if the model cannot be written.
    """
    model = train(run, progress)
    trained = run.folder / MODEL
    if not trained.exists():
        save_llava_hf(
            trained,
            model.config,
            lambda paths: ((path, jax.device_get(model.params[path])) for path in paths),
            run.save_tokenizer,
        )
    return trained


def _loop(
    run: Run, state: TrainState, saved: ocp.training.Checkpointer, progress: Progress | None
) -> Model:
    began, first, steps = time.perf_counter(), int(state.step), run.optimisation.steps
    # A thread prepares the next batch while the device computes.
    with ThreadPoolExecutor(1, thread_name_prefix="batches") as pool:
        following = pool.submit(run.source.step, first)
        for number in range(first, steps):
            data = following.result()
            if number + 1 < steps:
                following = pool.submit(run.source.step, number + 1)
            state, metrics = train_step(
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
            if done % run.intervals.log_every == 0 or done == steps:
                entry = _readable(metrics)
            if run.evaluate and (done % run.intervals.evaluate_every == 0 or done == steps):
                entry |= {"evaluation": run.evaluate(state.model)}
            if entry:
                seconds = round((time.perf_counter() - began) / (done - first), 3)
                _log(run.folder / LOG, {"step": done, **entry, "seconds_per_step": seconds})
            if done % run.intervals.save_every == 0 or done == steps:
                saved.save(done, _to_save(state), overwrite=True)
            if progress:
                progress(f"training: {_line(metrics)}", done, steps)
    return state.model


def _claim(folder: Path, described: Mapping[str, Any]) -> None:
    """Writes the description of the run, or checks that it equals the one in the folder."""
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
            before, now = read_json_object(run), json.loads(text)
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
    fresh = jax.eval_shape(
        lambda: _to_save(start(run.optimisation, Model(_zeros(shapes), run.config)))
    )
    if run.mesh is None:
        one_device = jax.numpy.zeros(()).sharding
        places = jax.tree.map(lambda _: one_device, fresh)
    else:
        places = as_weights(fresh, run.config, run.mesh, fsdp=run.fsdp)
    abstract = jax.tree.map(
        lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), fresh, places
    )
    try:
        state = saved.load(saved.latest.step, abstract)
    except Exception as error:  # Orbax and TensorStore raise many kinds for a damaged file
        line = " ".join(str(error).split())[:300]
        raise CheckpointError(
            f"the state of step {saved.latest.step} in {saved.directory} cannot be read ({line}); "
            "remove that folder to go on from the one before"
        ) from error
    model = Model(state.params, run.config, run.optimisation.dtype, run.mesh, fsdp=run.fsdp)
    return TrainState(state.step, model, state.optimiser)


def _to_save(state: TrainState) -> SavedState:
    return SavedState(state.step, state.model.params, state.optimiser)


def _zeros(shapes: Mapping[str, jax.ShapeDtypeStruct]) -> Params:
    return {path: jax.numpy.zeros(leaf.shape, leaf.dtype) for path, leaf in shapes.items()}


def _cut_log(log: Path, step: int) -> None:
    """Removes the log entries of steps after ``step``, because they will run again."""
    if log.exists():
        lines = log.read_text(encoding="utf-8").splitlines()
        done = [line for line in lines if json.loads(line)["step"] <= step]
        log.write_text("".join(line + "\n" for line in done), encoding="utf-8")


def _log(log: Path, entry: Mapping[str, Any]) -> None:
    with log.open("a", encoding="utf-8") as file:
        file.write(json.dumps(entry) + "\n")


def _readable(metrics: Metrics) -> dict[str, float]:
    return {name: float(f"{float(value):.6g}") for name, value in metrics._asdict().items()}


def _line(metrics: Metrics) -> str:
    loss, accuracy = np.asarray(metrics.loss), np.asarray(metrics.answer_accuracy)
    return f"loss {loss:.3f}, answers {accuracy:.0%}"
