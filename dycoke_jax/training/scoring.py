"""Accuracy of answers while training, without generating them.

An answer whose every token is the most likely one, given those before it, is the answer that greedy
decoding gives. So one pass over a packed batch scores all its questions exactly, as long as nothing
is pruned while decoding.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from dycoke_jax.config import LlavaConfig
from dycoke_jax.inputs.prompts import Tokenizer
from dycoke_jax.models.llava import Params
from dycoke_jax.tasks.scenes import SceneSettings
from dycoke_jax.tasks.task import MONITORED, task_clip
from dycoke_jax.training.batches import Batch, pack
from dycoke_jax.training.loss import score_answers
from dycoke_jax.training.sources import task_example
from dycoke_jax.training.token_dropping import TokenDropping

_score = jax.jit(score_answers, static_argnames=("config", "dropping", "dtype"))


Evaluate = Callable[[Params], dict[str, Any]]
"""Scores weights; what it returns is written to the log of a run."""


class HeldOut(NamedTuple):
    """Questions that are not trained on: batches, and the kind of each row's questions in order."""

    batches: Sequence[Batch]
    kinds: Sequence[Sequence[Sequence[str]]]


def task_held_out(tokenizer: Tokenizer, size: int, frames: int = 16) -> HeldOut:
    """The monitored clips of the built-in task's test split, with all their questions.

    Args:
        tokenizer: the model's.
        size: pixels a side of its frames.
        frames: of a clip.
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
    config: LlavaConfig,
    params: Params,
    held_out: HeldOut,
    dropping: TokenDropping | None = None,
    dtype: str = "float32",
) -> dict[str, float]:
    """Loss per answer token, and the share of right answers by kind and in all.

    Args:
        config: the model.
        params: its weights.
        held_out: the questions.
        dropping: visual tokens to drop.
        dtype: dtype of the computation.
    """
    right, asked = Counter[str](), Counter[str]()
    loss = tokens = 0.0
    for batch, kinds in zip(held_out.batches, held_out.kinds, strict=True):
        scores = _score(
            config, params, batch, dropping=dropping, key=jax.random.key(0), dtype=dtype
        )
        loss, tokens = loss + float(scores.loss), tokens + int(scores.tokens)
        was_right, was_asked = np.asarray(scores.right), np.asarray(scores.asked)
        for row, of_row in enumerate(kinds):
            for part, kind in enumerate(of_row):
                asked[kind] += int(was_asked[row, part])
                right[kind] += int(was_right[row, part])
    by_kind = {kind: round(right[kind] / asked[kind], 4) for kind in sorted(asked)}
    whole = round(right.total() / max(asked.total(), 1), 4)
    return {"loss": round(loss / max(tokens, 1), 4), "accuracy": whole, **by_kind}


def both_accuracies(config: LlavaConfig, held_out: HeldOut, dtype: str) -> Evaluate:
    """A function of the weights that gives ``accuracy`` with all visual tokens and with merging."""

    def evaluate(params: Params) -> dict[str, Any]:
        return {
            "full": accuracy(config, params, held_out, dtype=dtype),
            "merged": accuracy(config, params, held_out, TokenDropping(0.7), dtype),
        }

    return evaluate
