"""Attention kernels of accelerators, both of them parts of jax: splash attention and cuDNN.

They compute what ``ops.attention.attention`` does, for bfloat16 (cuDNN also float16) and without
parts. They are given the slots of the sequences that hold a token; what they return in the other
slots is zeros. Both are differentiable.
"""

from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

SPLASH_BLOCK = 512
"""The largest block of queries and of keys that splash attention holds in on-chip memory."""
_LANES = 128  # splash attention works in blocks of multiples of the lanes of a TPU's vector unit


def splash_attention(
    q: Float[Array, "B H T E"],
    k: Float[Array, "B K T E"],
    v: Float[Array, "B K T E"],
    valid: Bool[Array, "B T"] | None,
    *,
    causal: bool,
    block: int = SPLASH_BLOCK,
    interpret: bool = False,
) -> Float[Array, "B H T E"]:
    """Attention by the Pallas kernel for TPUs; blocks above the diagonal are not computed.

    Sequences are padded to whole blocks of equal size. Tokens are one segment and empty slots
    another, so that every query finds at least its own key.

    Args:
        q: queries; query head h reads key/value head ``h // (H // K)``.
        k: keys, of the dtype of ``q``.
        v: values, of the dtype of ``q``.
        valid: slots that hold a token; None: all.
        causal: whether query t attends to keys 0..t only.
        block: the largest block, a multiple of 128.
        interpret: run the kernel's operations one by one, on any device.

    Returns:
        The attended values, in the dtype of ``v``.
    """
    # Imported here because Pallas takes longer to import than this package.
    from jax.experimental.pallas.ops.tpu import splash_attention as splash

    heads, length, width = q.shape[1:]
    blocks = -(-length // block)
    size = -(-length // (blocks * _LANES)) * _LANES
    padded = blocks * size
    of_head = splash.CausalMask((padded, padded)) if causal else splash.FullMask((padded, padded))
    kernel = splash.make_splash_mha_single_device(
        mask=splash.MultiHeadMask([of_head] * heads),
        block_sizes=splash.BlockSizes(
            block_q=size,
            block_kv=size,
            block_q_dq=size,
            block_kv_dq=size,
            block_q_dkv=size,
            block_kv_dkv=size,
        ),
        interpret=interpret,
    )

    def pad(x: Float[Array, "B heads T E"]) -> Float[Array, "B heads padded E"]:
        return jnp.pad(x, ((0, 0), (0, 0), (0, padded - length), (0, 0)))

    q, k, v = pad(q * width**-0.5), pad(k), pad(v)
    if valid is None and padded == length:
        return jax.vmap(kernel)(q, k, v)
    tokens = jnp.ones((q.shape[0], length), bool) if valid is None else valid
    segments = jnp.pad(tokens, ((0, 0), (0, padded - length))).astype(jnp.int32)
    out = jax.vmap(kernel)(q, k, v, splash.SegmentIds(segments, segments))[:, :, :length]
    return out if valid is None else jnp.where(valid[:, None, :, None], out, 0)


def cudnn_attention(
    q: Float[Array, "B H T E"],
    k: Float[Array, "B K T E"],
    v: Float[Array, "B K T E"],
    valid: Bool[Array, "B T"] | None,
    *,
    causal: bool,
    implementation: Literal["cudnn", "xla"] = "cudnn",
) -> Float[Array, "B H T E"]:
    """Attention by cuDNN, for NVIDIA GPUs of compute capability 8.0 and above.

    cuDNN can leave out the end of a sequence but not slots in between, other than by a bias
    [B, 1, T, T]. So the tokens of each row are brought to its beginning, in their order, and the
    result back to their slots.

    Args:
        q: queries; query head h reads key/value head ``h // (H // K)``.
        k: keys, of the dtype of ``q``.
        v: values, of the dtype of ``q``.
        valid: slots that hold a token; None: all.
        causal: whether query t attends to keys 0..t only.
        implementation: "xla" computes the same without cuDNN, with T x T matrices.

    Returns:
        The attended values, in the dtype of ``v``.

    Raises:
        RuntimeError: if there is no cuDNN, or none that computes attention of this shape.
    """
    # jax has the heads behind the slots.
    q, k, v = q.swapaxes(1, 2), k.swapaxes(1, 2), v.swapaxes(1, 2)
    rows, length = q.shape[:2]
    lengths = None
    if valid is not None:
        lengths = valid.sum(1, dtype=jnp.int32)
        order = jnp.argsort(~valid, axis=1, stable=True)
        filled = (jnp.arange(length) < lengths[:, None])[:, :, None, None]
        # Zeros behind the end keep what the gradients hold there out of the slots.
        q, k, v = (jnp.where(filled, _permute(x, order), 0) for x in (q, k, v))
    if length % 2:
        # jax has no gradients for odd lengths.
        q, k, v = (jnp.pad(x, ((0, 0), (0, 1), (0, 0), (0, 0))) for x in (q, k, v))
        lengths = jnp.full(rows, length, jnp.int32) if lengths is None else lengths
    out = jax.nn.dot_product_attention(
        q,
        k,
        v,
        is_causal=causal,
        query_seq_lengths=lengths,
        key_value_seq_lengths=lengths,
        implementation=implementation,
    )[:, :length]
    if valid is not None:
        out = _permute(jnp.where(filled, out, 0), jnp.argsort(order, axis=1))
    return out.swapaxes(1, 2)


def _permute(
    x: Float[Array, "B T heads E"], order: Int[Array, "B T"]
) -> Float[Array, "B T heads E"]:
    """Brings slot ``order[b, t]`` of each row to slot t; every slot occurs once."""
    row = jnp.arange(x.shape[0])[:, None]
    return x.at[row, order].get(mode="promise_in_bounds", unique_indices=True)
