"""Where training batches come from, and the built-in task as such a source.

A source is a pure function of the step. So a run that is resumed needs nothing but the number of
its step to see the batches that it would have seen.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

import jax
import numpy as np

from dycoke_jax.errors import ConfigError
from dycoke_jax.inputs.prompts import Tokenizer
from dycoke_jax.tasks.pictures import draw
from dycoke_jax.tasks.questions import Question, drill
from dycoke_jax.tasks.scenes import Scene, SceneSettings
from dycoke_jax.tasks.task import Split, task_clip
from dycoke_jax.training.batches import Batch, Example, pack
from dycoke_jax.training.loss import Thinning
from dycoke_jax.training.watching import facts_of


@runtime_checkable
class Source(Protocol):
    """Gives the batch of every step."""

    def batch(self, step: int) -> tuple[Batch, Thinning | None]:
        """The batch, its first axis for accumulation, and which visual tokens to leave out."""


@dataclass(frozen=True)
class BatchShape:
    """Sizes of a step.

    Attributes:
        rows: clips whose gradient is computed at a time.
        accumulate: times that this is done before the weights change.
        width: slots of a row for questions and answers.
    """

    rows: int = 2
    accumulate: int = 8
    width: int = 224

    def __post_init__(self) -> None:
        for name in ("rows", "accumulate", "width"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}; it must be at least 1")

    @property
    def examples(self) -> int:
        """Clips of a step."""
        return self.rows * self.accumulate

    def pack(self, tokenizer: Tokenizer, examples: Sequence[Example]) -> Batch:
        """As many examples as a step takes, as arrays."""
        packed = pack(tokenizer, examples, self.width)
        steps = self.accumulate, self.rows
        return jax.tree.map(lambda x: x.reshape(*steps, *x.shape[1:]), packed)


@dataclass(frozen=True)
class ThinningMix:
    """How often steps leave out visual tokens.

    Attributes:
        merged: share of the steps with temporal token merging.
        random: share of the steps that drop as many tokens at random.
        k: share of a compared frame's tokens that goes.
        pruned_layer: of all steps, see ``Thinning``.
    """

    merged: float = 0.0
    random: float = 0.0
    k: float = 0.7
    pruned_layer: int = 0

    def __post_init__(self) -> None:
        if min(self.merged, self.random) < 0 or self.merged + self.random > 1:
            raise ConfigError("the shares of thinned steps must be 0 or more and 1 at most in all")
        if not 0 <= self.k < 1:
            raise ConfigError(f"k is {self.k}; it must lie in [0, 1)")

    def choose(self, step: int, seed: int) -> Thinning | None:
        """What a step does."""
        drawn = np.random.default_rng([seed, step, 3]).random()
        if drawn >= self.merged + self.random:
            return Thinning(0, pruned_layer=self.pruned_layer) if self.pruned_layer else None
        at_random = drawn >= self.merged
        return Thinning(self.k, at_random=at_random, pruned_layer=self.pruned_layer)


@dataclass(frozen=True)
class Stage:
    """Some steps of training on the built-in task.

    Attributes:
        steps: how many.
        scenes: what the clips show.
        shape: of a step.
        thinning: how often visual tokens are left out.
        drill: ask short questions about every thing instead of those of the task.
        other: gives the batch of every second step; its own ``steps`` do not count.
    """

    steps: int
    scenes: SceneSettings
    shape: BatchShape
    thinning: ThinningMix = field(default_factory=ThinningMix)
    drill: bool = False
    other: "Stage | None" = None

    def turn(self, step: int) -> "Stage":
        """Which of the two gives the batch of a step, counted from the stage's first."""
        return self.other if self.other and step % 2 else self

    @property
    def clips(self) -> int:
        """Clips that a step draws at most."""
        return max(self.shape.examples, self.other.shape.examples if self.other else 0)


@dataclass(frozen=True)
class TaskSource:
    """Fresh clips of the built-in task at every step, stage after stage."""

    tokenizer: Tokenizer
    size: int
    stages: tuple[Stage, ...]
    seed: int = 0
    with_facts: bool = False
    """Whether examples carry what is known of each visual token, see ``watching``."""

    def batch(self, step: int) -> tuple[Batch, Thinning | None]:
        """See ``Source``."""
        first_clip, first_step = self.seed << 40, 0
        for stage in self.stages:
            if step < first_step + stage.steps:
                break
            first_step += stage.steps
            first_clip += stage.steps * stage.clips
        else:
            raise ConfigError(f"step {step} is beyond the last stage")
        first_clip += (step - first_step) * stage.clips
        stage = stage.turn(step - first_step)
        numbers = range(first_clip, first_clip + stage.shape.examples)
        example = drill_example if stage.drill else task_example
        examples = [
            example("train", number, stage.scenes, self.size, with_facts=self.with_facts)
            for number in numbers
        ]
        return stage.shape.pack(self.tokenizer, examples), stage.thinning.choose(step, self.seed)


def task_example(
    split: Split, number: int, scenes: SceneSettings, size: int, *, with_facts: bool = False
) -> Example:
    """A clip of the built-in task with all its questions."""
    clip = task_clip(split, number, scenes)
    return _example(clip.scene, clip.questions, size, with_facts)


def drill_example(
    split: Split, number: int, scenes: SceneSettings, size: int, *, with_facts: bool = False
) -> Example:
    """A clip of the built-in task with short questions about every thing."""
    scene = task_clip(split, number, scenes).scene
    return _example(scene, drill(scene, np.random.default_rng([number, 4])), size, with_facts)


def _example(scene: Scene, questions: Sequence[Question], size: int, with_facts: bool) -> Example:
    texts = [question.text for question in questions]
    answers = [question.answer for question in questions]
    return Example(draw(scene, size), texts, answers, facts_of(scene) if with_facts else None)
