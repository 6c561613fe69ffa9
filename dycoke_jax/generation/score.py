"""Log-likelihoods of given answers (teacher forcing)."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from dycoke_jax.generation.assemble import TextIds
from dycoke_jax.generation.decode import decode_step
from dycoke_jax.generation.encode import Features
from dycoke_jax.generation.layout import Layout
from dycoke_jax.generation.prefill import begin
from dycoke_jax.generation.state import Limits, take_token
from dycoke_jax.model import Model


class Scored(NamedTuple):
    """What the model says about the tokens of given answers; slots behind an answer are 0."""

    log_likelihood: Float[Array, "B answer"]
    """Natural logarithm of the probability of each token after those before it, float32."""
    is_likeliest: Bool[Array, "B answer"]
    """Whether greedy decoding would choose the token."""
    merged: Int[Array, "B"]
    """Number of visual tokens that entered the language model."""


@jax.jit(static_argnames="layout")
def score(
    model: Model,
    features: Features | None,
    text: TextIds,
    answers: Int[Array, "B answer"],
    lengths: Int[Array, "B"],
    *,
    layout: Layout,
) -> Scored:
    """Computes how likely given answers are.

    The answers are read token by token, as if they were being generated, because with a compressor
    each step may attend to other tokens than the one before.

    Args:
        model: the model.
        features: as in ``prefill.prefill``.
        text: as in ``prefill.prefill``.
        answers: token ids of the answers; at most ``layout.slots.generated`` each.
        lengths: number of tokens of each answer, at least 1.
        layout: what is known about the batch (static), see ``layout.plan``.
    """
    width = answers.shape[1]
    # No token stops an answer here.
    limits = Limits(lengths, jnp.full((answers.shape[0], 1), -1))
    logits, state = begin(model, features, text, limits, layout)

    def read(carry: tuple, index: Array) -> tuple[tuple, tuple[Array, Array]]:
        logits, state = carry
        own, index = model.in_step(index)
        token = answers[:, index]
        likely = jax.nn.log_softmax(logits)
        chosen = jnp.take_along_axis(likely, token[:, None], axis=1)[:, 0]
        inside = index < lengths
        found = jnp.where(inside, chosen, 0), inside & (logits.argmax(-1) == token)
        state = take_token(state, token, limits)
        return decode_step(own.bind(), state, layout), found

    # The last token need not be read: nothing follows it.
    (logits, state), found = jax.lax.scan(read, (logits, state), jnp.arange(width - 1))
    _, last = read((logits, state), jnp.int32(width - 1))
    together = [
        jnp.concatenate([x.T, y[:, None]], axis=1) for x, y in zip(found, last, strict=True)
    ]
    return Scored(together[0], together[1], state.visual)
