"""Settings of the recipe, and the function that runs it for ``dycoke-jax train-tiny``."""

import dataclasses
import tempfile
from functools import partial
from pathlib import Path

from dycoke_jax.checkpoint.tokenizer import load_tokenizer
from dycoke_jax.compression.dycoke import DyCoke
from dycoke_jax.config import TINY
from dycoke_jax.inputs.prompts import Tokenizer
from dycoke_jax.model import Model
from dycoke_jax.models.llava import Params, random_params
from dycoke_jax.progress import Progress
from dycoke_jax.recipes.tiny import alignment, probes
from dycoke_jax.recipes.tiny.source import Stage, StagedSource
from dycoke_jax.recipes.tiny.tokenizer import save_task_tokenizer
from dycoke_jax.tasks.scenes import SceneSettings
from dycoke_jax.training.run import Intervals, Run, train_and_save
from dycoke_jax.training.scoring import both_accuracies, task_held_out
from dycoke_jax.training.sources import BatchShape
from dycoke_jax.training.step import Cycle, Optimisation
from dycoke_jax.training.token_dropping import TokenDroppingMix

_CLIPS = BatchShape(rows=2, accumulate=8, width=224)
_FEW, _ALL = SceneSettings(16, 1, 5), SceneSettings(16, 2, 5)
_HALF_DROPPED = TokenDroppingMix(merged=0.3, random=0.3, k=0.7)
_HALF_MERGED = TokenDroppingMix(merged=0.5, random=0.1, k=0.7)
_PICTURES = Stage(0, SceneSettings(1, 2, 6), BatchShape(24, accumulate=1, width=200), short=True)
_SHORT = Stage(0, _ALL, _CLIPS, _HALF_MERGED, short=True)

STAGES = (
    # Most answer tokens of the task belong to its long answers, so short questions come first, for
    # what their answers need. Single pictures help: there the model soon learns to find things by
    # their shape.
    Stage(500, _FEW, _CLIPS, short=True),
    Stage(400, _FEW, _CLIPS, short=True, other=_PICTURES),
    # All questions of the task.
    Stage(2100, _ALL, _CLIPS, _HALF_DROPPED),
    # The model still confuses the directions of several moving things, so every second step has
    # short questions again.
    Stage(800, _ALL, _CLIPS, _HALF_MERGED, other=_SHORT),
    # Attention distillation prepares the model for KV pruning.
    Stage(800, _ALL, _CLIPS, _HALF_MERGED, distilled_layer=DyCoke().layer),
)
"""The stages of fine-tuning, in order."""
OPTIMISATION = Optimisation(
    steps=sum(stage.steps for stage in STAGES),
    learning_rate=2e-3,
    cycles=(Cycle(3000, 1e-3), Cycle(3800, 1e-3)),
    tower=0,
    projector=0,
)
"""Settings of the optimiser in fine-tuning. The last two stages each start a new cycle."""


def train_tiny(
    folder: Path, intervals: Intervals, seed: int = 0, progress: Progress | None = None
) -> Path:
    """Trains the tiny model from random weights, or resumes an interrupted run.

    An interrupted run is resumed from its last checkpoint of fine-tuning; before the first of them,
    it starts from the beginning.

    Args:
        folder: folder of the run; it is made if absent.
        intervals: how often fine-tuning logs, evaluates and saves.
        seed: seed of the random weights, the clips and token dropping, 0 or more.
        progress: called after each training step.

    Returns:
        The folder of the trained model.

    Raises:
        ConfigError: if the folder holds a run with other settings.
        CheckpointError: if the folder holds other files, cannot be written, or holds a checkpoint
            that cannot be read.
    """
    with tempfile.TemporaryDirectory() as files:
        save_task_tokenizer(Path(files))
        tokenizer = load_tokenizer(files)
    size = TINY.vision.image_size
    described = {
        "recipe": "tiny",
        "pre-training": {"alignment": alignment.STEPS, "probes": probes.STEPS},
        "config": dataclasses.asdict(TINY),
        "stages": [dataclasses.asdict(stage) for stage in STAGES],
        "optimisation": dataclasses.asdict(OPTIMISATION),
        "seed": seed,
    }
    run = Run(
        folder=folder,
        config=TINY,
        initial=lambda: initial(tokenizer, seed, progress),
        source=StagedSource(tokenizer, size, STAGES, seed),
        optimisation=OPTIMISATION,
        save_tokenizer=save_task_tokenizer,
        described=described,
        seed=seed,
        intervals=intervals,
        evaluate=partial(both_accuracies, held_out=task_held_out(tokenizer, size)),
        extra={probes.PROBES: probes.probes_shape(TINY)},
    )
    return train_and_save(run, progress)


def initial(tokenizer: Tokenizer, seed: int = 0, progress: Progress | None = None) -> Model:
    """Runs both pre-training stages on random weights.

    Args:
        tokenizer: the tokenizer that ``save_task_tokenizer`` writes.
        seed: seed of the random weights, 0 or more.
        progress: called after each training step.

    Returns:
        The model that fine-tuning starts from; its float32 weights hold the probes too, under
        ``probes.PROBES``.
    """
    aligned = alignment.align(Model(random_weights(seed), TINY), tokenizer, progress)
    return probes.train_probes(aligned, progress)


def random_weights(seed: int) -> Params:
    """Random float32 weights of the tiny model, of a larger scale than usual.

    The scale of a matrix is 0.7 / sqrt(fan-in). With the usual 0.02, layers as narrow as these
    learn slowly at first. Embeddings keep the usual scale.

    Args:
        seed: seed of the weights, 0 or more.
    """
    params = {}
    for path, weight in random_params(TINY, seed).items():
        is_matrix = weight.ndim > 1 and "embed" not in path
        scale = 0.7 * weight[0].size ** -0.5 / 0.02 if is_matrix else 1.0
        params[path] = weight * scale
    return params
