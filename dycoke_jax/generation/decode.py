"""Generates the tokens after the first; the whole loop is one compiled call."""

from dataclasses import replace

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from dycoke_jax.cache import KV
from dycoke_jax.compression.view import View
from dycoke_jax.generation.layout import Group, Layout
from dycoke_jax.generation.sampling import Sampling, sample
from dycoke_jax.generation.state import DecodeState, Limits, spread_on, take_token
from dycoke_jax.generation.walk import walk
from dycoke_jax.model import Model
from dycoke_jax.models.llava import Llava
from dycoke_jax.models.qwen2 import Qwen2Layer, Rope


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
    until = jnp.minimum(until, layout.slots.generated)

    def more(state: DecodeState) -> Array:
        return (state.step < until) & ~state.done.all()

    def body(state: DecodeState) -> DecodeState:
        own, step = model.in_step(state.step)
        logits, state = decode_step(own.bind(), replace(state, step=step), layout)
        state = take_token(state, sample(logits, sampling, state.step), limits)
        return spread_on(state, model.mesh)

    return jax.tree.map(_stay, jax.lax.while_loop(more, body, state))


def _stay(x: Array) -> Array:
    """Says of an output that waits in the host's memory that it stays there.

    XLA for TPU refuses a program that returns such an array without saying so.
    """
    space = jax.typeof(x).memory_space
    return jax.device_put(x, space) if space == jax.memory.Space.Host else x


def decode_step(
    network: Llava, state: DecodeState, layout: Layout
) -> tuple[Float[Array, "B V"], DecodeState]:
    """One decode step: reads ``state.token`` of each row into the caches.

    All rows write to the same slot, the ``step``-th of the generated ones, whatever the lengths of
    their prompts. That is one slice update a layer in place, with nothing to gather on a sharded
    batch.

    Returns:
        The logits of the token that follows, float32, and the new state.
    """
    language, generated = network.language_model, layout.slots.generated
    index = state.step - 1  # of the token being read, among the generated ones
    x = language.embed_tokens(state.token[:, None])
    rope = language.rope((state.length + index)[:, None])
    mark = jnp.ones((x.shape[0], 1), bool)
    views: list[View] = []
    scores = jnp.zeros((x.shape[0], layout.slots.visual))
    for group, view in zip(layout.groups, state.views, strict=True):
        slot = view.slots - generated + index
        visible = jax.lax.dynamic_update_slice_in_dim(view.visible, mark, slot, axis=1)
        view = replace(view, visible=visible)
        if group.cache is not None:
            with jax.named_scope("kv_pruning"):
                view = group.cache.update(view, group.slots, scores, ~state.done)
        x, caches, weights = _read(network, x, rope, view, group, slot)
        # The last layer of a group scores the visual slots for the group that follows.
        scores = weights[:, :, group.slots.visual_range].mean(1)
        views.append(replace(view, caches=caches))
    return network.logits(language.norm(x)[:, 0]), _record(replace(state, views=views))


def _read(
    network: Llava,
    x: Float[Array, "B 1 D"],
    rope: Rope,
    view: View,
    group: Group,
    slot: Int[Array, ""],
) -> tuple[Float[Array, "B 1 D"], list[KV], Float[Array, "B H S"]]:
    """Passes the current token through a group of layers.

    Returns:
        The output, the caches with the token, and the attention weights of the last layer.
    """

    def visit(number: int, layer: Qwen2Layer, x: Array) -> tuple[Array, tuple[KV, Array]]:
        cache = view.caches[number - group.first]
        x, cache, weights = layer.decode(x, rope, cache, slot, view.visible)
        return x, (cache, weights)

    x, results = walk(network.language_model, x, visit, group.first, group.stop)
    return x, [cache for cache, _ in results], results[-1][1]


def _record(state: DecodeState) -> DecodeState:
    """Records what the last layers attended to, at the place of the token that follows."""

    def note(log: Array, column: Array) -> Array:
        column = jnp.where(state.done, 0, column).astype(log.dtype)
        return jax.lax.dynamic_update_slice_in_dim(log, column[:, None], state.step, axis=1)

    view = state.views[-1]
    return replace(
        state,
        attended=note(state.attended, view.attended()),
        refreshed=note(state.refreshed, view.refreshed),
    )
