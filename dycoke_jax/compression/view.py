"""What a group of decoder layers attends to while decoding."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from dycoke_jax.cache import KV


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class View:
    """The caches of a group of layers, and which of their slots the current token may attend to.

    Plain layers see all tokens of the prompt. A cache stage (``protocol.CacheStage``) gives its
    layers a view with fewer slots, or with some of them hidden.
    """

    caches: list[KV]
    """Keys and values of each layer. The slots for generated tokens come last."""
    visible: Bool[Array, "B S"]
    """Slots that the current token may attend to."""
    is_token: Bool[Array, "B S"]
    """Slots that hold visual tokens; newlines, text and empty slots are none."""
    places: Int[Array, "B S"]
    """Place of each visual token among the F * N tokens of its clip."""
    refreshed: Bool[Array, "B"]
    """Whether the last step chose anew which tokens are attended to."""
    memory: Any = None
    """What a cache stage keeps from step to step; a pytree."""

    @property
    def slots(self) -> int:
        """Number of slots (S)."""
        return self.visible.shape[1]

    def attended(self) -> Int[Array, "B"]:
        """Counts the visual tokens that the current token attends to, newlines not counted."""
        return (self.visible & self.is_token).sum(1, dtype=jnp.int32)
