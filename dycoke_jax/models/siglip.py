"""The SigLIP vision tower (Zhai et al. 2023) as LLaVA uses it: no head, no last block, no norm."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Float, UInt8

from dycoke_jax.config import VisionConfig
from dycoke_jax.models.layers import EachLayer, LayerNorm, Linear, parameter, unchanged
from dycoke_jax.models.signals import Kind, Signal, check_signals
from dycoke_jax.ops.attention import attention, received_attention
from dycoke_jax.ops.matmul import matmul
from dycoke_jax.sharding import of_frames


def normalise(frames: UInt8[Array, "C height width 3"]) -> Float[Array, "C height width 3"]:
    """Pixels 0..255 to -1..1 in float32, as the reference processors (mean and deviation 0.5)."""
    return (frames.astype(jnp.float32) * (1 / 255) - 0.5) / 0.5


class SiglipVisionTower(nnx.Module):
    """Patch embedding, position embedding and transformer blocks: frames to patch features."""

    def __init__(self, config: VisionConfig, dtype: str, mesh: Mesh | None = None) -> None:
        self.config = config
        self.dtype = dtype
        self.patch_embedding = PatchEmbedding(config)
        self.position_embedding = PositionEmbedding(config)
        self.layers = nnx.List([SiglipLayer(config, mesh) for _ in range(config.num_layers)])

    def __call__(self, frames: UInt8[Array, "C height width 3"]) -> Float[Array, "C P D"]:
        """Encodes each frame independently.

        Args:
            frames: RGB values of ``config.image_size`` pixels a side.

        Returns:
            The patch states after the last block that is run, in raster order, in the dtype of the
            computation.
        """
        return self.with_signals(frames, ())[0]

    def with_signals(
        self,
        frames: UInt8[Array, "C height width 3"],
        signals: Sequence[Signal],
        each_layer: EachLayer = unchanged,
    ) -> tuple[Float[Array, "C P D"], tuple[Float[Array, "C P ..."], ...]]:
        """Encodes each frame independently, and computes what is asked for besides.

        Args:
            frames: RGB values of ``config.image_size`` pixels a side.
            signals: what to compute.
            each_layer: called with each layer before it is run, as ``jax.checkpoint`` is.

        Returns:
            The patch states as without signals, and the signals in the order in which they were
            asked for: keys [C, P, D] and mean_keys [C, P, E] in the dtype of the computation,
            attention [C, P] in float32.

        Raises:
            ConfigError: if the tower does not have a layer.
        """
        check_signals(self.config, signals)
        computed: dict[Signal, Array] = {}
        x = self.patch_embedding(normalise(frames).astype(self.dtype))
        x = x + self.position_embedding.weight[...].astype(x.dtype)
        for index, layer in enumerate(self.layers):
            with jax.named_scope(f"vision_layer_{index}"):
                for signal in signals:
                    if signal.layer % len(self.layers) == index:
                        computed[signal] = layer.signal(x, signal.kind)
                x = each_layer(layer.__call__)(x)
        return x, tuple(computed[signal] for signal in signals)


class PatchEmbedding(nnx.Module):
    """A convolution whose stride is its size, written as one matrix product over patches."""

    def __init__(self, config: VisionConfig) -> None:
        self.grid, self.patch = config.grid, config.patch_size
        self.weight = parameter(config.hidden_size, 3, self.patch, self.patch)
        self.bias = parameter(config.hidden_size)

    def __call__(self, pixels: Float[Array, "C height width 3"]) -> Float[Array, "C P D"]:
        """The embedding of each whole patch; a remainder is cut off (384 = 27 * 14 + 6)."""
        grid, patch = self.grid, self.patch
        cut = pixels[:, : grid * patch, : grid * patch]
        patches = cut.reshape(-1, grid, patch, grid, patch, 3)
        # The values of a patch in the order of the convolution's weights: colour, row, column.
        patches = patches.transpose(0, 1, 3, 5, 2, 4).reshape(-1, grid * grid, 3 * patch * patch)
        weight = self.weight[...].reshape(-1, 3 * patch * patch)
        return matmul(patches, weight) + self.bias[...].astype(pixels.dtype)


class PositionEmbedding(nnx.Module):
    """A learned vector for each patch of a frame."""

    def __init__(self, config: VisionConfig) -> None:
        self.weight = parameter(config.grid**2, config.hidden_size)


class SiglipLayer(nnx.Module):
    """A pre-norm transformer block with bidirectional attention."""

    def __init__(self, config: VisionConfig, mesh: Mesh | None) -> None:
        self.layer_norm1 = LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.self_attn = SiglipAttention(config, mesh)
        self.layer_norm2 = LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.mlp = SiglipMLP(config)

    def __call__(self, x: Float[Array, "C P D"]) -> Float[Array, "C P D"]:
        """Computes x + attention(norm(x)), then x + mlp(norm(x)) of that."""
        x = x + self.self_attn(self.layer_norm1(x))
        return x + self.mlp(self.layer_norm2(x))

    def signal(self, x: Float[Array, "C P D"], kind: Kind) -> Float[Array, "C P ..."]:
        """Computes a signal of the layer from its input; see ``Signal``.

        The norm and the keys are written a second time here. The compiler computes them once.
        """
        x = self.layer_norm1(x)
        match kind:
            case "keys":
                return self.self_attn.k_proj(x)
            case "mean_keys":
                return self.self_attn.mean_keys(x)
            case "attention":
                return self.self_attn.received(x)


class SiglipAttention(nnx.Module):
    """Multi-head attention over the patches of a frame."""

    def __init__(self, config: VisionConfig, mesh: Mesh | None) -> None:
        width = config.hidden_size
        self.num_heads = config.num_heads
        self.spread = of_frames(mesh)
        self.q_proj = Linear(width, width, bias=True)
        self.k_proj = Linear(width, width, bias=True)
        self.v_proj = Linear(width, width, bias=True)
        self.out_proj = Linear(width, width, bias=True)

    def __call__(self, x: Float[Array, "C P D"]) -> Float[Array, "C P D"]:
        """Self-attention in which every patch attends to every patch of its frame."""
        q, k, v = (self._heads(project(x)) for project in (self.q_proj, self.k_proj, self.v_proj))
        out = attention(q, k, v, causal=False, spread=self.spread)
        return self.out_proj(out.swapaxes(1, 2).reshape(x.shape))

    def mean_keys(self, x: Float[Array, "C P D"]) -> Float[Array, "C P E"]:
        """The key of each patch: mean over heads."""
        return self._heads(self.k_proj(x)).mean(1, dtype=jnp.float32).astype(x.dtype)

    def received(self, x: Float[Array, "C P D"]) -> Float[Array, "C P"]:
        """The attention that each patch receives: mean over heads and queries, float32."""
        q, k = self._heads(self.q_proj(x)), self._heads(self.k_proj(x))
        return received_attention(q, k, self.spread)

    def _heads(self, y: Float[Array, "C P D"]) -> Float[Array, "C H P E"]:
        return y.reshape(*y.shape[:2], self.num_heads, -1).swapaxes(1, 2)


class SiglipMLP(nnx.Module):
    """A two-layer MLP with the tanh approximation of GELU."""

    def __init__(self, config: VisionConfig) -> None:
        self.fc1 = Linear(config.hidden_size, config.intermediate_size, bias=True)
        self.fc2 = Linear(config.intermediate_size, config.hidden_size, bias=True)

    def __call__(self, x: Float[Array, "C P D"]) -> Float[Array, "C P D"]:
        """Computes fc2(gelu(fc1(x)))."""
        return self.fc2(jax.nn.gelu(self.fc1(x), approximate=True))
