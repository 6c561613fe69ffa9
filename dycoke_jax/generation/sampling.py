"""Choosing the next token: greedy, temperature, top-k, top-p, with a seed for each request."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


class Sampling(NamedTuple):
    """How each row chooses; all traced, so that changing them compiles nothing."""

    temperature: Float[Array, "B"]
    """0 is greedy."""
    top_k: Int[Array, "B"]
    """0 takes the whole vocabulary."""
    top_p: Float[Array, "B"]
    """1 takes the whole vocabulary."""
    seed: Int[Array, "B"]


def sample(
    logits: Float[Array, "B L"], sampling: Sampling, index: Int[Array, ""]
) -> Int[Array, "B"]:
    """The next token of each row.

    Temperature, then top-k, then top-p, in the order and with the meaning of transformers' logits
    warpers. The random numbers of a row depend on its seed and on ``index`` alone, so a row of a
    batch draws what the same request alone would draw.

    Args:
        logits: float32 scores.
        sampling: settings a row.
        index: which generated token this is, from 0.
    """

    def draw() -> Int[Array, "B"]:
        cold = sampling.temperature <= 0
        scaled = logits / jnp.where(cold, 1.0, sampling.temperature)[:, None]
        allowed = jnp.where(_allowed(scaled, sampling.top_k, sampling.top_p), scaled, -jnp.inf)
        keys = jax.vmap(lambda seed: jax.random.fold_in(jax.random.key(seed), index))(sampling.seed)
        drawn = jax.vmap(jax.random.categorical)(keys, allowed)
        return jnp.where(cold, jnp.argmax(logits, axis=-1), drawn).astype(jnp.int32)

    def greedy() -> Int[Array, "B"]:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)

    # Sorting a vocabulary costs more than a small model's head: skip it where nobody draws.
    return jax.lax.cond((sampling.temperature > 0).any(), draw, greedy)


def _allowed(
    scores: Float[Array, "B L"], top_k: Int[Array, "B"], top_p: Float[Array, "B"]
) -> Bool[Array, "B L"]:
    """The tokens that top-k and then top-p leave; equal scores share their fate."""
    ordered = jnp.sort(scores, axis=-1, descending=True)
    ranks = jnp.arange(scores.shape[1])
    k = jnp.where(top_k <= 0, scores.shape[1], jnp.minimum(top_k, scores.shape[1]))
    least = jnp.take_along_axis(ordered, k[:, None] - 1, axis=1)
    ordered = jnp.where(ordered >= least, ordered, -jnp.inf)
    probabilities = jax.nn.softmax(ordered, axis=-1)
    before = jnp.cumsum(probabilities, axis=-1) - probabilities
    # The best token always stays; another stays while those before it hold less than top_p.
    count = ((before < top_p[:, None]) | (ranks == 0)).sum(-1)
    count = jnp.where(top_p >= 1, k, count)
    least = jnp.maximum(least, jnp.take_along_axis(ordered, count[:, None] - 1, axis=1))
    return scores >= least
