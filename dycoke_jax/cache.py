"""Key/value caches of fixed shape: what a layer keeps, and where the parts of a sequence lie."""

from dataclasses import dataclass
from typing import NamedTuple

from jaxtyping import Array, Float


class KV(NamedTuple):
    """Keys (after rotation) and values of one layer."""

    keys: Float[Array, "B J S E"]
    values: Float[Array, "B J S E"]


@dataclass(frozen=True)
class Slots:
    """Sizes of the four segments of a key/value cache, one after another.

        prefix | visual | question | generated

    Rows of a batch differ in how many prefix and question slots they fill; an empty slot is marked
    invalid and takes no position. Newlines lie among the visual slots.
    """

    prefix: int
    visual: int
    question: int
    generated: int

    @property
    def prompt(self) -> int:
        """Slots before the generated ones (T)."""
        return self.prefix + self.visual + self.question

    @property
    def visual_range(self) -> slice:
        """The visual slots."""
        return slice(self.prefix, self.prefix + self.visual)
