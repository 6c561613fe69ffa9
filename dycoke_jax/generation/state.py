"""The state of a batch between prefill and its last token."""

from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Int

from dycoke_jax.cache import KV
from dycoke_jax.compression.view import View
from dycoke_jax.sharding import constrain_rows


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Limits:
    """When each row stops."""

    max_new_tokens: Int[Array, "B"]
    """0 marks an empty row of the batch."""
    stop_ids: Int[Array, "B stops"]
    """Ids that end an answer, filled up with -1."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class DecodeState:
    """A batch between two decode steps. No shape changes until the end."""

    step: Int[Array, ""]
    """Number of tokens generated so far by the rows that are not done."""
    token: Int[Array, "B"]
    """The last token of each row, which the model has not read yet."""
    tokens: Int[Array, "B generated"]
    """All generated tokens; 0 after the end of a row."""
    count: Int[Array, "B"]
    """Number of generated tokens of each row, its stop token included."""
    done: Bool[Array, "B"]
    stopped: Bool[Array, "B"]
    """Whether the row ended by a stop token."""
    length: Int[Array, "B"]
    """Number of tokens of the prompt: the rotary position of the first generated token."""
    visual: Int[Array, "B"]
    """Number of visual tokens that entered the language model."""
    newlines: Int[Array, "B"]
    views: list[View]
    """Key/value caches of each group of layers (``layout.Layout.groups``), and what is visible."""
    attended: Int[Array, "B generated"]
    """Visual tokens that the last group of layers attended to in the step that made each token; 0
    for the first token."""
    refreshed: Bool[Array, "B generated"]
    """Whether the step that made each token chose anew."""


def spread_on(state: DecodeState, mesh: Mesh | None) -> DecodeState:
    """Spreads the arrays of a state over a mesh, inside a program."""

    def place(leaf: KV | Array) -> KV | Array:
        return leaf.spread_on(mesh) if isinstance(leaf, KV) else constrain_rows(leaf, mesh)

    return jax.tree.map(place, state, is_leaf=lambda leaf: isinstance(leaf, KV))


def take_token(state: DecodeState, token: Int[Array, "B"], limits: Limits) -> DecodeState:
    """Appends a new token to every row that is not done, and marks the rows that end with it."""
    stop = (token[:, None] == limits.stop_ids).any(1)
    active = ~state.done
    column = jnp.where(active, token, 0)[:, None]
    count = state.count + active
    return replace(
        state,
        step=state.step + 1,
        token=token,
        tokens=jax.lax.dynamic_update_slice_in_dim(state.tokens, column, state.step, axis=1),
        count=count,
        stopped=state.stopped | (active & stop),
        done=state.done | stop | (count >= limits.max_new_tokens),
    )
