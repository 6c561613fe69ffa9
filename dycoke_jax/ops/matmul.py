"""The one place that multiplies activations by a weight matrix of a model."""

import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float


def matmul(
    x: Float[Array, "*rows in"],
    weight: Float[Array | np.ndarray, "out in"],
    dtype: DTypeLike | None = None,
) -> Float[Array, "*rows out"]:
    """Computes ``x @ weight.T``, float32 in full precision.

    Args:
        x: activations, in the dtype of the computation.
        weight: a matrix as the checkpoints have it, in any float dtype; it is converted to that of
            ``x``.
        dtype: dtype of the sums and of the result; None: that of ``x``.
    """
    # With the matrix on the right as stored, XLA reads it row by row; transposing it first costs
    # most of the time of a small batch.
    return jnp.einsum(
        "...k,nk->...n",
        x,
        weight.astype(x.dtype),
        precision="highest",
        preferred_element_type=dtype,
    )
