"""The fine-tuning stages on the built-in task, as a source of training data."""

from dataclasses import dataclass, field

import jax.numpy as jnp
import numpy as np

from dycoke_jax.errors import ConfigError
from dycoke_jax.inputs.prompts import Tokenizer
from dycoke_jax.inputs.sampling import FrameSampling, frame_indices
from dycoke_jax.recipes.tiny.attention_distillation import AttentionDistillation
from dycoke_jax.recipes.tiny.drawn_budgets import DrawnBudgets
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
        dropping: which visual tokens the steps drop.
        sampled: number of frames, spread evenly over the clip, that the model gets; 0 for all.
        probed: whether the probe loss is added.
        short: whether the questions are short ones about every thing (``short_questions``) instead
            of those of the task.
        distilled_layer: ``AttentionDistillation.pruned_layer``, or 0 for no attention distillation.
        others: stages that take turns with this one in giving the data and losses of a step; this
            one is first. Their own ``steps`` and ``others`` are ignored.
    """

    steps: int
    scenes: SceneSettings
    shape: BatchShape
    dropping: TokenDroppingMix | DrawnBudgets = field(default_factory=TokenDroppingMix)
    sampled: int = 0
    probed: bool = True
    short: bool = False
    distilled_layer: int = 0
    others: "tuple[Stage, ...]" = ()

    def turn(self, step: int) -> "Stage":
        """The stage that gives the data of a step: ``self`` or one of ``others``.

        Args:
            step: number of the step, counted from 0 at the first step of the stage.
        """
        return (self, *self.others)[step % (1 + len(self.others))]

    @property
    def clips(self) -> int:
        """Largest number of clips that a step of the stage takes."""
        return max(stage.shape.examples for stage in (self, *self.others))


@dataclass(frozen=True)
class StagedSource:
    """A source of new clips of the built-in task at each step, with probe targets.

    Attributes:
        tokenizer: the tokenizer of the model.
        size: height and width of the input of the vision tower, in pixels.
        stages: the stages, in the order in which they run.
        seed: seed of the clips and of token dropping, 0 or more.
        first_step: number of steps of the stages that are left out, counted from the first.
    """

    tokenizer: Tokenizer
    size: int
    stages: tuple[Stage, ...]
    seed: int = 0
    first_step: int = 0

    def step(self, number: int) -> StepData:
        """The data of a step, see ``training.sources.Source.step``.

        Raises:
            ConfigError: if the step lies beyond the last stage.
            RequestError: if the first question of a clip does not fit into a row.
        """
        number += self.first_step
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
        auxiliary: tuple[AuxiliaryLoss, ...] = (ProbeLoss(),) if stage.probed else ()
        if stage.distilled_layer:
            auxiliary = (*auxiliary, AttentionDistillation(stage.distilled_layer))
        return StepData(
            batch=stage.shape.pack(self.tokenizer, examples),
            dropping=stage.dropping.choose(number, self.seed),
            auxiliary=auxiliary,
            targets=stage.shape.split(jnp.asarray(np.stack(targets))) if stage.probed else None,
        )

    def _clip(self, stage: Stage, number: int) -> tuple[Example, np.ndarray]:
        """A clip with its questions, and its probe targets."""
        clip = task_clip("train", number, stage.scenes)
        scene, questions = clip.scene, clip.questions
        if stage.short:
            questions = tuple(short_questions(scene, np.random.default_rng([number, 4])))
        texts, answers = [q.text for q in questions], [q.answer for q in questions]
        shown = np.arange(scene.frames)
        if stage.sampled:
            shown = frame_indices(scene.frames, 1.0, FrameSampling(stage.sampled))
        frames, targets = draw(scene, self.size)[shown], probe_targets(scene)[shown]
        return Example(frames, texts, answers), targets
