"""Attention for prefill and vision (many queries) and for decoding (one query a row)."""

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

_MASKED = -1e30  # finite, so that a row without any key gives zeros and not NaN

QUERY_BLOCK = 256
MAX_STAGES = 16
"""Query blocks are grouped into so many stages at most, each compiled once."""


def attention(
    q: Float[Array, "B H T E"],
    k: Float[Array, "B J T E"],
    v: Float[Array, "B J T E"],
    valid: Bool[Array, "B T"] | None = None,
    *,
    causal: bool,
    parts: Int[Array, "B T"] | None = None,
) -> Float[Array, "B H T E"]:
    """Softmax attention of T queries over T keys, in memory linear in T.

    Queries are taken block by block, one after another, so no T x T matrix exists. A causal stage
    of blocks reads only the keys up to its own end: up to 4,096 tokens a stage is a single block,
    and nothing above the diagonal is computed; in longer prompts at most one stage's width of it.
    Softmax is in float32.

    Args:
        q: queries; head h reads key/value head ``h // (H // J)``.
        k: keys.
        v: values.
        valid: which keys may be attended to (all, if None). A query without any gives zeros.
        causal: whether query t sees keys 0..t only.
        parts: keeps independent continuations of one beginning apart. Keys of part 0 are seen by
            all queries, those of another part by its own queries only. None: all are part 0.
    """
    batch, heads, length, width = q.shape
    kv_heads = k.shape[1]
    q = (q * width**-0.5).reshape(batch, kv_heads, -1, length, width)
    blocks = -(-length // QUERY_BLOCK)
    stage = -(-blocks // MAX_STAGES) * QUERY_BLOCK
    outputs = []
    for start in range(0, length, stage):
        stop = min(start + stage, length)
        keys = stop if causal else length
        attend = partial(
            _attend_block,
            k=k[:, :, :keys],
            v=v[:, :, :keys],
            valid=None if valid is None else valid[:, :keys],
            parts=None if parts is None else parts[:, :keys],
            causal=causal,
        )
        queries = q[:, :, :, start:stop]
        if stop - start <= QUERY_BLOCK:
            outputs.append(attend(queries, start))
            continue
        short = -(stop - start) % QUERY_BLOCK
        queries = jnp.pad(queries, ((0, 0),) * 3 + ((0, short), (0, 0)))
        queries = queries.reshape(*queries.shape[:3], -1, QUERY_BLOCK, width)
        starts = jnp.arange(start, stop, QUERY_BLOCK)
        blocks_and_starts = (jnp.moveaxis(queries, 3, 0), starts)
        out = jax.lax.map(lambda block, attend=attend: attend(*block), blocks_and_starts)
        out = jnp.moveaxis(out, 0, 3).reshape(*out.shape[1:4], -1, width)
        outputs.append(out[:, :, :, : stop - start])
    return jnp.concatenate(outputs, axis=3).reshape(batch, heads, length, width)


def _attend_block(
    queries: Float[Array, "B J groups Q E"],
    start: Int[Array, ""] | int,
    *,
    k: Float[Array, "B J K E"],
    v: Float[Array, "B J K E"],
    valid: Bool[Array, "B K"] | None,
    parts: Int[Array, "B K"] | None,
    causal: bool,
) -> Float[Array, "B J groups Q E"]:
    """Attention of consecutive queries, the first of which is number ``start``."""
    batch, kv_heads, groups, block, width = queries.shape
    # The query heads of one key/value head become rows of one matrix product.
    scores = jnp.einsum(
        "BJQE,BJKE->BJQK",
        queries.reshape(batch, kv_heads, groups * block, width),
        k,
        precision="highest",
        preferred_element_type=jnp.float32,
    ).reshape(batch, kv_heads, groups, block, -1)
    seen = jnp.ones(k.shape[2], bool) if valid is None else valid[:, None, None, None, :]
    if causal:
        seen = seen & (jnp.arange(k.shape[2]) <= start + jnp.arange(block)[:, None])
    if parts is not None:
        # The last block may reach beyond the end; what its surplus queries see does not matter.
        own = parts[:, jnp.minimum(start + jnp.arange(block), parts.shape[1] - 1)]
        of_own = (parts[:, None, :] == 0) | (parts[:, None, :] == own[:, :, None])
        seen = seen & of_own[:, None, None]
    weights = _softmax(scores, seen).astype(v.dtype)
    out = jnp.einsum(
        "BJQK,BJKE->BJQE",
        weights.reshape(batch, kv_heads, groups * block, -1),
        v,
        precision="highest",
    )
    return out.reshape(queries.shape)


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
