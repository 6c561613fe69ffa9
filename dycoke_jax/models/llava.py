"""The whole model: tower, projector, pooling, newline, language model and head."""

import zlib
from collections.abc import Mapping, Sequence
from functools import lru_cache

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jax.typing import DTypeLike
from jaxtyping import Array, Float, UInt8

from dycoke_jax.config import LlavaConfig
from dycoke_jax.models.layers import EachLayer, Linear, parameter, unchanged
from dycoke_jax.models.qwen2 import Qwen2
from dycoke_jax.models.siglip import SiglipVisionTower
from dycoke_jax.models.signals import Signal
from dycoke_jax.ops.matmul import matmul
from dycoke_jax.ops.pooling import pool

Params = Mapping[str, Array]
"""The weights of a model: dotted path to array."""


class Llava(nnx.Module):
    """LLaVA-OneVision or LLaVA-Video, computed in the dtype of this name, on a mesh or one device.

    On a mesh the first axis of what is computed must be a multiple of the devices: that of frames
    of all of them, that of rows of those along ``data``.
    """

    def __init__(
        self, config: LlavaConfig, dtype: str = "float32", mesh: Mesh | None = None
    ) -> None:
        self.config = config
        self.dtype = dtype
        self.mesh = mesh
        self.vision_tower = SiglipVisionTower(config.vision, dtype, mesh)
        self.projector = Projector(config)
        self.image_newline = parameter(config.text.hidden_size)
        self.language_model = Qwen2(config.text, dtype, mesh)
        self.lm_head = None if config.text.tie_word_embeddings else Head(config)

    def encode(
        self, frames: UInt8[Array, "C height width 3"], each_layer: EachLayer = unchanged
    ) -> Float[Array, "C N D"]:
        """Vision tower, projector and pooling: the visual tokens of each frame in raster order.

        ``each_layer`` is as in ``SiglipVisionTower.with_signals``.
        """
        return self._pool(self.projector(self.vision_tower.with_signals(frames, (), each_layer)[0]))

    def encode_with_signals(
        self, frames: UInt8[Array, "C height width 3"], signals: Sequence[Signal]
    ) -> tuple[Float[Array, "C N D"], tuple[Float[Array, "C N ..."], ...]]:
        """Encodes frames, and computes signals of the vision tower besides.

        Args:
            frames: RGB values at the size of the vision tower's input.
            signals: what to compute.

        Returns:
            The visual tokens of each frame in raster order, in the dtype of the computation, and
            the signals in the order in which they were asked for, pooled as the visual tokens are:
            keys [C, N, vision width] and mean_keys [C, N, E] in the dtype of the computation,
            attention [C, N] in float32.

        Raises:
            ConfigError: if the tower does not have a layer.
        """
        states, computed = self.vision_tower.with_signals(frames, signals)
        return self._pool(self.projector(states)), tuple(map(self._pool, computed))

    def _pool(self, x: Float[Array, "C P ..."]) -> Float[Array, "C N ..."]:
        pooled = pool(x.reshape(*x.shape[:2], -1), self.config.pool_mode, self.config.pool_stride)
        return pooled.reshape(*pooled.shape[:2], *x.shape[2:])

    def logits(self, x: Float[Array, "*rows D"]) -> Float[Array, "*rows V"]:
        """Next-token logits in float32 of states after the final norm."""
        head = self.lm_head or self.language_model.embed_tokens
        return matmul(x, head.weight.get_value(), jnp.float32)


class Projector(nnx.Module):
    """A two-layer MLP with the exact GELU, from the tower's width to the language model's."""

    def __init__(self, config: LlavaConfig) -> None:
        width = config.text.hidden_size
        self.linear_1 = Linear(config.vision.hidden_size, width, bias=True)
        self.linear_2 = Linear(width, width, bias=True)

    def __call__(self, x: Float[Array, "C P vision_width"]) -> Float[Array, "C P D"]:
        """Computes linear_2(gelu(linear_1(x))) for every patch."""
        return self.linear_2(jax.nn.gelu(self.linear_1(x), approximate=False))


class Head(nnx.Module):
    """The matrix of the logits, where it is not tied to the embedding."""

    def __init__(self, config: LlavaConfig) -> None:
        self.weight = parameter(config.text.vocab_size, config.text.hidden_size)


@lru_cache(maxsize=32)
def split(
    config: LlavaConfig, dtype: str, mesh: Mesh | None = None
) -> tuple[nnx.GraphDef[Llava], tuple[tuple[tuple, nnx.Param], ...]]:
    """Returns the structure of a network, and its parameters without values by their keys.

    Args:
        config: sizes and layout.
        dtype: name of the dtype of the computation.
        mesh: the devices; None for a single one.
    """
    graphdef, state = nnx.split(nnx.eval_shape(lambda: Llava(config, dtype, mesh)))
    return graphdef, tuple(nnx.to_flat_state(state))


def dotted(keys: tuple) -> str:
    """The dotted path of a parameter."""
    return ".".join(str(key) for key in keys)


def abstract_params(config: LlavaConfig) -> dict[str, jax.ShapeDtypeStruct]:
    """Shape and dtype (float32) of every parameter by its path; allocates nothing."""
    _, leaves = split(config, "float32")
    return {dotted(keys): jax.ShapeDtypeStruct(param.shape, param.dtype) for keys, param in leaves}


def random_param(path: str, shape: tuple[int, ...], seed: int) -> Float[np.ndarray, "..."]:
    """One weight of an untrained model, float32.

    Norms are 1, biases 0, all others normal with a standard deviation of 0.02. A weight depends on
    its path and the seed alone, so that a model can be made tensor by tensor.
    """
    *_, module, name = ["", *path.split(".")]
    if name == "bias":
        return np.zeros(shape, np.float32)
    if "norm" in module:
        return np.ones(shape, np.float32)
    random = np.random.default_rng([seed, zlib.crc32(path.encode())])
    return random.standard_normal(shape, np.float32) * np.float32(0.02)


def random_params(config: LlavaConfig, seed: int = 0, dtype: DTypeLike = jnp.float32) -> Params:
    """The weights of an untrained model; see ``random_param``."""
    return {
        path: jnp.asarray(random_param(path, leaf.shape, seed), dtype)
        for path, leaf in abstract_params(config).items()
    }
