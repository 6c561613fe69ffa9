"""The Qwen2 language model (Yang et al. 2024): grouped-query attention, rotary positions, SwiGLU.

A layer is run over a whole prompt (``prefill``) or over one new token a row against a cache
(``decode``). The caller decides which cache that is and which of its slots are visible: that is
where token compression plugs in.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int

from dycoke_jax.cache import KV
from dycoke_jax.config import TextConfig
from dycoke_jax.models.layers import Linear, RMSNorm, parameter
from dycoke_jax.ops.attention import attention, attention_weights, decode_attention
from dycoke_jax.ops.matmul import take_rows
from dycoke_jax.ops.rope import rotate, rotations
from dycoke_jax.ops.rows import by_row
from dycoke_jax.sharding import constrain_heads, kv_heads_on, of_rows

Rope = tuple[Float[Array, "B 1 T E"], Float[Array, "B 1 T E"]]


class Qwen2(nnx.Module):
    """Token embedding, decoder layers and the final norm; the head belongs to the whole model."""

    def __init__(self, config: TextConfig, dtype: str, mesh: Mesh | None = None) -> None:
        self.config = config
        self.embed_tokens = Embedding(config, dtype)
        self.layers = nnx.List([Qwen2Layer(config, mesh) for _ in range(config.num_layers)])
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def rope(self, positions: Int[Array, "B T"]) -> Rope:
        """Cosines and sines of the rotary embedding at these positions, for all layers."""
        return rotations(positions, self.config.head_dim, self.config.rope_theta)


class Embedding(nnx.Module):
    """A vector for each entry of the vocabulary."""

    def __init__(self, config: TextConfig, dtype: str) -> None:
        self.dtype = dtype
        self.weight = parameter(config.vocab_size, config.hidden_size)

    def __call__(self, ids: Int[Array, "B T"]) -> Float[Array, "B T D"]:
        """The vectors of token ids, each of which must lie in the vocabulary, in ``dtype``."""
        return take_rows(self.weight.get_value(), ids, self.dtype)


class Qwen2Layer(nnx.Module):
    """A pre-norm decoder block: grouped-query attention and SwiGLU, each with a residual."""

    def __init__(self, config: TextConfig, mesh: Mesh | None) -> None:
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Qwen2Attention(config, mesh)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = Qwen2MLP(config)

    def prefill(
        self,
        x: Float[Array, "B T D"],
        rope: Rope,
        valid: Bool[Array, "B T"],
        parts: Int[Array, "B T"] | None = None,
    ) -> tuple[Float[Array, "B T D"], KV]:
        """The block over whole sequences, causal; ``parts`` as in ``ops.attention``."""
        if self.self_attn.spread is None:
            return by_row(self._prefill, x, rope, valid, parts)
        return self._prefill(x, rope, valid, parts)

    def _prefill(
        self,
        x: Float[Array, "B T D"],
        rope: Rope,
        valid: Bool[Array, "B T"],
        parts: Int[Array, "B T"] | None,
    ) -> tuple[Float[Array, "B T D"], KV]:
        q, k, v = self.self_attn.project(self.input_layernorm(x), rope)
        spread = self.self_attn.spread
        out = attention(q, k, v, valid, causal=True, parts=parts, spread=spread)
        x = x + self.self_attn.join_heads(out)
        return x + self.mlp(self.post_attention_layernorm(x)), KV(k, v)

    def decode(
        self,
        x: Float[Array, "B 1 D"],
        rope: Rope,
        cache: KV,
        slot: Int[Array, ""],
        visible: Bool[Array, "B S"],
    ) -> tuple[Float[Array, "B 1 D"], KV, Float[Array, "B H S"]]:
        """The block over one new token a row.

        Args:
            x: state of the token.
            rope: rotation of its position.
            cache: keys and values of the tokens before it.
            slot: where its own keys and values are written.
            visible: slots that it attends to.

        Returns:
            The new state, the cache with the token in it, and the attention weights in float32.
        """
        q, k, v = self.self_attn.project(self.input_layernorm(x), rope)
        own = cache.as_stored(KV(k, v))
        out, weights, cache = decode_attention(q, cache, own, slot, visible)
        x = x + self.self_attn.join_heads(out)
        return x + self.mlp(self.post_attention_layernorm(x)), cache, weights

    def attention_of(
        self, x: Float[Array, "B 1 D"], rope: Rope, cache: KV, visible: Bool[Array, "B S"]
    ) -> Float[Array, "B H S"]:
        """Float32 attention weights of one token a row whose key is in the cache already."""
        q, _, _ = self.self_attn.project(self.input_layernorm(x), rope)
        return attention_weights(q, cache.keys, visible[:, None])[:, :, 0]


class Qwen2Attention(nnx.Module):
    """The projections around attention: queries, keys and values have a bias, the output none."""

    def __init__(self, config: TextConfig, mesh: Mesh | None) -> None:
        self.head_dim = config.head_dim
        self.spread = of_rows(mesh, config)
        self.repeats = kv_heads_on(config, mesh) // config.num_kv_heads
        inner, kv_inner = config.num_heads * self.head_dim, config.num_kv_heads * self.head_dim
        self.q_proj = Linear(config.hidden_size, inner, bias=True)
        self.k_proj = Linear(config.hidden_size, kv_inner, bias=True)
        self.v_proj = Linear(config.hidden_size, kv_inner, bias=True)
        self.o_proj = Linear(inner, config.hidden_size, bias=False)

    def project(
        self, x: Float[Array, "B T D"], rope: Rope
    ) -> tuple[Float[Array, "B H T E"], Float[Array, "B K T E"], Float[Array, "B K T E"]]:
        """Queries and keys, rotated to their positions, and values.

        On a mesh, KV heads may be repeated; see ``sharding.kv_heads_on``.
        """

        def heads(y: Float[Array, "B T inner"]) -> Float[Array, "B heads T E"]:
            return y.reshape(*y.shape[:2], -1, self.head_dim).swapaxes(1, 2)

        q, k, v = heads(self.q_proj(x)), heads(self.k_proj(x)), heads(self.v_proj(x))
        if self.repeats > 1:
            k, v = (jnp.repeat(x, self.repeats, axis=1) for x in (k, v))
        q, k, v = (constrain_heads(x, self.spread) for x in (q, k, v))
        return rotate(q, rope), rotate(k, rope), v

    def join_heads(self, out: Float[Array, "B H T E"]) -> Float[Array, "B T D"]:
        """The output projection of the concatenated heads."""
        out = out.swapaxes(1, 2)
        return self.o_proj(out.reshape(*out.shape[:2], -1))


class Qwen2MLP(nnx.Module):
    """The SwiGLU feed-forward network (Shazeer 2020)."""

    def __init__(self, config: TextConfig) -> None:
        self.gate_proj = Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = Linear(config.intermediate_size, config.hidden_size, bias=False)

    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """Computes down(silu(gate(x)) * up(x))."""
        return self.down_proj(jax.nn.silu(self.gate_proj(x)) * self.up_proj(x))


def positions_of(valid: Bool[Array, "B T"]) -> Int[Array, "B T"]:
    """Rotary positions: the number of tokens before each slot; empty slots are not counted."""
    return jnp.maximum(jnp.cumsum(valid, axis=1) - 1, 0)
