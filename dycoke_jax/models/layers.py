"""Layers that the vision tower, the projector and the language model share.

Matrices are kept as the checkpoints have them, [out, in]. A module declares parameters by shape
only (see ``dycoke_jax.model.Model.bind``, which gives them their arrays), so the zeros below are
never computed.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from dycoke_jax.ops.matmul import matmul
from dycoke_jax.sharding import gathered

EachLayer = Callable[[Callable[..., Any]], Callable[..., Any]]
"""Changes how a layer is run, and not what it computes."""


def unchanged(layer: Callable[..., Any]) -> Callable[..., Any]:
    """Returns a layer as it is."""
    return layer


class Parameter(nnx.Param[Array]):
    """A parameter that is gathered, where it is spread over ``data``, each time it is read.

    ``Model.bind`` then gives it ``places``: its shardings before and after.
    """

    def get_value(self, **index: Any) -> Any:
        """Returns the gathered value; see ``sharding.gathered``."""
        value, places = super().get_value(**index), self.get_metadata("places", None)
        return value if places is None else gathered(value, *places)


def parameter(*shape: int) -> Parameter:
    """A parameter of the given shape, float32; its values are never used (see the module)."""
    return Parameter(jnp.zeros(shape, jnp.float32))


class Linear(nnx.Module):
    """``x @ weight.T + bias``."""

    def __init__(self, width_in: int, width_out: int, *, bias: bool) -> None:
        self.weight = parameter(width_out, width_in)
        self.bias = parameter(width_out) if bias else None

    def __call__(self, x: Float[Array, "*rows in"]) -> Float[Array, "*rows out"]:
        """Computes x @ weight.T + bias in the dtype of x, float32 in full precision."""
        out = matmul(x, self.weight.get_value())
        return out if self.bias is None else out + self.bias[...].astype(x.dtype)


class LayerNorm(nnx.Module):
    """Layer normalisation over the last axis, computed in float32."""

    def __init__(self, width: int, epsilon: float) -> None:
        self.weight = parameter(width)
        self.bias = parameter(width)
        self.epsilon = epsilon

    def __call__(self, x: Float[Array, "*rows D"]) -> Float[Array, "*rows D"]:
        """Computes (x - mean) / sqrt(variance + epsilon) * weight + bias, in the dtype of x."""
        wide = x.astype(jnp.float32)
        wide = wide - wide.mean(-1, keepdims=True)
        wide = wide * jax.lax.rsqrt((wide * wide).mean(-1, keepdims=True) + self.epsilon)
        return (wide * self.weight[...] + self.bias[...]).astype(x.dtype)


class RMSNorm(nnx.Module):
    """Root-mean-square normalisation over the last axis, computed in float32."""

    def __init__(self, width: int, epsilon: float) -> None:
        self.weight = parameter(width)
        self.epsilon = epsilon

    def __call__(self, x: Float[Array, "*rows D"]) -> Float[Array, "*rows D"]:
        """Computes x / sqrt(mean(x^2) + epsilon) * weight, in the dtype of x."""
        wide = x.astype(jnp.float32)
        wide = wide * jax.lax.rsqrt((wide * wide).mean(-1, keepdims=True) + self.epsilon)
        return (wide * self.weight[...]).astype(x.dtype)
