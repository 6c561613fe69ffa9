"""Sampling of the next token: greedy, temperature, top-k, top-p, with a seed for each request."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


class Sampling(NamedTuple):
    """Settings of each row. All are traced, so that changing them compiles nothing."""

    temperature: Float[Array, "B"]
    """0 for greedy decoding."""
    top_k: Int[Array, "B"]
    """Number of most likely tokens to sample from; 0 for the whole vocabulary."""
    top_p: Float[Array, "B"]
    """Probability that the tokens to sample from hold together; 1 for the whole vocabulary."""
    seed: Int[Array, "B"]


def sample(
    logits: Float[Array, "B V"], sampling: Sampling, index: Int[Array, ""]
) -> Int[Array, "B"]:
    """The next token of each row.

    Temperature, top-k and top-p are applied in this order, as the logits processors of transformers
    do. The random numbers of a row depend on its seed and on ``index`` alone, so that a row of a
    batch samples what the same request alone would.

    Args:
        logits: float32 logits.
        sampling: settings of each row.
        index: number of the generated token, from 0.
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

    # Sorting the vocabulary costs more than the head of a small model: skip it if all are greedy.
    return jax.lax.cond((sampling.temperature > 0).any(), draw, greedy)


def _allowed(
    scores: Float[Array, "B V"], top_k: Int[Array, "B"], top_p: Float[Array, "B"]
) -> Bool[Array, "B V"]:
    """The tokens that top-k and then top-p leave; tokens of equal score are treated alike."""
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
