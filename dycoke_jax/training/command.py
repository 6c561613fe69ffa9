"""What ``dycoke-jax train`` does with its options: fine-tuning, or the recipe from scratch."""

import dataclasses
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np

from dycoke_jax.checkpoint import open_checkpoint
from dycoke_jax.checkpoint.conversion import copy_companions
from dycoke_jax.checkpoint.save import save_llava_hf
from dycoke_jax.checkpoint.tokenizer import load_tokenizer
from dycoke_jax.config import TINY, LlavaConfig
from dycoke_jax.errors import ConfigError
from dycoke_jax.inputs.video import FrameSampling, read_clip
from dycoke_jax.models.llava import Params
from dycoke_jax.progress import Progress
from dycoke_jax.tasks.scenes import SceneSettings
from dycoke_jax.training import alignment, tiny, watching
from dycoke_jax.training.batches import Example, pack
from dycoke_jax.training.loss import Thinning
from dycoke_jax.training.records import RecordSource, read_records
from dycoke_jax.training.run import Intervals, Shapes, train
from dycoke_jax.training.scoring import HeldOut, accuracy, task_held_out
from dycoke_jax.training.sources import BatchShape, Source, Stage, TaskSource, ThinningMix
from dycoke_jax.training.step import Optimisation

MODEL = "model"


@dataclass(frozen=True)
class FineTuning:
    """What to fine-tune, and on what.

    Attributes:
        model: folder or hub id of the checkpoint to start from.
        data: JSONL file of records; None is the built-in task.
        test_data: records to evaluate on in between; None evaluates the built-in task's test
            split where that is what is trained on, and else nothing.
        sampling: frames of a clip.
        shape: of a step.
        thinning: how often visual tokens are left out.
        optimisation: see there.
        seed: of the order of the data, and of random thinning.
    """

    model: str
    data: Path | None
    test_data: Path | None
    sampling: FrameSampling
    shape: BatchShape
    thinning: ThinningMix
    optimisation: Optimisation
    seed: int = 0


def fine_tune(
    folder: Path, what: FineTuning, intervals: Intervals, progress: Progress | None = None
) -> Path:
    """Fine-tunes a checkpoint.

    Returns:
        The folder of the trained model.

    Raises:
        DycokeError: saying what is wrong with model, data, settings or folder.
    """
    checkpoint = open_checkpoint(what.model)
    config, size = checkpoint.config, checkpoint.config.vision.image_size
    tokenizer = checkpoint.tokenizer
    if what.data is None and what.sampling.fps is not None:
        raise ConfigError("fps is for clips from files; the built-in task has frames only")
    held_out = None
    if what.data is None:
        scenes = SceneSettings(what.sampling.frames)
        stage = Stage(what.optimisation.steps, scenes, what.shape, what.thinning)
        source: Source = TaskSource(tokenizer, size, (stage,), what.seed)
        held_out = task_held_out(tokenizer, size, what.sampling.frames)
    else:
        records = tuple(read_records(what.data))
        source = RecordSource(
            records, tokenizer, size, what.sampling, what.shape, what.thinning, what.seed
        )
        _ = source.rows  # refuses records that do not fit, before anything is loaded
    if what.test_data is not None:
        batches = []
        for record in read_records(what.test_data):
            frames = read_clip(record.video, what.sampling, size).frames
            example = Example(frames, [record.question], [record.answer])
            batches.append(pack(tokenizer, [example], what.shape.width))
        held_out = HeldOut(batches, [[["all"]]] * len(batches))
    described = dataclasses.asdict(what) | {"model": str(checkpoint.folder.path)}

    def save_tokenizer(target: Path) -> None:
        copy_companions(checkpoint.folder.path, target)

    return _run(
        folder,
        config,
        lambda: checkpoint.load(np.float32),
        source,
        what.optimisation,
        described,
        what.seed,
        held_out,
        save_tokenizer,
        intervals,
        progress,
    )


def from_scratch(
    folder: Path,
    intervals: Intervals,
    seed: int = 0,
    progress: Progress | None = None,
) -> Path:
    """The recipe of the checkpoint that ships with the package; see ``training.tiny``.

    Args:
        folder: of the run.
        intervals: see there.
        seed: of everything random.
        progress: called after each step.

    Returns:
        The folder of the trained model.
    """
    words = folder.absolute().parent / f".{folder.name}.tokenizer"
    try:
        tiny.save_tokenizer(words)
        tokenizer = load_tokenizer(words)
    finally:
        shutil.rmtree(words, ignore_errors=True)
    described = {
        "recipe": "tiny",
        "lessons": {"align": alignment.STEPS, "watch": watching.STEPS},
        "sizes": dataclasses.asdict(TINY),
        "stages": [dataclasses.asdict(stage) for stage in tiny.STAGES],
        "optimisation": dataclasses.asdict(tiny.OPTIMISATION),
        "seed": seed,
    }
    return _run(
        folder,
        TINY,
        lambda: tiny.initial(tokenizer, seed, progress),
        tiny.source(tokenizer, seed),
        tiny.OPTIMISATION,
        described,
        seed,
        task_held_out(tokenizer, TINY.vision.image_size),
        tiny.save_tokenizer,
        intervals,
        progress,
        {watching.READERS: watching.readers_shape(TINY)},
    )


def _run(
    folder: Path,
    config: LlavaConfig,
    initial: Callable[[], Params],
    source: Source,
    optimisation: Optimisation,
    described: Mapping[str, Any],
    seed: int,
    held_out: HeldOut | None,
    save_tokenizer: Callable[[Path], None],
    intervals: Intervals,
    progress: Progress | None,
    beside: Shapes | None = None,
) -> Path:
    def evaluate(params: Params) -> dict[str, Any]:
        assert held_out is not None
        dtype = optimisation.dtype
        return {
            "full": accuracy(config, params, held_out, dtype=dtype),
            "merged": accuracy(config, params, held_out, Thinning(0.7), dtype),
        }

    params = train(
        folder,
        config,
        initial,
        source,
        optimisation,
        described=described,
        seed=seed,
        intervals=intervals,
        evaluate=evaluate if held_out is not None else None,
        beside=beside,
        progress=progress,
    )
    trained = folder / MODEL
    if trained.exists():  # a finished run was started again: nothing was left to do
        return trained
    save_llava_hf(
        trained,
        config,
        lambda paths: ((path, jax.device_get(params[path])) for path in paths),
        save_tokenizer,
    )
    return trained
