"""The state of a batch between prefill and its last token."""

from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from dycoke_jax.cache import KV


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Limits:
    """When each row stops."""

    max_new_tokens: Int[Array, "B"]
    """0 marks an empty place in the batch."""
    stop_ids: Int[Array, "B stops"]
    """Filled up with -1."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class DecodeState:
    """A batch in the middle of generating; every shape stays as it is until the end."""

    step: Int[Array, ""]
    """Tokens generated so far by the rows that go on."""
    token: Int[Array, "B"]
    """The last of them, not yet read by the model."""
    tokens: Int[Array, "B G"]
    """All of them; 0 after a row's end."""
    count: Int[Array, "B"]
    """How many of ``tokens`` each row has made, its stop token included."""
    done: Bool[Array, "B"]
    stopped: Bool[Array, "B"]
    """Whether the row ended by a stop token."""
    length: Int[Array, "B"]
    """Tokens of the prompt, which is the rotary position of the first generated one."""
    visual: Int[Array, "B"]
    """Visual tokens of the prompt after merging."""
    newlines: Int[Array, "B"]
    kept: Int[Array, "B M"] | None
    """Which ones they are, in their order (see ``protocol.Compressor.merge``); None: all."""
    caches: list[KV]
    """Keys and values of the layers that attend to everything, over all slots."""
    valid: Bool[Array, "B S"]
    pruned: Any
    """What the other layers attend to (a ``protocol.PrunedCache``); None without pruning."""
    attended: Int[Array, "B G"]
    """Visual tokens that those layers saw in the step that made each token; 0 at the first."""
    refreshed: Bool[Array, "B G"]
    """Whether that step chose them anew."""


def take_token(state: DecodeState, token: Int[Array, "B"], limits: Limits) -> DecodeState:
    """Books a new token for every row that is not done, and sees which rows end with it."""
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
