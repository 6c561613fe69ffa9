"""Settings of the recipe, and the function that runs it for ``dycoke-jax train-tiny``."""

import dataclasses
import tempfile
from functools import partial
from pathlib import Path

import numpy as np

from dycoke_jax.checkpoint import open_checkpoint
from dycoke_jax.checkpoint.tokenizer import load_tokenizer
from dycoke_jax.compression.dycoke import DyCoke
from dycoke_jax.config import TINY
from dycoke_jax.errors import ConfigError
from dycoke_jax.inputs.prompts import Tokenizer
from dycoke_jax.model import Model
from dycoke_jax.models.llava import Params, random_params
from dycoke_jax.progress import Progress
from dycoke_jax.recipes.tiny import alignment, probes
from dycoke_jax.recipes.tiny.drawn_budgets import DrawnBudgets
from dycoke_jax.recipes.tiny.source import Stage, StagedSource
from dycoke_jax.recipes.tiny.tokenizer import save_task_tokenizer
from dycoke_jax.tasks.scenes import SceneSettings
from dycoke_jax.training.run import Intervals, Run, train_and_save
from dycoke_jax.training.scoring import accuracies, task_held_out
from dycoke_jax.training.sources import BatchShape
from dycoke_jax.training.step import Cycle, Optimisation
from dycoke_jax.training.token_dropping import TokenDropping, TokenDroppingMix

_CLIPS = BatchShape(rows=2, accumulate=8, width=224)
_FEW, _ALL = SceneSettings(16, 1, 5), SceneSettings(16, 2, 5)
_HALF_DROPPED = TokenDroppingMix(merged=0.3, random=0.3, k=0.7)
_HALF_MERGED = TokenDroppingMix(merged=0.5, random=0.1, k=0.7)
_MOST_TOKENS = 256
"""Visual tokens that the model reads of a clip at most, as many as clips of 16 frames have."""
_PICTURES = Stage(0, SceneSettings(1, 2, 6), BatchShape(24, accumulate=1, width=200), short=True)
_SHORT = Stage(0, _ALL, _CLIPS, _HALF_MERGED, short=True)


def _budgets(
    frames: int, sampled: int = 0, *, steps: int = 0, others: tuple[Stage, ...] = ()
) -> Stage:
    """A stage that draws the number of kept tokens, on clips of this many frames."""
    return Stage(
        steps,
        SceneSettings(frames, 2, 5),
        _CLIPS,
        DrawnBudgets(_MOST_TOKENS),
        sampled=sampled,
        probed=False,
        distilled_layer=DyCoke().layer,
        others=others,
    )


_IN_TURN = (
    *(_budgets(16) for _ in range(3)),
    *(_budgets(128, sampled) for sampled in (16, 32, 64, 128)),
)

STAGES = (
    # Most answer tokens of the task belong to its long answers, so short questions come first, for
    # what their answers need. Single pictures help: there the model soon learns to find things by
    # their shape.
    Stage(500, _FEW, _CLIPS, short=True),
    Stage(400, _FEW, _CLIPS, short=True, others=(_PICTURES,)),
    # All questions of the task.
    Stage(2100, _ALL, _CLIPS, _HALF_DROPPED),
    # The model still confuses the directions of several moving things, so every second step has
    # short questions again.
    Stage(800, _ALL, _CLIPS, _HALF_MERGED, others=(_SHORT,)),
    # Attention distillation prepares the model for KV pruning.
    Stage(800, _ALL, _CLIPS, _HALF_MERGED, distilled_layer=DyCoke().layer),
    # Any number of tokens, chosen in many ways, also from clips that are longer than the language
    # model could read whole. The same once more, for what long answers still lack.
    _budgets(16, steps=2400, others=_IN_TURN),
    _budgets(16, steps=1000, others=_IN_TURN),
)
"""The stages of fine-tuning, in order."""
_MONITORED = {"full": None, **{f"merged k={k}": TokenDropping(k) for k in (0.3, 0.7)}}
"""What evaluations during the run measure."""
_BEFORE_LAST = sum(stage.steps for stage in STAGES[:-1])
OPTIMISATION = Optimisation(
    steps=_BEFORE_LAST + STAGES[-1].steps,
    learning_rate=2e-3,
    cycles=(Cycle(3000, 1e-3), Cycle(3800, 1e-3), Cycle(4600, 1e-3), Cycle(_BEFORE_LAST, 7e-4)),
    tower=0,
    projector=0,
)
"""Settings of the optimiser in fine-tuning. The last four stages each start a new cycle."""


def train_tiny(
    folder: Path,
    intervals: Intervals,
    seed: int = 0,
    progress: Progress | None = None,
    *,
    model: str | None = None,
) -> Path:
    """Trains the tiny model from random weights, or resumes an interrupted run.

    An interrupted run is resumed from its last checkpoint of fine-tuning; before the first of them,
    it starts from the beginning.

    Args:
        folder: folder of the run; it is made if absent.
        intervals: how often fine-tuning logs, evaluates and saves.
        seed: seed of the random weights, the clips and token dropping, 0 or more.
        progress: called after each training step.
        model: folder or hub id of a tiny model that is through all stages but the last, which alone
            is run then. None: all stages are run.

    Returns:
        The folder of the trained model.

    Raises:
        ConfigError: if the folder holds a run with other settings, or if ``model`` is of another
            size.
        CheckpointError: if the folder holds other files, cannot be written, or holds a checkpoint
            that cannot be read.
    """
    checkpoint = None if model is None else open_checkpoint(model)
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
    source = StagedSource(tokenizer, size, STAGES, seed)
    run = Run(
        folder=folder,
        config=TINY,
        initial=lambda: initial(tokenizer, seed, progress),
        source=source,
        optimisation=OPTIMISATION,
        save_tokenizer=save_task_tokenizer,
        described=described,
        seed=seed,
        intervals=intervals,
        evaluate=partial(accuracies, held_out=task_held_out(tokenizer, size), settings=_MONITORED),
        extra={probes.PROBES: probes.probes_shape(TINY)},
    )
    if checkpoint is not None:
        if checkpoint.config != TINY:
            raise ConfigError(f"{model} has other sizes than the tiny model of this recipe")
        last = dataclasses.replace(
            OPTIMISATION,
            steps=STAGES[-1].steps,
            learning_rate=OPTIMISATION.cycles[-1].learning_rate,
            cycles=(),
        )
        run = dataclasses.replace(
            run,
            initial=lambda: checkpoint.load(np.float32),
            source=dataclasses.replace(source, first_step=_BEFORE_LAST),
            optimisation=last,
            described=described | {"optimisation": dataclasses.asdict(last), "model": model},
            extra={},
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
