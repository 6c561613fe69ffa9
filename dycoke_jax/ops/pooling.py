"""2-D pooling of a frame's visual tokens, as LLaVA-NeXT's ``get_2dPool``."""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from dycoke_jax.config import PoolMode


def pool(x: Float[Array, "C P D"], mode: PoolMode, stride: int) -> Float[Array, "C N D"]:
    """Pools the square grid of tokens of each frame.

    Args:
        x: tokens of C frames in raster order, of any float dtype; P is a square number.
        mode: ``bilinear`` interpolates to ceil(side / stride) without antialiasing (torch's
            align_corners=False); ``average`` and ``max`` pool windows of stride x stride and drop
            what does not fill a window.
        stride: ratio of the side lengths before and after, at least 1.

    Returns:
        The pooled tokens in raster order, in the dtype of ``x``.
    """
    side = int(x.shape[1] ** 0.5)
    if mode == "bilinear":
        # Separable: the same [out, in] weights for rows and columns. float32 weights keep a
        # bfloat16 result within its own rounding.
        weights = _bilinear_weights(side, -(-side // stride))
        grid = x.reshape(x.shape[0], side, side, -1)
        grid = jnp.einsum("hi,wj,CijD->ChwD", weights, weights, grid, precision="highest")
        return grid.reshape(x.shape[0], -1, x.shape[-1]).astype(x.dtype)
    kept = side // stride
    grid = x.reshape(x.shape[0], side, side, -1)[:, : kept * stride, : kept * stride]
    windows = grid.reshape(x.shape[0], kept, stride, kept, stride, -1)
    if mode == "max":
        pooled = windows.max((2, 4))
    else:
        pooled = windows.mean((2, 4), dtype=jnp.float32).astype(x.dtype)
    return pooled.reshape(x.shape[0], kept * kept, -1)


def _bilinear_weights(size: int, new_size: int) -> Float[Array, "new old"]:
    """Weights of each output row over the input rows, with half-pixel centres and clamped edges."""
    centres = np.clip((np.arange(new_size) + 0.5) * size / new_size - 0.5, 0, size - 1)
    weights = np.maximum(0, 1 - np.abs(centres[:, None] - np.arange(size)))
    return jnp.asarray(weights, jnp.float32)
