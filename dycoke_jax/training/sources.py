"""Where training batches come from, and the built-in task as such a source.

A source is a pure function of the step. So a run that is resumed needs nothing but the number of
its step to see the batches that it would have seen.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax

from dycoke_jax.errors import ConfigError
from dycoke_jax.inputs.prompts import Tokenizer
from dycoke_jax.tasks.pictures import draw
from dycoke_jax.tasks.scenes import SceneSettings
from dycoke_jax.tasks.task import Split, task_clip
from dycoke_jax.training.batches import Batch, Example, pack
from dycoke_jax.training.loss import AuxiliaryLoss
from dycoke_jax.training.token_dropping import TokenDropping, TokenDroppingMix


class StepData(NamedTuple):
    """What one training step takes."""

    batch: Batch
    """Its first axis is that of gradient accumulation."""
    dropping: TokenDropping | None = None
    """Visual tokens to drop."""
    auxiliary: tuple[AuxiliaryLoss, ...] = ()
    """Losses to be added to that of the answers."""
    targets: Any = None
    """A pytree for the auxiliary losses, with the batch's two leading axes."""


@runtime_checkable
class Source(Protocol):
    """Gives the data of every step."""

    def step(self, number: int) -> StepData:
        """The data of a step, counted from 0; the same whenever it is asked for."""


@dataclass(frozen=True)
class BatchShape:
    """Sizes of a training step, each at least 1.

    Attributes:
        rows: clips whose gradient is computed at a time.
        accumulate: number of such gradients that are summed before the weights change.
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
        """Packs ``self.examples`` examples, with an axis for accumulation in front."""
        return self.split(pack(tokenizer, examples, self.width))

    def split(self, arrays: Any) -> Any:
        """Splits the leading axis of every array of a pytree into accumulation and rows."""
        steps = self.accumulate, self.rows
        return jax.tree.map(lambda x: x.reshape(*steps, *x.shape[1:]), arrays)


@dataclass(frozen=True)
class TaskSource:
    """Fresh clips of the built-in task at every step.

    Attributes:
        tokenizer: the model's.
        size: pixels a side that the tower takes.
        scenes: what the clips show.
        shape: of a step.
        dropping: how often visual tokens are dropped.
        seed: of the clips and of dropping.
    """

    tokenizer: Tokenizer
    size: int
    scenes: SceneSettings
    shape: BatchShape
    dropping: TokenDroppingMix = field(default_factory=TokenDroppingMix)
    seed: int = 0

    def step(self, number: int) -> StepData:
        """The data of a step; see ``Source``."""
        first = (self.seed << 40) + number * self.shape.examples
        examples = [
            task_example("train", clip, self.scenes, self.size)
            for clip in range(first, first + self.shape.examples)
        ]
        batch = self.shape.pack(self.tokenizer, examples)
        return StepData(batch, self.dropping.choose(number, self.seed))


def task_example(split: Split, number: int, scenes: SceneSettings, size: int) -> Example:
    """A clip of the built-in task with all its questions."""
    clip = task_clip(split, number, scenes)
    texts = [question.text for question in clip.questions]
    answers = [question.answer for question in clip.questions]
    return Example(draw(clip.scene, size), texts, answers)
