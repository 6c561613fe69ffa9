"""The one place that multiplies activations by a weight matrix of a model, and knows its storage.

A matrix [out, in] is an array of any float dtype, or int8 with one scale for each output channel
(``Int8Weight``): absmax quantisation (Dettmers et al. 2022) of the weights alone. Activations are
never quantised.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, Int8

_FEW_ROWS = 8
"""Up to this many rows, the time of a product on a CPU is that of reading and converting int8."""
_LANES = 16
"""The fewest float32 sums that run side by side, one vector of AVX-512."""
_MOST_CHANNELS = 8192
"""Most output channels that are computed in one go; the heads of all models have more."""
_MOST_TERMS, _MOST_TERMS_OF_HEAD = 16, 64
"""Most terms of a sum: more are faster, but each takes time to compile in every layer."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Int8Weight:
    """A matrix as int8: row n is ``values[n] * scale[n]``."""

    values: Int8[Array, "out in"]
    """Integers from -127 to 127."""
    scale: Float[Array, "out"]
    """Float32, above 0 for finite weights."""


Weight = Float[Array | np.ndarray, "out in"] | Int8Weight


def quantise(
    weight: Float[np.ndarray, "out in"],
) -> tuple[Int8[np.ndarray, "out in"], Float[np.ndarray, "out"]]:
    """Quantises a matrix to int8 on the host.

    Values are rounded to nearest even, so none of them is off by more than half a scale.

    Args:
        weight: a matrix of any float dtype.

    Returns:
        The integers from -127 to 127, and the float32 scale of each row: its largest absolute value
        divided by 127; 1 for a row of zeros. In a row with NaN or infinity the scale is that.
    """
    values = np.empty(weight.shape, np.int8)
    scale = np.empty(len(weight), np.float32)
    # In blocks of rows, so that no float32 copy of a large matrix exists.
    for start in range(0, len(weight), 4096):
        rows = weight[start : start + 4096].astype(np.float32)
        largest = np.abs(rows).max(axis=1)
        of_rows = np.where(largest == 0, np.float32(1), largest / np.float32(127))
        # The smallest numbers, divided by 127, would be 0.
        of_rows = np.maximum(of_rows, np.finfo(np.float32).tiny)
        with np.errstate(invalid="ignore"):
            steps = np.rint(rows / of_rows[:, None])
        values[start : start + 4096] = np.nan_to_num(steps, posinf=0, neginf=0)
        scale[start : start + 4096] = of_rows
    return values, scale


def matmul(
    x: Float[Array, "*rows in"], weight: Weight, dtype: DTypeLike | None = None
) -> Float[Array, "*rows out"]:
    """Computes ``x @ weight.T``, float32 in full precision.

    Args:
        x: activations, in the dtype of the computation.
        weight: a matrix as the checkpoints have it, in any float dtype, which is converted to that
            of ``x``; or int8, whose scales are applied to the sums.
        dtype: dtype of the sums and of the result; None: that of ``x``.
    """
    if isinstance(weight, Int8Weight):
        rows = x.reshape(-1, x.shape[-1])
        out = _int8_product(rows, weight.values) * weight.scale
        return out.astype(dtype or x.dtype).reshape(*x.shape[:-1], -1)
    # With the matrix on the right as stored, XLA reads it row by row; transposing it first costs
    # most of the time of a small batch.
    return jnp.einsum(
        "...k,nk->...n",
        x,
        weight.astype(x.dtype),
        precision="highest",
        preferred_element_type=dtype,
    )


def take_rows(weight: Weight, ids: Int[Array, "*ids"], dtype: DTypeLike) -> Float[Array, "*ids in"]:
    """Returns the rows of a matrix at these indices, in ``dtype``."""
    if isinstance(weight, Int8Weight):
        return (weight.values[ids] * weight.scale[ids][..., None]).astype(dtype)
    return jnp.asarray(weight)[ids].astype(dtype)


# Under jit, each shape is traced once for all layers of a model.
@jax.jit
def _int8_product(
    x: Float[Array, "rows in"], values: Int8[Array, "out in"]
) -> Float[Array, "rows out"]:
    """``x @ values.T`` with float32 sums."""
    if x.shape[0] > _FEW_ROWS or _terms(*values.shape) == 1:
        return _in_contraction(x, values)
    return jax.lax.platform_dependent(x, values, cpu=_in_lanes, default=_in_contraction)


def _in_contraction(
    x: Float[Array, "rows in"], values: Int8[Array, "out in"]
) -> Float[Array, "rows out"]:
    """The contraction, into which accelerators convert the integers as they read them.

    Every int8 value is exact in every float dtype.
    """
    return jnp.einsum(
        "rk,nk->rn",
        x,
        values.astype(x.dtype),
        precision="highest",
        preferred_element_type=jnp.float32,
    )


def _in_lanes(
    x: Float[Array, "rows in"], values: Int8[Array, "out in"]
) -> Float[Array, "rows out"]:
    """The product for few rows on a CPU, where XLA would write a contraction's operand to memory.

    A matrix of float32 would take 9 bytes of traffic a weight. Instead, elements that lie ``lanes``
    apart are summed first: an elementwise program, which reads 1 byte a weight and is vectorised.
    """
    terms = _terms(*values.shape)
    split = x.astype(jnp.float32).reshape(len(x), 1, terms, -1)
    lanes = split.shape[-1]

    def product(values: Int8[Array, "block in"]) -> Float[Array, "rows block"]:
        of_terms = values.reshape(1, len(values), terms, lanes)
        sums = split[:, :, 0] * of_terms[:, :, 0]
        for term in range(1, terms):
            sums += split[:, :, term] * of_terms[:, :, term]
        return jnp.einsum("rnl,l->rn", sums, jnp.ones(lanes), precision="highest")

    # The sums of all lanes of a vocabulary would not fit into the processor's cache.
    block = _largest_divisor(len(values), _MOST_CHANNELS)
    if block == len(values):
        return product(values)
    out = jax.lax.map(product, values.reshape(-1, block, values.shape[1]))
    return out.swapaxes(0, 1).reshape(len(x), -1)


def _terms(channels: int, width: int) -> int:
    """Number of terms that ``_in_lanes`` sums in each lane; 1 if it cannot split the width well."""
    most = _MOST_TERMS if channels <= _MOST_CHANNELS else _MOST_TERMS_OF_HEAD
    return _largest_divisor(width // _LANES, most) if width % _LANES == 0 else 1


def _largest_divisor(number: int, most: int) -> int:
    return max(divisor for divisor in range(1, most + 1) if number % divisor == 0)
