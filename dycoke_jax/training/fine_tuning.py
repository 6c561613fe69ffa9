"""Fine-tuning of a checkpoint on records or on the built-in task, for ``dycoke-jax train``."""

import dataclasses
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from jax.sharding import Mesh

from dycoke_jax.checkpoint import open_checkpoint
from dycoke_jax.checkpoint.conversion import copy_companions
from dycoke_jax.checkpoint.end_ids import copy_end_ids
from dycoke_jax.errors import ConfigError
from dycoke_jax.inputs import FrameSampling
from dycoke_jax.progress import Progress
from dycoke_jax.sharding import check_mesh
from dycoke_jax.tasks.scenes import SceneSettings
from dycoke_jax.training.batches import pack
from dycoke_jax.training.placement import check_rows
from dycoke_jax.training.records import RecordSource, examples_of, group_into_rows, read_records
from dycoke_jax.training.run import Intervals, Run, train_and_save
from dycoke_jax.training.scoring import HeldOut, accuracies, task_held_out
from dycoke_jax.training.sources import BatchShape, Source, TaskSource
from dycoke_jax.training.step import Optimisation
from dycoke_jax.training.token_dropping import TokenDroppingMix

# The defaults of ``FineTuning``, which are not those of the settings themselves.
_SAMPLING = FrameSampling(frames=16)
_SHAPE = BatchShape(rows=1, accumulate=8, width=256)
_DROPPING = TokenDroppingMix()
_OPTIMISATION = Optimisation(
    steps=1000, learning_rate=1e-5, tower=0.2, warm_up=30, dtype="bfloat16", rematerialise=True
)


@dataclass(frozen=True)
class FineTuning:
    """The checkpoint, the data and the settings of a fine-tuning run.

    Attributes:
        model: folder or hub id of the checkpoint to start from.
        data: file of training records (see ``record_file.read_records``). None: the run trains on
            the built-in task.
        test_data: file of held-out records for the evaluations. None: the run evaluates on the
            test split of the built-in task if it trains on that task, and else not at all.
        sampling: number of frames of a clip, or frames a second (for clips from files only).
        shape: sizes of a training step.
        dropping: shares of the steps that drop visual tokens.
        optimisation: settings of the optimiser, and the number of steps.
        seed: seed of the order of the data and of random token dropping, 0 or more.
    """

    model: str
    data: Path | None = None
    test_data: Path | None = None
    sampling: FrameSampling = _SAMPLING
    shape: BatchShape = _SHAPE
    dropping: TokenDroppingMix = _DROPPING
    optimisation: Optimisation = _OPTIMISATION
    seed: int = 0


def fine_tune(
    folder: Path,
    what: FineTuning,
    intervals: Intervals,
    progress: Progress | None = None,
    *,
    mesh: Mesh | None = None,
    fsdp: bool = False,
) -> Path:
    """Fine-tunes a checkpoint.

    Args:
        folder: folder of the run; it is made if absent. An interrupted run in it is resumed.
        what: the checkpoint, the data and the settings.
        intervals: how often the run logs, evaluates and saves.
        progress: called after each training step.
        mesh: the devices to train on; None for a single one. A run may be resumed on another mesh.
        fsdp: spread weights and moments over the mesh's ``data`` too.

    Returns:
        The folder of the trained model.

    Raises:
        ConfigError: if a setting is out of range, if the folder holds a run with other settings, or
            if the mesh cannot divide the model or the rows.
        CheckpointError: if the checkpoint cannot be read or the folder cannot be written.
        RequestError: if the records are faulty, or one of them does not fit into a row.
        VideoError: if a clip cannot be read.
    """
    checkpoint = open_checkpoint(what.model)
    config, tokenizer = checkpoint.config, checkpoint.tokenizer
    size = config.vision.image_size
    if mesh is not None:
        check_mesh(config, mesh)
    check_rows(what.shape.rows, mesh)
    if what.data is None and what.sampling.fps is not None:
        raise ConfigError("fps is for clips from files; the built-in task has frames only")
    held_out = None
    if what.data is None:
        scenes = SceneSettings(what.sampling.frames)
        source: Source = TaskSource(tokenizer, size, scenes, what.shape, what.dropping, what.seed)
        held_out = task_held_out(tokenizer, size, what.sampling.frames)
    else:
        records = tuple(read_records(what.data))
        source = RecordSource(
            records, tokenizer, size, what.sampling, what.shape, what.dropping, what.seed
        )
        _ = source.rows  # Fails early, before weights are loaded, if a record is faulty.
    if what.test_data is not None:
        batches = []
        held_out_records = read_records(what.test_data)
        # Fails if a record is faulty, with the place of each such record.
        group_into_rows(held_out_records, tokenizer, what.shape.width)
        for record in held_out_records:
            examples = examples_of([[record]], what.sampling, size)
            batches.append(pack(tokenizer, examples, what.shape.width))
        held_out = HeldOut(batches, [[["all"]]] * len(batches))

    def save_tokenizer(target: Path) -> None:
        copy_companions(checkpoint.folder.path, target)
        copy_end_ids(checkpoint.folder.path, target, config.text.vocab_size)

    evaluate = None
    if held_out is not None:
        evaluate = partial(accuracies, held_out=held_out)
    run = Run(
        folder=folder,
        config=config,
        initial=lambda: checkpoint.load(np.float32, mesh=mesh, fsdp=fsdp),
        source=source,
        optimisation=what.optimisation,
        save_tokenizer=save_tokenizer,
        described=dataclasses.asdict(what) | {"model": str(checkpoint.folder.path)},
        seed=what.seed,
        intervals=intervals,
        evaluate=evaluate,
        mesh=mesh,
        fsdp=fsdp,
    )
    return train_and_save(run, progress)
