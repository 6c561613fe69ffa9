"""Attention for prefill and vision (many queries) and for decoding (one query a row)."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

_MASKED = -1e30  # finite, so that a row without any key gives zeros and not NaN

MIN_QUERY_BLOCK = 256
MAX_QUERY_BLOCKS = 16


def attention(
    q: Float[Array, "B H T E"],
    k: Float[Array, "B J T E"],
    v: Float[Array, "B J T E"],
    valid: Bool[Array, "B T"] | None = None,
    *,
    causal: bool,
) -> Float[Array, "B H T E"]:
    """Softmax attention of T queries over T keys, in memory linear in T.

    Queries are taken block by block, and a causal block reads only the keys up to its own end:
    nothing above the diagonal is computed, and no T x T matrix exists. Softmax is in float32.

    Args:
        q: queries; head h reads key/value head ``h // (H // J)``.
        k: keys.
        v: values.
        valid: which keys may be attended to (all, if None). A query without any gives zeros.
        causal: whether query t sees keys 0..t only.
    """
    batch, heads, length, width = q.shape
    groups = heads // k.shape[1]
    block = max(MIN_QUERY_BLOCK, -(-length // MAX_QUERY_BLOCKS))
    # The query heads of one key/value head become rows of one matrix product.
    q = (q * width**-0.5).reshape(batch, -1, groups, length, width)
    outputs = []
    for start in range(0, length, block):
        stop = min(start + block, length)
        keys = stop if causal else length
        queries = q[:, :, :, start:stop].reshape(batch, q.shape[1], -1, width)
        scores = jnp.einsum(
            "BJQE,BJKE->BJQK",
            queries,
            k[:, :, :keys],
            precision="highest",
            preferred_element_type=jnp.float32,
        )
        scores = scores.reshape(batch, -1, groups, stop - start, keys)
        seen = jnp.ones((1, 1, 1, 1, keys), bool)
        if valid is not None:
            seen = valid[:, None, None, None, :keys]
        if causal:
            rows, columns = jnp.arange(start, stop)[:, None], jnp.arange(keys)[None, :]
            seen = seen & (columns <= rows)
        weights = _softmax(scores, seen).astype(v.dtype)
        out = jnp.einsum(
            "BJQK,BJKE->BJQE",
            weights.reshape(batch, q.shape[1], -1, keys),
            v[:, :, :keys],
            precision="highest",
        )
        outputs.append(out.reshape(batch, -1, groups, stop - start, width))
    return jnp.concatenate(outputs, axis=3).reshape(batch, heads, length, width)


def decode_attention(
    q: Float[Array, "B H 1 E"],
    k: Float[Array, "B J S E"],
    v: Float[Array, "B J S E"],
    valid: Bool[Array, "B S"],
) -> tuple[Float[Array, "B H 1 E"], Float[Array, "B H S"]]:
    """Attention of one query a row over a cache.

    Returns:
        The attended values, and the softmax weights in float32 (which the compiler drops where
        nobody reads them).
    """
    batch, heads, _, width = q.shape
    grouped = (q * width**-0.5).reshape(batch, k.shape[1], -1, width)
    scores = jnp.einsum(
        "BJGE,BJSE->BJGS", grouped, k, precision="highest", preferred_element_type=jnp.float32
    )
    weights = _softmax(scores, valid[:, None, None, :])
    out = jnp.einsum("BJGS,BJSE->BJGE", weights.astype(v.dtype), v, precision="highest")
    return out.reshape(batch, heads, 1, width), weights.reshape(batch, heads, -1)


def append(
    cache: Float[Array, "B J S E"], new: Float[Array, "B J 1 E"], slot: Int[Array, ""]
) -> Float[Array, "B J S E"]:
    """Writes one token of every row at the same slot: one in-place slice update, no scatter."""
    return jax.lax.dynamic_update_slice_in_dim(cache, new.astype(cache.dtype), slot, axis=2)


def _softmax(scores: Float[Array, "..."], seen: Bool[Array, "..."]) -> Float[Array, "..."]:
    scores = jnp.where(seen, scores, _MASKED)
    weights = jnp.exp(scores - scores.max(-1, keepdims=True)) * seen
    return weights / jnp.maximum(weights.sum(-1, keepdims=True), jnp.finfo(jnp.float32).tiny)
