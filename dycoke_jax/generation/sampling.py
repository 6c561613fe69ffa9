"""Sampling of the next token: greedy, temperature, top-k, top-p, with a seed for each request."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

_INFINITY = 0x7F800000
"""Infinity as a whole number, as ``_in_order`` counts. Minus infinity is one below minus it."""


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

    # Reading the logits some sixty times costs more than the head of a small model: skip it if all
    # are greedy.
    return jax.lax.cond((sampling.temperature > 0).any(), draw, greedy)


def _allowed(
    scores: Float[Array, "B V"], top_k: Int[Array, "B"], top_p: Float[Array, "B"]
) -> Bool[Array, "B V"]:
    """The tokens that top-k and then top-p leave; tokens of equal score are treated alike.

    Both leave the scores from some score on, which is found by bisection. A vocabulary need not be
    sorted for it: that takes half a minute to compile for a TPU, and on a mesh the logits of all
    devices would be sent around.
    """
    k = jnp.where(top_k <= 0, scores.shape[1], jnp.minimum(top_k, scores.shape[1]))

    def has_k(least: Float[Array, "B 1"]) -> Bool[Array, "B"]:
        return (scores >= least).sum(1) >= k

    # The largest score that at least k scores reach.
    fewest = _first(lambda least: ~has_k(least), scores.shape[0], before=True)
    probabilities = jax.nn.softmax(jnp.where(scores >= fewest, scores, -jnp.inf), axis=1)

    def holds_less(least: Float[Array, "B 1"]) -> Bool[Array, "B"]:
        return jnp.where(scores > least, probabilities, 0).sum(1) < top_p

    # A token stays while those with higher scores hold less than top_p; the best always stays.
    least = jnp.minimum(_first(holds_less, scores.shape[0]), scores.max(1, keepdims=True))
    least = jnp.where(top_p[:, None] >= 1, fewest, jnp.maximum(fewest, least))
    return scores >= least


def _first(
    holds: Callable[[Float[Array, "B 1"]], Bool[Array, "B"]], rows: int, *, before: bool = False
) -> Float[Array, "B 1"]:
    """The smallest float32 from which on a condition holds, for each row; by bisection.

    Args:
        holds: the condition, which holds from some number on.
        rows: number of rows (B).
        before: the largest number for which it does not hold, instead.
    """

    def halve(
        _: Int[Array, ""], ends: tuple[Int[Array, "B 1"], Int[Array, "B 1"]]
    ) -> tuple[Int[Array, "B 1"], Int[Array, "B 1"]]:
        low, high = ends
        middle = (low & high) + ((low ^ high) >> 1)  # without overflow
        right = holds(_in_order(middle))[:, None]
        return jnp.where(right, low, middle), jnp.where(right, middle, high)

    ends = (jnp.full((rows, 1), end, jnp.int32) for end in (-_INFINITY - 1, _INFINITY))
    low, high = jax.lax.fori_loop(0, 32, halve, tuple(ends))
    return _in_order(low if before else high)


def _in_order(number: Int[Array, "B 1"]) -> Float[Array, "B 1"]:
    """The float32 of a whole number, such that both have the same order."""
    return jnp.where(number < 0, number ^ 0x7FFFFFFF, number).view(jnp.float32)
