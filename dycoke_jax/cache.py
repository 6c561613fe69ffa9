"""Key/value caches of fixed shape, and the segments of a sequence in them."""

from dataclasses import dataclass
from typing import NamedTuple

from jaxtyping import Array, Float


class KV(NamedTuple):
    """Keys (after rotation) and values of one layer."""

    keys: Float[Array, "B K S E"]
    values: Float[Array, "B K S E"]


@dataclass(frozen=True)
class Slots:
    """Sizes in slots of the four segments of a key/value cache, which follow each other.

        prefix | visual | question | generated

    Rows of a batch differ in how many prefix and question slots they fill; an empty slot is not
    valid and takes no rotary position. Newlines lie among the visual slots.
    """

    prefix: int
    visual: int
    question: int
    generated: int

    @property
    def prompt(self) -> int:
        """Number of slots before the generated ones (T)."""
        return self.prefix + self.visual + self.question

    @property
    def visual_range(self) -> slice:
        """Which slots are visual."""
        return slice(self.prefix, self.prefix + self.visual)
