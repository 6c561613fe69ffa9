"""Accuracy of answers during training, without generating them.

Greedy decoding generates an answer exactly if each of its tokens has the highest logit given the
tokens before it. So one forward pass over a packed batch gives the accuracy of greedy decoding on
all its questions. This holds without KV pruning, which acts in decode steps only.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jax
import numpy as np

from dycoke_jax.inputs.prompts import Tokenizer
from dycoke_jax.model import Model
from dycoke_jax.sharding import data_size
from dycoke_jax.tasks.scenes import SceneSettings
from dycoke_jax.tasks.task import MONITORED, task_clip
from dycoke_jax.training.batches import Batch, fill_rows, pack
from dycoke_jax.training.loss import score_answers
from dycoke_jax.training.sources import task_example
from dycoke_jax.training.token_dropping import TokenDropping, TokenSelection

FULL_AND_MERGED: Mapping[str, TokenSelection | None] = {"full": None, "merged": TokenDropping(0.7)}
"""All visual tokens, and those that temporal token merging keeps with its default k."""

_score = jax.jit(score_answers, static_argnames="dropping")


class HeldOut(NamedTuple):
    """A held-out set of questions."""

    batches: Sequence[Batch]
    """The packed questions, without an accumulation axis."""
    kinds: Sequence[Sequence[Sequence[str]]]
    """The kind of each question, by batch, row and part (in order, from part 1)."""


def task_held_out(tokenizer: Tokenizer, size: int, frames: int = 16) -> HeldOut:
    """The held-out set of the built-in task: the first ``MONITORED`` clips of its test split.

    Args:
        tokenizer: the tokenizer of the model.
        size: height and width of the input of the vision tower, in pixels.
        frames: number of frames of a clip, at least 1.

    Returns:
        All questions of these clips, in batches of 8 clips.

    Raises:
        RequestError: if with this tokenizer the first question of a clip takes over 256 tokens.
    """
    scenes = SceneSettings(frames)
    batches, kinds = [], []
    for first in range(0, MONITORED, 8):
        numbers = range(first, first + 8)
        examples = [task_example("test", number, scenes, size) for number in numbers]
        batches.append(pack(tokenizer, examples, 256))
        clips = [task_clip("test", number, scenes) for number in numbers]
        kinds.append([[question.kind for question in clip.questions] for clip in clips])
    return HeldOut(batches, kinds)


def accuracy(
    model: Model,
    held_out: HeldOut,
    dropping: TokenSelection | None = None,
) -> dict[str, float]:
    """Computes the loss and the share of right answers on a held-out set.

    Args:
        model: the model.
        held_out: the held-out set.
        dropping: which visual tokens are dropped. None: all are kept.

    Returns:
        Under "loss", the mean cross entropy of an answer token in nats. Under "accuracy", the share
        of right answers, in [0, 1]. Under each kind of question, the share for that kind. All are
        rounded to four decimals.
    """
    right, asked = Counter[str](), Counter[str]()
    loss = tokens = 0.0
    for batch, kinds in zip(held_out.batches, held_out.kinds, strict=True):
        filled = fill_rows(batch, data_size(model.mesh))
        scores = _score(model, filled, dropping=dropping, key=jax.random.key(0))
        loss, tokens = loss + float(scores.loss), tokens + int(scores.tokens)
        was_right, was_asked = np.asarray(scores.right), np.asarray(scores.asked)
        for row, of_row in enumerate(kinds):
            for part, kind in enumerate(of_row):
                asked[kind] += int(was_asked[row, part])
                right[kind] += int(was_right[row, part])
    by_kind = {kind: round(right[kind] / asked[kind], 4) for kind in sorted(asked)}
    whole = round(right.total() / max(asked.total(), 1), 4)
    return {"loss": round(loss / max(tokens, 1), 4), "accuracy": whole, **by_kind}


def accuracies(
    model: Model,
    held_out: HeldOut,
    settings: Mapping[str, TokenSelection | None] = FULL_AND_MERGED,
) -> dict[str, dict[str, float]]:
    """Computes ``accuracy`` with several ways of dropping visual tokens.

    Args:
        model: the model.
        held_out: the held-out set.
        settings: which visual tokens are dropped, by name. None: all are kept.

    Returns:
        The accuracies by the same names.
    """
    return {name: accuracy(model, held_out, dropping) for name, dropping in settings.items()}
