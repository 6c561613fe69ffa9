"""Choosing candidates by score: ranks, and exactly as many as a budget allows.

Equal scores are resolved by the lower index first, whatever the size of the batch.
"""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from dycoke_jax.compression.protocol import Rows


def rank_in_row(scores: Float[Array, "... candidates"]) -> Int[Array, "... candidates"]:
    """The rank of each candidate in its row, 0 for the highest score.

    ``rank_in_row(scores) < counts`` chooses a number of candidates in each row that is known only
    at run time.

    Args:
        scores: scores in float32, without NaN.

    Returns:
        Ranks in 0..candidates-1, int32.
    """
    order = jnp.argsort(-scores, axis=-1)
    return jnp.argsort(order, axis=-1).astype(jnp.int32)


def exact_k(
    scores: Float[Array, "B candidates"],
    in_mask: Bool[Array, "B candidates"],
    k: Int[Array, "B"],
    most: int,
) -> Rows:
    """Chooses exactly ``k`` candidates of each row: those of the mask, and then the others.

    If the mask holds more than ``k``, those with the lowest scores are left out; if it holds fewer,
    the others with the highest scores are added.

    Args:
        scores: scores in float32, without NaN. Outside the mask, -inf comes last.
        in_mask: candidates that come first.
        k: number of candidates to choose in each row, in 0..most.
        most: the largest number in any row, at most the number of candidates.

    Returns:
        ``most`` places in ascending order, int32; the ``k`` valid ones come first, and the place of
        the others is the last candidate.
    """
    index = lax.broadcasted_iota(jnp.int32, scores.shape, 1)
    order = lax.sort((~in_mask, -scores, index), dimension=1, is_stable=True, num_keys=2)[2]
    valid = jnp.arange(most) < k[:, None]
    places = jnp.sort(jnp.where(valid, order[:, :most], scores.shape[1] - 1), axis=1)
    return Rows(places, valid)
