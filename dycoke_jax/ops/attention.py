"""Attention of many queries (vision, prefill) and of one query a row (decoding)."""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from dycoke_jax.cache import KV, Int8Slots
from dycoke_jax.ops.kernels import cudnn_attention, splash_attention
from dycoke_jax.sharding import Spread, mapped

_MASKED = -1e30  # finite, so that a row without any key gives zeros and not NaN

QUERY_BLOCK = 256
LONG = 512
"""Tokens from which on a CPU computes one head after the other: the scores of all heads together
would not stay in its caches."""
MAX_STAGES = 16
"""At most this many groups of query blocks; each is compiled once."""


def attention(
    q: Float[Array, "B H T E"],
    k: Float[Array, "B K T E"],
    v: Float[Array, "B K T E"],
    valid: Bool[Array, "B T"] | None = None,
    *,
    causal: bool,
    parts: Int[Array, "B T"] | None = None,
    spread: Spread | None = None,
) -> Float[Array, "B H T E"]:
    """Softmax attention of T queries over T keys, in memory linear in T.

    The program's platform decides who computes it: on TPUs splash attention for bfloat16, on NVIDIA
    GPUs cuDNN for bfloat16 and float16, and ``blockwise_attention`` for all else, on CPUs head by
    head where there are many tokens. All else is float32, which is exact everywhere and which the
    kernels are not made for, and parts, which they cannot express. Softmax is in float32.

    Args:
        q: queries, of any float dtype; query head h reads key/value head ``h // (H // K)``.
        k: keys, of the dtype of ``q``.
        v: values, of the dtype of ``q``.
        valid: slots that hold a token; None: all. Keys in other slots are never attended to, and
            what queries in other slots get is finite but not specified.
        causal: whether query t attends to keys 0..t only.
        parts: part of each slot, for independent continuations of one beginning. Keys of part 0 are
            visible to all queries, those of another part to queries of the same part only. None:
            all slots are part 0.
        spread: how the arrays lie on a mesh; each device then computes its own rows and heads.

    Returns:
        The attended values, in the dtype of ``v``.
    """

    def attend(q: Array, k: Array, v: Array, valid: Array | None, parts: Array | None) -> Array:
        if parts is not None:
            return blockwise_attention(q, k, v, valid, causal=causal, parts=parts)
        return _by_platform(q, k, v, valid, causal=causal)

    return mapped(attend, spread, (q, k, v), (valid, parts))


# Every platform's form is traced and all but one are left out. Under jit that happens once for all
# layers of a model, not in each.
@jax.jit(static_argnames="causal")
def _by_platform(
    q: Float[Array, "B H T E"],
    k: Float[Array, "B K T E"],
    v: Float[Array, "B K T E"],
    valid: Bool[Array, "B T"] | None,
    *,
    causal: bool,
) -> Float[Array, "B H T E"]:
    blockwise = partial(blockwise_attention, causal=causal)
    forms: dict[str, Callable[..., Float[Array, "B H T E"]]] = {"cpu": blockwise}
    if q.shape[2] >= LONG:
        forms["cpu"] = partial(_head_by_head, causal=causal)
    if q.dtype in (jnp.bfloat16, jnp.float16):
        forms["cuda"] = partial(_cudnn_or_blockwise, causal=causal)
    if q.dtype == jnp.bfloat16:
        forms["tpu"] = partial(splash_attention, causal=causal)
    return jax.lax.platform_dependent(q, k, v, valid, **forms, default=blockwise)


def _head_by_head(
    q: Float[Array, "B H T E"],
    k: Float[Array, "B K T E"],
    v: Float[Array, "B K T E"],
    valid: Bool[Array, "B T"] | None,
    *,
    causal: bool,
) -> Float[Array, "B H T E"]:
    """``blockwise_attention`` of one head after the other.

    The scores of a block then stay in the caches of a CPU between the steps of the softmax, which
    is worth more there than larger matrix products. The numbers are the same.
    """
    batch, heads = q.shape[:2]

    def attend(index: Int[Array, ""]) -> Float[Array, "T E"]:
        row, head = index // heads, index % heads
        kv_head = head // (heads // k.shape[1])
        of_row = None if valid is None else valid[row][None]
        own_q, own_k, own_v = q[row, head], k[row, kv_head], v[row, kv_head]
        own_q, own_k, own_v = own_q[None, None], own_k[None, None], own_v[None, None]
        return blockwise_attention(own_q, own_k, own_v, of_row, causal=causal)[0, 0]

    return jax.lax.map(attend, jnp.arange(batch * heads)).reshape(q.shape)


def _cudnn_or_blockwise(
    q: Float[Array, "B H T E"],
    k: Float[Array, "B K T E"],
    v: Float[Array, "B K T E"],
    valid: Bool[Array, "B T"] | None,
    *,
    causal: bool,
) -> Float[Array, "B H T E"]:
    try:
        return cudnn_attention(q, k, v, valid, causal=causal)
    except RuntimeError:
        # jax looks for cuDNN while it traces, on machines without a GPU too, where this is traced
        # with the other platforms' forms and then left out.
        return blockwise_attention(q, k, v, valid, causal=causal)


def blockwise_attention(
    q: Float[Array, "B H T E"],
    k: Float[Array, "B K T E"],
    v: Float[Array, "B K T E"],
    valid: Bool[Array, "B T"] | None = None,
    *,
    causal: bool,
    parts: Int[Array, "B T"] | None = None,
) -> Float[Array, "B H T E"]:
    """Attention in plain operations, for any platform and dtype; float32 in full precision.

    Blocks of queries are computed one after another, so that no T x T matrix exists. With causal
    attention a stage of blocks reads only the keys up to its own end. Up to 4,096 tokens a stage is
    a single block, and nothing above the diagonal is computed; in longer prompts at most the width
    of one stage above the diagonal is. Softmax is in float32.

    Arguments and result are those of ``attention``. Queries without any key get zeros.
    """
    batch, heads, length, width = q.shape
    kv_heads = k.shape[1]
    q = q.reshape(batch, kv_heads, -1, length, width)
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
    queries: Float[Array, "B K G Q E"],
    start: Int[Array, ""] | int,
    *,
    k: Float[Array, "B K S E"],
    v: Float[Array, "B K S E"],
    valid: Bool[Array, "B S"] | None,
    parts: Int[Array, "B S"] | None,
    causal: bool,
) -> Float[Array, "B K G Q E"]:
    """Attention of a block of consecutive queries, the first of which is number ``start``."""
    batch, kv_heads, groups, block, width = queries.shape
    visible = jnp.ones((1, 1, k.shape[2]), bool) if valid is None else valid[:, None]
    if causal:
        visible = visible & (jnp.arange(k.shape[2]) <= start + jnp.arange(block)[:, None])
    if parts is not None:
        # The last block may reach beyond the end; its surplus queries are cut off by the caller.
        own = parts[:, jnp.minimum(start + jnp.arange(block), parts.shape[1] - 1)]
        visible = visible & ((parts[:, None, :] == 0) | (parts[:, None, :] == own[:, :, None]))
    q = queries.reshape(batch, kv_heads * groups, block, width)
    weights = attention_weights(q, k, jnp.broadcast_to(visible, (batch, block, k.shape[2])))
    out = jnp.einsum(
        "BKQS,BKSE->BKQE",
        weights.astype(v.dtype).reshape(batch, kv_heads, groups * block, -1),
        v,
        precision="highest",
    )
    return out.reshape(queries.shape)


def received_attention(
    q: Float[Array, "B H T E"], k: Float[Array, "B H T E"], spread: Spread | None = None
) -> Float[Array, "B T"]:
    """The attention that each of T keys receives from T queries, all visible to each other.

    Rows are computed one after another, so that the weights of a single row [H, T, T] exist at a
    time.

    Args:
        q: queries, of any float dtype.
        k: keys, of the dtype of ``q``.
        spread: how they lie on a mesh, without a division of the heads.

    Returns:
        Softmax weights as the mean over heads and queries, float32; those of a row sum to 1.
    """
    assert spread is None or spread.heads is None
    everything = jnp.ones((1, q.shape[2], q.shape[2]), bool)

    def of_row(row: tuple[Float[Array, "H T E"], Float[Array, "H T E"]]) -> Float[Array, "T"]:
        one_q, one_k = row
        return attention_weights(one_q[None], one_k[None], everything)[0].mean((0, 1))

    def of_rows(q: Float[Array, "B H T E"], k: Float[Array, "B H T E"]) -> Float[Array, "B T"]:
        return jax.lax.map(of_row, (q, k))

    return mapped(of_rows, spread, (q, k), out_has_heads=False)


# Every platform's form is traced, and all but one are left out; once for all layers of a shape.
@jax.jit
def decode_attention(
    q: Float[Array, "B H 1 E"],
    cache: KV,
    own: KV,
    slot: Int[Array, ""] | int,
    visible: Bool[Array, "B S"],
) -> tuple[Float[Array, "B H 1 E"], Float[Array, "B H S"], KV]:
    """Writes a token a row into a cache, and attends from it to the slots of that cache.

    Args:
        q: the query of each row; query head h reads key/value head ``h // (H // K)``.
        cache: keys and values of the tokens before it. The scales of int8 keys multiply the scores,
            and those of int8 values the weights, so that neither is needed in another dtype.
        own: its own key and value, one slot, stored as the cache is.
        slot: where they are written.
        visible: slots that the query may attend to.

    Returns:
        The attended values in the dtype of ``q``, the softmax weights in float32, and the cache.
        The compiler drops the weights where nothing reads them.
    """
    return jax.lax.platform_dependent(
        *(q, cache, own, slot, visible), tpu=_read_then_write, default=_write_then_read
    )


def _write_then_read(
    q: Float[Array, "B H 1 E"],
    cache: KV,
    own: KV,
    slot: Int[Array, ""] | int,
    visible: Bool[Array, "B S"],
) -> tuple[Float[Array, "B H 1 E"], Float[Array, "B H S"], KV]:
    """``decode_attention`` by an updated cache: compilers for CPUs and GPUs update it in place."""
    cache = cache.write(own, slot)
    weights = _softmax(_scores(q, cache.keys), visible[:, None, None])
    out = _attended(weights, cache.values, q.dtype).astype(q.dtype)
    return out.reshape(q.shape), weights.reshape(*q.shape[:2], -1), cache


def _read_then_write(
    q: Float[Array, "B H 1 E"],
    cache: KV,
    own: KV,
    slot: Int[Array, ""] | int,
    visible: Bool[Array, "B S"],
) -> tuple[Float[Array, "B H 1 E"], Float[Array, "B H S"], KV]:
    """``decode_attention`` by the cache as it was, with the token's own key and value apart.

    What the cache holds in their slot is not read. The compiler for TPUs brings what is read to
    on-chip memory; keys that were updated before, it would update there and write all of them back.
    """
    at_slot = jnp.arange(cache.slots) == slot
    scores = jnp.where(at_slot, _scores(q, own.keys), _scores(q, cache.keys))
    weights = _softmax(scores, visible[:, None, None])
    out = _attended(jnp.where(at_slot, 0, weights), cache.values, q.dtype)
    of_own = (weights * at_slot).sum(-1, keepdims=True)
    out = (out + _attended(of_own, own.values, q.dtype)).astype(q.dtype)
    return out.reshape(q.shape), weights.reshape(*q.shape[:2], -1), cache.write(own, slot)


def _attended(
    weights: Float[Array, "B K G S"], v: Float[Array, "B K S E"] | Int8Slots, dtype: DTypeLike
) -> Float[Array, "B K G E"]:
    """Sums of values in float32, multiplied in a dtype."""
    v, scale = v if isinstance(v, Int8Slots) else (v, None)
    if scale is not None:
        weights = weights * scale[:, :, None]
    return jnp.einsum(
        "BKGS,BKSE->BKGE",
        weights.astype(dtype),
        v.astype(dtype),
        precision="highest",
        preferred_element_type=jnp.float32,
    )


def attention_weights(
    q: Float[Array, "B H Q E"],
    k: Float[Array, "B K S E"] | Int8Slots,
    visible: Bool[Array, "B Q S"],
) -> Float[Array, "B H Q S"]:
    """Softmax weights of attention, all at once: for few queries or short sequences.

    Args:
        q: queries, of any float dtype; query head h reads key/value head ``h // (H // K)``.
        k: keys, of the dtype of ``q`` or int8.
        visible: slots that each query may attend to. A query without such a slot gives zeros.

    Returns:
        The weights in float32; those of a query sum to 1.
    """
    batch, heads, queries, _ = q.shape
    scores = _scores(q, k)
    scores = scores.reshape(batch, scores.shape[1], -1, queries, scores.shape[3])
    weights = _softmax(scores, visible[:, None, None])
    return weights.reshape(batch, heads, queries, -1)


def _scores(
    q: Float[Array, "B H Q E"], k: Float[Array, "B K S E"] | Int8Slots
) -> Float[Array, "B K rows S"]:
    """Products of queries and keys in float32, the queries of a key/value head one after another.

    The query heads of one key/value head become rows of one matrix product.
    """
    batch, _, _, width = q.shape
    k, scale = k if isinstance(k, Int8Slots) else (k, None)
    scores = jnp.einsum(
        "BKGE,BKSE->BKGS",
        (q * width**-0.5).reshape(batch, k.shape[1], -1, width),
        k.astype(q.dtype),
        precision="highest",
        preferred_element_type=jnp.float32,
    )
    return scores if scale is None else scores * scale[:, :, None]


def _softmax(scores: Float[Array, "..."], visible: Bool[Array, "..."]) -> Float[Array, "..."]:
    scores = jnp.where(visible, scores, _MASKED)
    weights = jnp.exp(scores - scores.max(-1, keepdims=True)) * visible
    return weights / jnp.maximum(weights.sum(-1, keepdims=True), jnp.finfo(jnp.float32).tiny)
