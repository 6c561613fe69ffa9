"""Sources of training data, among them the built-in task.

A source is a pure function of the step. So a resumed run gets the same batches as an uninterrupted
one from the number of its step alone.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax

from dycoke_jax.checks import whole_number
from dycoke_jax.inputs.prompts import Tokenizer
from dycoke_jax.tasks.pictures import draw
from dycoke_jax.tasks.scenes import SceneSettings
from dycoke_jax.tasks.task import Split, task_clip
from dycoke_jax.training.batches import Batch, Example, pack
from dycoke_jax.training.loss import AuxiliaryLoss
from dycoke_jax.training.token_dropping import TokenDroppingMix, TokenSelection


class StepData(NamedTuple):
    """The data and the losses of one training step."""

    batch: Batch
    """The examples; the first axis of every array is that of gradient accumulation."""
    dropping: TokenSelection | None = None
    """Which visual tokens are dropped. None: all are kept."""
    auxiliary: tuple[AuxiliaryLoss, ...] = ()
    """Auxiliary losses that are added to the loss of the answers."""
    targets: Any = None
    """Pytree of targets for the auxiliary losses, with leading axes of accumulation and rows."""


@runtime_checkable
class Source(Protocol):
    """A source of training data."""

    def step(self, number: int) -> StepData:
        """The data of a step.

        Args:
            number: number of the step, from 0. The same number always gives the same data.

        Raises:
            DycokeError: if there is no data for the step, or if it cannot be read or packed.
        """


@dataclass(frozen=True)
class BatchShape:
    """Sizes of a training step.

    Attributes:
        rows: clips whose gradient is computed at a time, at least 1.
        accumulate: number of such gradients that are summed in a step, at least 1.
        width: slots of a row for questions and answers, in tokens, at least 1.

    Raises:
        ConfigError: naming the size that is no whole number of at least 1.
    """

    rows: int = 2
    accumulate: int = 8
    width: int = 224

    def __post_init__(self) -> None:
        for name in ("rows", "accumulate", "width"):
            object.__setattr__(self, name, whole_number(name, getattr(self, name), 1))

    @property
    def examples(self) -> int:
        """Number of examples of a step: ``rows * accumulate``."""
        return self.rows * self.accumulate

    def pack(self, tokenizer: Tokenizer, examples: Sequence[Example]) -> Batch:
        """Packs the examples of a step into a batch with a leading accumulation axis.

        Args:
            tokenizer: the tokenizer of the model.
            examples: exactly ``self.examples`` examples with the same number of frames.

        Raises:
            RequestError: as ``batches.pack`` does.
            PromptError: as ``batches.pack`` does.
        """
        return self.split(pack(tokenizer, examples, self.width))

    def split(self, arrays: Any) -> Any:
        """Reshapes arrays [examples, ...] of a pytree to [accumulate, rows, ...]."""
        steps = self.accumulate, self.rows
        return jax.tree.map(lambda x: x.reshape(*steps, *x.shape[1:]), arrays)


@dataclass(frozen=True)
class TaskSource:
    """A source of new clips of the built-in task at each step; no clip is used twice.

    Attributes:
        tokenizer: the tokenizer of the model.
        size: height and width of the input of the vision tower, in pixels.
        scenes: number of frames of a clip and of things in it.
        shape: sizes of a training step.
        dropping: shares of the steps that drop visual tokens.
        seed: seed of the clips and of token dropping, 0 or more.
    """

    tokenizer: Tokenizer
    size: int
    scenes: SceneSettings
    shape: BatchShape
    dropping: TokenDroppingMix = field(default_factory=TokenDroppingMix)
    seed: int = 0

    def step(self, number: int) -> StepData:
        """The data of a step, see ``Source.step``.

        Raises:
            RequestError: if the first question of a clip does not fit into a row.
        """
        first = (self.seed << 40) + number * self.shape.examples
        examples = [
            task_example("train", clip, self.scenes, self.size)
            for clip in range(first, first + self.shape.examples)
        ]
        batch = self.shape.pack(self.tokenizer, examples)
        return StepData(batch, self.dropping.choose(number, self.seed))


def task_example(split: Split, number: int, scenes: SceneSettings, size: int) -> Example:
    """A clip of the built-in task with all its questions.

    Args:
        split: split of the task, "train" or "test".
        number: number of the clip in the split, from 0.
        scenes: number of frames of the clip and of things in it.
        size: height and width of the frames in pixels.
    """
    clip = task_clip(split, number, scenes)
    texts = [question.text for question in clip.questions]
    answers = [question.answer for question in clip.questions]
    return Example(draw(clip.scene, size), texts, answers)
