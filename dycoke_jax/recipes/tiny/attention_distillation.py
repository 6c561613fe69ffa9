"""Attention distillation: the layer that scores tokens for KV pruning imitates later layers.

KV pruning lets the later layers attend only to those visual tokens that one layer before them, the
scoring layer, attends to most. It assumes that layers attend to much the same tokens. In a model of
only six layers this need not hold, because each layer has its own task. So the scoring layer is
trained here: its target is the attention of the later layers when all visual tokens are visible.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from dycoke_jax.models.qwen2 import Qwen2Layer, Rope
from dycoke_jax.ops.attention import attention_weights
from dycoke_jax.training.loss import Forward

WEIGHT = 0.5
"""Weight of this loss relative to the loss of the answers."""


@dataclass(frozen=True)
class AttentionDistillation:
    """Attention distillation as an auxiliary loss (see ``training.loss.AuxiliaryLoss``).

    Attributes:
        pruned_layer: first layer that KV pruning prunes (``DyCoke.layer``), in 1..layers-1. The
            layer before it is the student; it and all later layers are the teachers.
    """

    pruned_layer: int

    def read(
        self, number: int, layer: Qwen2Layer, x: Float[Array, "B T D"], forward: Forward
    ) -> Float[Array, "B Q visual"] | None:
        """The attention of the layer to the visual slots; None for layers before the student."""
        if number < self.pruned_layer - 1:
            return None
        return visual_attention(
            layer, x, forward.rope, forward.valid, forward.parts, forward.visual_slots
        )

    def loss(
        self, reads: Sequence[Float[Array, "B Q visual"]], forward: Forward, targets: Any
    ) -> Float[Array, ""]:
        """The distillation loss times ``WEIGHT``; ``targets`` are not used."""
        student, teachers = reads[0], jnp.stack(reads[1:])
        is_visual = forward.visual.is_visual & forward.visual.valid
        return WEIGHT * distillation_loss(student, teachers, is_visual, forward.is_answer)


def visual_attention(
    layer: Qwen2Layer,
    x: Float[Array, "B T D"],
    rope: Rope,
    valid: Bool[Array, "B T"],
    parts: Int[Array, "B T"],
    visual: slice,
) -> Float[Array, "B Q visual"]:
    """Attention weights from questions and answers to the visual slots, averaged over heads.

    Args:
        layer: a decoder layer.
        x: the input of the layer.
        rope: rotations of all slots, see ``Qwen2.rope``.
        valid: slots that hold a token.
        parts: part of each slot, see ``ops.attention``; a query attends to part 0 and its own part.
        visual: range of the visual slots. The Q slots after it, questions and answers, are the
            queries.

    Returns:
        Float32 softmax weights. The softmax runs over all slots visible to a query, and the result
        has the visual ones of them, so a row sums to at most 1.
    """
    first = visual.stop
    q, k, _ = layer.self_attn.project(layer.input_layernorm(x), rope)
    slots = jnp.arange(valid.shape[1])
    own = (parts[:, None] == 0) | (parts[:, None] == parts[:, first:, None])
    visible = valid[:, None] & own & (slots <= slots[first:, None])
    return attention_weights(q[:, :, first:], k, visible)[..., visual].mean(1)


def distillation_loss(
    student: Float[Array, "B Q visual"],
    teachers: Float[Array, "layers B Q visual"],
    is_visual: Bool[Array, "B visual"],
    counts: Bool[Array, "B Q"],
) -> Float[Array, ""]:
    """Cross entropy in nats of the student's attention relative to the mean of the teachers'.

    The student's attention is normalised over the visual tokens of a query. The teachers' is not:
    a query has the share of their attention that goes to visual tokens as its weight in the mean.

    Args:
        student: attention weights of the scoring layer.
        teachers: attention weights of the layers after it; no gradient flows into them.
        is_visual: valid visual tokens. Newlines are never pruned, so they do not count.
        counts: queries that count, such as the answer tokens.

    Returns:
        The mean over queries as a scalar; 0 if no query counts.
    """
    target = jnp.where(is_visual[:, None], jax.lax.stop_gradient(teachers.mean(0)), 0)
    target = target * counts[..., None]
    student = jnp.where(is_visual[:, None], student, 0)
    share = student / jnp.maximum(student.sum(-1, keepdims=True), 1e-9)
    return -(target * jnp.log(share + 1e-6)).sum() / jnp.maximum(target.sum(), 1e-9)
