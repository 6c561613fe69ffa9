"""Rotary position embedding (Su et al. 2021), in the half-split convention of Qwen2."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def rotations(
    positions: Int[Array, "B T"], head_dim: int, theta: float
) -> tuple[Float[Array, "B 1 T E"], Float[Array, "B 1 T E"]]:
    """Cosines and sines of the rotation at each position.

    Args:
        positions: positions of the tokens, from 0.
        head_dim: width of a head (E), even.
        theta: base of the rotary frequencies.

    Returns:
        Cosines and sines in float32, whatever the model computes in: bfloat16 cannot hold position
        257.
    """
    frequencies = theta ** -(jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim)
    angles = positions[:, None, :, None].astype(jnp.float32) * frequencies
    angles = jnp.concatenate([angles, angles], axis=-1)
    return jnp.cos(angles), jnp.sin(angles)


def rotate(
    x: Float[Array, "B heads T E"],
    rope: tuple[Float[Array, "B 1 T E"], Float[Array, "B 1 T E"]],
) -> Float[Array, "B heads T E"]:
    """Rotates each head of ``x`` to its position, in float32; the result has the dtype of ``x``."""
    cos, sin = rope
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    turned = jnp.concatenate([-second, first], axis=-1)
    return (x * cos + turned * sin).astype(x.dtype)
