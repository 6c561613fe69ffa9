"""Fine-tunes a checkpoint on records or on the built-in task: what ``dycoke-jax train`` does."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dycoke_jax.checkpoint import open_checkpoint
from dycoke_jax.checkpoint.conversion import copy_companions
from dycoke_jax.errors import ConfigError
from dycoke_jax.inputs.video import FrameSampling, read_clip
from dycoke_jax.progress import Progress
from dycoke_jax.tasks.scenes import SceneSettings
from dycoke_jax.training.batches import Example, pack
from dycoke_jax.training.records import RecordSource, read_records
from dycoke_jax.training.run import Intervals, Run, train_and_save
from dycoke_jax.training.scoring import HeldOut, both_accuracies, task_held_out
from dycoke_jax.training.sources import BatchShape, Source, TaskSource
from dycoke_jax.training.step import Optimisation
from dycoke_jax.training.token_dropping import TokenDroppingMix


@dataclass(frozen=True)
class FineTuning:
    """What to fine-tune, and on what.

    Attributes:
        model: folder or hub id of the checkpoint to start from.
        data: JSONL file of records; None trains on the built-in task.
        test_data: JSONL file of records to evaluate on in between. None evaluates on the built-in
            task's test split if that task is trained on, and nothing otherwise.
        sampling: frames of a clip.
        shape: sizes of a training step.
        dropping: how often visual tokens are dropped.
        optimisation: how weights are changed.
        seed: of the order of the data, and of dropping at random.
    """

    model: str
    data: Path | None
    test_data: Path | None
    sampling: FrameSampling
    shape: BatchShape
    dropping: TokenDroppingMix
    optimisation: Optimisation
    seed: int = 0


def fine_tune(
    folder: Path, what: FineTuning, intervals: Intervals, progress: Progress | None = None
) -> Path:
    """Fine-tunes a checkpoint.

    Args:
        folder: of the run; a run that was cut off there goes on where it was.
        what: the checkpoint, the data and the settings.
        intervals: how often the run logs, evaluates and saves.
        progress: called after each step.

    Returns:
        The folder of the trained model.

    Raises:
        DycokeError: saying what is wrong with model, data, settings or folder.
    """
    checkpoint = open_checkpoint(what.model)
    config, tokenizer = checkpoint.config, checkpoint.tokenizer
    size = config.vision.image_size
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
        _ = source.rows  # refuses records that do not fit, before anything is loaded
    if what.test_data is not None:
        batches = []
        for record in read_records(what.test_data):
            frames = read_clip(record.video, what.sampling, size).frames
            example = Example(frames, [record.question], [record.answer])
            batches.append(pack(tokenizer, [example], what.shape.width))
        held_out = HeldOut(batches, [[["all"]]] * len(batches))
    evaluate = None
    if held_out is not None:
        evaluate = both_accuracies(config, held_out, what.optimisation.dtype)
    run = Run(
        folder=folder,
        config=config,
        initial=lambda: checkpoint.load(np.float32),
        source=source,
        optimisation=what.optimisation,
        save_tokenizer=lambda target: copy_companions(checkpoint.folder.path, target),
        described=dataclasses.asdict(what) | {"model": str(checkpoint.folder.path)},
        seed=what.seed,
        intervals=intervals,
        evaluate=evaluate,
    )
    return train_and_save(run, progress)
