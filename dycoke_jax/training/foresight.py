"""A lesson beside the questions: to attend early to what will be read late.

KV pruning shows the later layers only those visual tokens that one layer before them attends to. It
takes layers to look at much the same things. A model of six layers divides the work between them:
its third layer need not look at what its fifth one reads. Here it learns to. What the later layers
attend to, when everything is shown to them, is the target of the attention that chooses.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from dycoke_jax.models.qwen2 import Qwen2Layer, Rope


def visual_attention(
    layer: Qwen2Layer,
    x: Float[Array, "B T D"],
    rope: Rope,
    valid: Bool[Array, "B T"],
    parts: Int[Array, "B T"],
    visual: slice,
    shared: int,
) -> Float[Array, "B Q V"]:
    """What a layer's heads attend to in the mean, of the softmax over all that they see.

    Args:
        layer: of the language model.
        x: its input.
        rope: see ``Qwen2.rope``.
        valid: see ``ops.attention``.
        parts: likewise.
        visual: the visual slots.
        shared: slots before those of questions and answers, which are the queries.
    """
    q, k, _ = layer.self_attn.project(layer.input_layernorm(x), rope)
    q = q[:, :, shared:] * q.shape[-1] ** -0.5
    q = q.reshape(q.shape[0], k.shape[1], -1, *q.shape[2:])
    scores = jnp.einsum("BJGQE,BJTE->BJGQT", q, k, preferred_element_type=jnp.float32)
    slots = jnp.arange(valid.shape[1])
    own = (parts[:, None] == 0) | (parts[:, None] == parts[:, shared:, None])
    seen = valid[:, None] & own & (slots <= slots[shared:, None])
    scores = jnp.where(seen[:, None, None], scores, -1e30)
    return jax.nn.softmax(scores)[..., visual].mean((1, 2))


def foresight_loss(
    early: Float[Array, "B Q V"],
    late: Float[Array, "layers B Q V"],
    is_visual: Bool[Array, "B V"],
    counts: Bool[Array, "B Q"],
) -> Float[Array, ""]:
    """How badly early attention tells what is read late: cross entropy in nats.

    Queries weigh as much as the late layers read of the video at all.

    Args:
        early: attention of the layer that chooses.
        late: of the layers after it; no gradient goes there.
        is_visual: visual tokens; newlines are always shown.
        counts: queries that count.
    """
    wanted = jnp.where(is_visual[:, None], jax.lax.stop_gradient(late.mean(0)), 0)
    wanted = wanted * counts[..., None]
    early = jnp.where(is_visual[:, None], early, 0)
    share = early / jnp.maximum(early.sum(-1, keepdims=True), 1e-9)
    return -(wanted * jnp.log(share + 1e-6)).sum() / jnp.maximum(wanted.sum(), 1e-9)
