"""Key/value caches of fixed shape, and the segments of a sequence in them."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int, Int8

from dycoke_jax.sharding import DATA, MODEL, constrain, model_size


class Int8Slots(NamedTuple):
    """Keys or values as int8; a slot of a head is ``values * scale``."""

    values: Int8[Array, "B K S E"]
    scale: Float[Array, "B K S"]
    """Float32, above 0 in slots that hold a token."""


class KV(NamedTuple):
    """Keys (after rotation) and values of one layer, in a float dtype or as int8 with scales.

    No other file takes these arrays apart; they are changed by the methods here alone.
    """

    keys: Float[Array, "B K S E"] | Int8Slots
    values: Float[Array, "B K S E"] | Int8Slots

    @property
    def slots(self) -> int:
        """Number of slots (S)."""
        return jax.tree.leaves(self)[0].shape[2]

    def int8(self) -> "KV":
        """Returns the cache as int8, quantised over the width of each head in each slot.

        Each element is rounded to nearest even, so it is off by half a scale at most.
        """
        return KV(_quantise(self.keys), _quantise(self.values))

    def pad(self, count: int) -> "KV":
        """Returns the cache with ``count`` empty slots behind its own."""
        return self._each(
            lambda x: jnp.pad(x, [(0, count if axis == 2 else 0) for axis in range(x.ndim)])
        )

    def part(self, start: int, stop: int) -> "KV":
        """Returns the slots from ``start`` to before ``stop``."""
        return self._each(lambda x: x[:, :, start:stop])

    def take(self, slots: Int[Array, "B chosen"]) -> "KV":
        """Returns the given slots of each row, in the given order; all must exist."""

        def taken(x: Array) -> Array:
            index = slots[:, None, :, None] if x.ndim == 4 else slots[:, None]
            return jnp.take_along_axis(x, index, axis=2, mode="promise_in_bounds")

        return self._each(taken)

    def write(self, new: "KV", slot: Int[Array, ""] | int) -> "KV":
        """Writes the slots of ``new`` from ``slot`` on, the same place in every row.

        That is one slice update of each array, in place where the cache is donated. A cache that is
        int8 quantises what is written to it.
        """

        def written(x: Array, of_new: Array) -> Array:
            return jax.lax.dynamic_update_slice_in_dim(x, of_new, slot, axis=2)

        return self._each(written, self.as_stored(new))

    def as_stored(self, new: "KV") -> "KV":
        """Returns slots as this cache stores them: in its dtype, or quantised if it is int8."""
        if isinstance(self.keys, Int8Slots):
            new = new.int8()
        return self._each(lambda x, of_new: of_new.astype(x.dtype), new)

    @staticmethod
    def join(parts: "list[KV]") -> "KV":
        """Returns the slots of several caches one after the other."""
        return parts[0]._each(lambda *of_parts: jnp.concatenate(of_parts, axis=2), *parts[1:])

    def spread_on(self, mesh: Mesh | None) -> "KV":
        """Spreads, inside a program, rows over the mesh's ``data`` and heads over its ``model``."""
        size = model_size(mesh)

        def place(x: Array) -> Array:
            return constrain(x, mesh, DATA, MODEL if x.shape[1] % size == 0 else None)

        return self._each(place)

    def to_host(self) -> "KV":
        """Returns the cache in the memory of the host."""
        return jax.device_put(self, jax.memory.Space.Host)

    def to_device(self) -> "KV":
        """Returns the cache in the memory of the device."""
        return jax.device_put(self, jax.memory.Space.Device)

    def _each(self, function: Callable[..., Array], *others: "KV") -> "KV":
        """Applies a function to each array, and the same arrays of other caches."""
        return jax.tree.map(function, self, *others)


def _quantise(x: Float[Array, "B K S E"] | Int8Slots) -> Int8Slots:
    if isinstance(x, Int8Slots):
        return x
    wide = x.astype(jnp.float32)
    largest = jnp.abs(wide).max(-1)
    scale = jnp.maximum(largest / 127, jnp.finfo(jnp.float32).tiny)
    return Int8Slots(jnp.round(wide / scale[..., None]).astype(jnp.int8), scale)


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
