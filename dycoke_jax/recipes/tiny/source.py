"""The fine-tuning stages on the built-in task, as a source of training data."""

from dataclasses import dataclass, field

import jax.numpy as jnp
import numpy as np

from dycoke_jax.errors import ConfigError
from dycoke_jax.inputs.prompts import Tokenizer
from dycoke_jax.recipes.tiny.attention_distillation import AttentionDistillation
from dycoke_jax.recipes.tiny.probes import ProbeLoss, probe_targets
from dycoke_jax.tasks.pictures import draw
from dycoke_jax.tasks.questions import short_questions
from dycoke_jax.tasks.scenes import SceneSettings
from dycoke_jax.tasks.task import task_clip
from dycoke_jax.training.batches import Example
from dycoke_jax.training.loss import AuxiliaryLoss
from dycoke_jax.training.sources import BatchShape, StepData
from dycoke_jax.training.token_dropping import TokenDroppingMix


@dataclass(frozen=True)
class Stage:
    """A fine-tuning stage: a number of steps with the same kind of data and losses.

    Attributes:
        steps: number of steps, 0 or more.
        scenes: number of frames of a clip and of things in it.
        shape: sizes of a training step.
        dropping: shares of the steps that drop visual tokens.
        short: whether the questions are short ones about every thing (``short_questions``) instead
            of those of the task.
        distilled_layer: ``AttentionDistillation.pruned_layer``, or 0 for no attention distillation.
        other: a stage that gives the data and losses of every second step, or None. Its own
            ``steps`` and ``other`` are ignored.
    """

    steps: int
    scenes: SceneSettings
    shape: BatchShape
    dropping: TokenDroppingMix = field(default_factory=TokenDroppingMix)
    short: bool = False
    distilled_layer: int = 0
    other: "Stage | None" = None

    def turn(self, step: int) -> "Stage":
        """The stage that gives the data of a step: ``self``, or ``other`` for odd steps.

        Args:
            step: number of the step, counted from 0 at the first step of the stage.
        """
        return self.other if self.other and step % 2 else self

    @property
    def clips(self) -> int:
        """Largest number of clips that a step of the stage takes."""
        return max(self.shape.examples, self.other.shape.examples if self.other else 0)


@dataclass(frozen=True)
class StagedSource:
    """A source of new clips of the built-in task at each step, with probe targets.

    Attributes:
        tokenizer: the tokenizer of the model.
        size: height and width of the input of the vision tower, in pixels.
        stages: the stages, in the order in which they run.
        seed: seed of the clips and of token dropping, 0 or more.
    """

    tokenizer: Tokenizer
    size: int
    stages: tuple[Stage, ...]
    seed: int = 0

    def step(self, number: int) -> StepData:
        """The data of a step, see ``training.sources.Source.step``.

        Raises:
            ConfigError: if the step lies beyond the last stage.
            RequestError: if the first question of a clip does not fit into a row.
        """
        first_clip, first_step = self.seed << 40, 0
        for stage in self.stages:
            if number < first_step + stage.steps:
                break
            first_step += stage.steps
            first_clip += stage.steps * stage.clips
        else:
            raise ConfigError(f"step {number} is beyond the last stage")
        first_clip += (number - first_step) * stage.clips
        stage = stage.turn(number - first_step)
        clips = range(first_clip, first_clip + stage.shape.examples)
        examples, targets = zip(*(self._clip(stage, clip) for clip in clips), strict=True)
        auxiliary: tuple[AuxiliaryLoss, ...] = (ProbeLoss(),)
        if stage.distilled_layer:
            auxiliary = (*auxiliary, AttentionDistillation(stage.distilled_layer))
        return StepData(
            batch=stage.shape.pack(self.tokenizer, examples),
            dropping=stage.dropping.choose(number, self.seed),
            auxiliary=auxiliary,
            targets=stage.shape.split(jnp.asarray(np.stack(targets))),
        )

    def _clip(self, stage: Stage, number: int) -> tuple[Example, np.ndarray]:
        """A clip with its questions, and its probe targets."""
        clip = task_clip("train", number, stage.scenes)
        scene, questions = clip.scene, clip.questions
        if stage.short:
            questions = tuple(short_questions(scene, np.random.default_rng([number, 4])))
        texts, answers = [q.text for q in questions], [q.answer for q in questions]
        return Example(draw(scene, self.size), texts, answers), probe_targets(scene)
