"""Settings of the recipe, and the whole of it: what ``dycoke-jax train-tiny`` does."""

import dataclasses
import tempfile
from pathlib import Path

from dycoke_jax.checkpoint.tokenizer import load_tokenizer
from dycoke_jax.compression.dycoke import DyCoke
from dycoke_jax.config import TINY
from dycoke_jax.inputs.prompts import Tokenizer
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
    # Most answer tokens of the whole task are those of its long answers, so what the short ones
    # need is practised first. Single pictures help: there, things are soon found by their shape.
    Stage(500, _FEW, _CLIPS, short=True),
    Stage(400, _FEW, _CLIPS, short=True, other=_PICTURES),
    # The whole task.
    Stage(2100, _ALL, _CLIPS, _HALF_DROPPED),
    # The directions of several moving things are still confused, so short questions return.
    Stage(800, _ALL, _CLIPS, _HALF_MERGED, other=_SHORT),
    # The layer that chooses for KV pruning learns to attend to what later layers read.
    Stage(800, _ALL, _CLIPS, _HALF_MERGED, distilled_layer=DyCoke().layer),
)
OPTIMISATION = Optimisation(
    steps=sum(stage.steps for stage in STAGES),
    learning_rate=2e-3,
    cycles=(Cycle(3000, 1e-3), Cycle(3800, 1e-3)),
    tower=0,
    projector=0,
)


def train_tiny(
    folder: Path, intervals: Intervals, seed: int = 0, progress: Progress | None = None
) -> Path:
    """Makes the tiny model anew, or goes on where a run in the folder was cut off.

    Args:
        folder: of the run.
        intervals: how often the run logs, evaluates and saves.
        seed: of everything random.
        progress: called after each step of each stage.

    Returns:
        The folder of the trained model.
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
        evaluate=both_accuracies(TINY, task_held_out(tokenizer, size), OPTIMISATION.dtype),
        extra={probes.PROBES: probes.probes_shape(TINY)},
    )
    return train_and_save(run, progress)


def initial(tokenizer: Tokenizer, seed: int = 0, progress: Progress | None = None) -> Params:
    """The weights that fine-tuning starts from: random ones after both pre-training stages.

    Args:
        tokenizer: see ``save_task_tokenizer``.
        seed: of the random weights.
        progress: called after each pre-training step.
    """
    aligned = alignment.align(TINY, random_weights(seed), tokenizer, progress)
    return probes.train_probes(TINY, aligned, progress)


def random_weights(seed: int) -> Params:
    """Random weights, of a larger scale than large models start from.

    Layers as narrow as these would learn slowly at first with the usual scale.
    """
    params = {}
    for path, weight in random_params(TINY, seed).items():
        is_matrix = weight.ndim > 1 and "embed" not in path
        scale = 0.7 * weight[0].size ** -0.5 / 0.02 if is_matrix else 1.0
        params[path] = weight * scale
    return params
