"""Attention distillation: an early layer learns to attend to what later layers read.

KV pruning shows the later layers only those visual tokens that one layer before them attends to,
and takes for granted that layers attend to much the same tokens. A model of six layers divides the
work between them, so that its third layer need not attend to what its fifth one reads. Here the
attention of the later layers, when every token is shown to them, is the target for the attention
of the layer that chooses.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from dycoke_jax.models.qwen2 import Qwen2Layer, Rope
from dycoke_jax.training.loss import Forward

WEIGHT = 0.5
"""Of this loss beside that of the answers."""


@dataclass(frozen=True)
class AttentionDistillation:
    """An auxiliary loss (see ``training.loss.AuxiliaryLoss``).

    Attributes:
        pruned_layer: first layer that will be pruned while decoding (``DyCoke.layer``). The layer
            before it is the student; it and the later ones are the teachers.
    """

    pruned_layer: int

    def read(
        self, number: int, layer: Qwen2Layer, x: Float[Array, "B T D"], forward: Forward
    ) -> Float[Array, "B Q V"] | None:
        """Attention of the student and of each teacher to the visual slots."""
        if number < self.pruned_layer - 1:
            return None
        return visual_attention(
            layer, x, forward.rope, forward.valid, forward.parts, forward.visual_slots
        )

    def loss(
        self, reads: Sequence[Float[Array, "B Q V"]], forward: Forward, targets: Any
    ) -> Float[Array, ""]:
        """The weighted loss; needs no targets."""
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
) -> Float[Array, "B Q V"]:
    """The attention that questions and answers pay to visual slots, as the mean over heads.

    Args:
        layer: of the language model.
        x: its input.
        rope: rotations of all slots, see ``Qwen2.rope``.
        valid: which slots hold a token.
        parts: which slots see each other, see ``ops.attention``.
        visual: the visual slots. The slots after them, questions and answers, are the queries.

    Returns:
        Softmax weights over all slots that a query sees, cut to the visual ones.
    """
    first = visual.stop
    q, k, _ = layer.self_attn.project(layer.input_layernorm(x), rope)
    q = q[:, :, first:] * q.shape[-1] ** -0.5
    q = q.reshape(q.shape[0], k.shape[1], -1, *q.shape[2:])
    scores = jnp.einsum("BJGQE,BJTE->BJGQT", q, k, preferred_element_type=jnp.float32)
    slots = jnp.arange(valid.shape[1])
    own = (parts[:, None] == 0) | (parts[:, None] == parts[:, first:, None])
    seen = valid[:, None] & own & (slots <= slots[first:, None])
    scores = jnp.where(seen[:, None, None], scores, -1e30)
    return jax.nn.softmax(scores)[..., visual].mean((1, 2))


def distillation_loss(
    student: Float[Array, "B Q V"],
    teachers: Float[Array, "layers B Q V"],
    is_visual: Bool[Array, "B V"],
    counts: Bool[Array, "B Q"],
) -> Float[Array, ""]:
    """Cross entropy in nats between the mean attention of the teachers and that of the student.

    A query weighs as much as the share of its attention that the teachers pay to the video.

    Args:
        student: attention of the layer that chooses.
        teachers: attention of the layers after it; no gradient flows there.
        is_visual: visual tokens; newlines are never pruned and do not count.
        counts: queries that count.
    """
    wanted = jnp.where(is_visual[:, None], jax.lax.stop_gradient(teachers.mean(0)), 0)
    wanted = wanted * counts[..., None]
    student = jnp.where(is_visual[:, None], student, 0)
    share = student / jnp.maximum(student.sum(-1, keepdims=True), 1e-9)
    return -(wanted * jnp.log(share + 1e-6)).sum() / jnp.maximum(wanted.sum(), 1e-9)
