"""Key/value caches of fixed shape, and the segments of a sequence in them."""

from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


class KV(NamedTuple):
    """Keys (after rotation) and values of one layer.

    No other file takes these arrays apart; they are changed by the methods here alone.
    """

    keys: Float[Array, "B K S E"]
    values: Float[Array, "B K S E"]

    @property
    def slots(self) -> int:
        """Number of slots (S)."""
        return self.keys.shape[2]

    def pad(self, count: int) -> "KV":
        """Returns the cache with ``count`` empty slots behind its own."""
        room = ((0, 0), (0, 0), (0, count), (0, 0))
        return KV(jnp.pad(self.keys, room), jnp.pad(self.values, room))

    def part(self, start: int, stop: int) -> "KV":
        """Returns the slots from ``start`` to before ``stop``."""
        return KV(self.keys[:, :, start:stop], self.values[:, :, start:stop])

    def take(self, slots: Int[Array, "B chosen"]) -> "KV":
        """Returns the given slots of each row, in the given order."""
        index = slots[:, None, :, None]
        return KV(*(jnp.take_along_axis(x, index, axis=2) for x in (self.keys, self.values)))

    def write(self, new: "KV", slot: Int[Array, ""] | int) -> "KV":
        """Writes the slots of ``new`` from ``slot`` on, the same place in every row.

        That is one slice update of each array, in place where the cache is donated.
        """
        update = jax.lax.dynamic_update_slice_in_dim
        keys = update(self.keys, new.keys.astype(self.keys.dtype), slot, axis=2)
        return KV(keys, update(self.values, new.values.astype(self.values.dtype), slot, axis=2))

    @staticmethod
    def join(parts: "list[KV]") -> "KV":
        """Returns the slots of several caches one after the other."""
        keys = jnp.concatenate([part.keys for part in parts], axis=2)
        return KV(keys, jnp.concatenate([part.values for part in parts], axis=2))


@dataclass(frozen=True)
class Slots:
    """Sizes in slots of the four segments of a key/value cache, which follow each other.

        prefix | visual | question | generated

    Rows of a batch differ in how many slots of a segment they fill; an empty slot is not valid and
    takes no rotary position. Newlines lie among the visual slots.
    """

    prefix: int
    visual: int
    question: int
    generated: int
    newlines: int = 0
    """How many of the visual slots are for newlines."""

    @property
    def prompt(self) -> int:
        """Number of slots before the generated ones (T)."""
        return self.prefix + self.visual + self.question

    @property
    def tokens(self) -> int:
        """Number of visual slots for visual tokens."""
        return self.visual - self.newlines

    @property
    def visual_range(self) -> slice:
        """Which slots are visual."""
        return slice(self.prefix, self.prefix + self.visual)
