"""How alike visual tokens are, in float32."""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int, UInt

ROUNDING = 1e-5
"""More than rounding in float32 takes off the cosine similarity of two equal vectors."""

TIE = 1e-6
"""Difference up to which the cosine similarities of a token and two targets are the same."""


def cosine(
    a: Float[Array, "B compared N D"], b: Float[Array, "B compared N D"]
) -> Float[Array, "B compared N"]:
    """Cosine similarity in float32; 0 where a vector is zero, exactly 1 where both are equal."""
    a, b = a.astype(jnp.float32), b.astype(jnp.float32)
    product, norm_a, norm_b = (a * b).sum(-1), (a * a).sum(-1), (b * b).sum(-1)
    similarity = product / jnp.maximum(jnp.sqrt(norm_a * norm_b), jnp.finfo(jnp.float32).tiny)
    # A compiler may sum the three in different orders, and the last bits of near-1 similarities
    # would then choose among the equal tokens of a still clip, differently in every batch size.
    return jnp.where((a == b).all(-1) & (norm_a > 0), 1.0, similarity)


def most_similar(
    similarity: Float[Array, "... tokens targets"], is_target: Bool[Array, "... targets"]
) -> Int[Array, "... tokens"]:
    """The target that each token is most similar to; of equal ones, to rounding, the first.

    Args:
        similarity: cosine similarities.
        is_target: targets that are looked at.

    Returns:
        Numbers of targets, int32; 0 where there is no target.
    """
    similarity = jnp.where(is_target[..., None, :], similarity, -jnp.inf)
    near = similarity >= similarity.max(-1, keepdims=True) - TIE
    return jnp.argmax(near, axis=-1).astype(jnp.int32)


def equal_pairs(
    vectors: Float[Array, "vectors channels"], near: Bool[Array, "vectors vectors"]
) -> Bool[Array, "vectors vectors"]:
    """Which pairs of vectors are the same to the last bit.

    Args:
        vectors: the vectors, of any float dtype.
        near: the pairs that are looked at: all equal ones, and few others. To compare all pairs
            element by element would take longer than all else.
    """
    checksums = _checksums(vectors.astype(jnp.float32))
    return near & (checksums[:, None] == checksums)


def _checksums(vectors: Float[Array, "vectors channels"]) -> UInt[Array, "vectors"]:
    """A number of the bits of each float32 vector: sums of integers are exact in every order."""
    bits = lax.bitcast_convert_type(jnp.where(vectors == 0, 0.0, vectors), jnp.uint32)
    # The lower half of the bits is empty where values were bfloat16.
    bits ^= bits >> 16
    weights = jnp.cumprod(jnp.full(vectors.shape[-1], 2654435761, jnp.uint32))
    return (bits * weights).sum(-1, dtype=jnp.uint32)
