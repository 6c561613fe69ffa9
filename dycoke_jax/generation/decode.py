"""Generates the tokens after the first; the whole loop is one compiled call."""

from dataclasses import replace

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from dycoke_jax.cache import KV, Slots
from dycoke_jax.compression.protocol import DecodePruning
from dycoke_jax.generation.layout import Layout
from dycoke_jax.generation.sampling import Sampling, sample
from dycoke_jax.generation.state import DecodeState, Limits, take_token
from dycoke_jax.generation.walk import walk
from dycoke_jax.model import Model
from dycoke_jax.models.llava import Llava
from dycoke_jax.models.qwen2 import Qwen2Layer


# The state is donated, so that the caches are updated in place instead of being copied.
@jax.jit(static_argnames="layout", donate_argnames="state")
def decode(
    model: Model,
    state: DecodeState,
    sampling: Sampling,
    limits: Limits,
    until: Int[Array, ""],
    *,
    layout: Layout,
) -> DecodeState:
    """Generates until every row is done or has ``until`` tokens.

    Args:
        model: the model.
        state: result of ``prefill`` or of an earlier call; donated.
        sampling: as given to ``prefill``.
        limits: as given to ``prefill``.
        until: number of generated tokens at which to stop, at most the slots for them. Traced, so
            that streaming in pieces of any size runs the same program.
        layout: as given to ``prefill`` (static).
    """
    network = model.bind()
    until = jnp.minimum(until, layout.slots.generated)

    def more(state: DecodeState) -> Array:
        return (state.step < until) & ~state.done.all()

    def body(state: DecodeState) -> DecodeState:
        logits, state = decode_step(network, state, layout.pruning, layout.slots)
        return take_token(state, sample(logits, sampling, state.step), limits)

    return jax.lax.while_loop(more, body, state)


def decode_step(
    network: Llava, state: DecodeState, pruning: DecodePruning | None, slots: Slots
) -> tuple[Float[Array, "B V"], DecodeState]:
    """One decode step: reads ``state.token`` of each row into the caches.

    All rows write to the same slot, the ``step``-th of the generated ones, whatever the lengths of
    their prompts. That is one slice update a layer in place, with nothing to gather on a sharded
    batch.

    Returns:
        The logits of the token that follows, float32, and the new state.
    """
    language = network.language_model
    index = state.step - 1  # of the token being read, among the generated ones
    x = language.embed_tokens(state.token[:, None])
    rope = language.rope((state.length + index)[:, None])
    slot = slots.prompt + index
    mark = jnp.ones((x.shape[0], 1), bool)
    valid = jax.lax.dynamic_update_slice_in_dim(state.valid, mark, slot, axis=1)

    def read(number: int, layer: Qwen2Layer, x: Array) -> tuple[Array, tuple[KV, Array]]:
        x, cache, weights = layer.decode(x, rope, state.caches[number], slot, valid)
        return x, (cache, weights)

    split = len(state.caches)  # the first pruned layer
    x, results = walk(language, x, read, stop=split)
    scores = results[-1][1]
    state = replace(state, caches=[cache for cache, _ in results], valid=valid)

    if pruning is not None:
        with jax.named_scope("kv_pruning"):
            visual = scores[:, :, slots.visual_range].mean(1)
            pruned = pruning.update(state.pruned, visual, index, ~state.done)

        def read_pruned(number: int, layer: Qwen2Layer, x: Array) -> tuple[Array, KV]:
            cache = pruned.caches[number - split]
            place = cache.slots - slots.generated + index
            x, cache, _ = layer.decode(x, rope, cache, place, pruned.visible)
            return x, cache

        x, late = walk(language, x, read_pruned, first=split)
        state = _record(replace(state, pruned=replace(pruned, caches=late)))
    return network.logits(language.norm(x)[:, 0]), state


def _record(state: DecodeState) -> DecodeState:
    """Records what the pruned layers attended to, at the place of the token that follows."""

    def note(log: Array, column: Array) -> Array:
        column = jnp.where(state.done, 0, column).astype(log.dtype)
        return jax.lax.dynamic_update_slice_in_dim(log, column[:, None], state.step, axis=1)

    pruned = state.pruned
    return replace(
        state,
        attended=note(state.attended, pruned.attended),
        refreshed=note(state.refreshed, pruned.refreshed),
    )
