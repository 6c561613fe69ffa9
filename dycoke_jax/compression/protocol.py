"""What a compressor offers to the rest of the library.

Stage 1 chooses which visual tokens of a clip enter the language model; stage 2 chooses, at each
decoding step, which of their keys and values the later layers attend to. Both keep a number of
tokens that is known before anything runs, so that shapes are static.
"""

from typing import Any, Protocol, runtime_checkable

from jaxtyping import Array, Bool, Float, Int

from dycoke_jax.cache import KV, Slots
from dycoke_jax.config import LlavaConfig


@runtime_checkable
class Compressor(Protocol):
    """A method with its settings; hashable, because compiled programs are made for it."""

    def __hash__(self) -> int: ...

    def check(self, config: LlavaConfig, frames: int) -> None:
        """Raises ConfigError where these settings cannot work on this model or clip length."""

    def merge(self, features: Float[Array, "B F N D"]) -> Int[Array, "B M"] | None:
        """Stage 1: kept tokens as indices into the F * N of a clip, in their new order.

        None where the settings keep every token in place.
        """

    def decode_pruning(self, slots: Slots, tokens: int) -> "DecodePruning | None":
        """Stage 2 for a prompt whose visual slots hold ``tokens`` visual tokens, if it prunes."""


@runtime_checkable
class PrunedCache(Protocol):
    """What the layers from ``DecodePruning.layer`` on attend to: a dataclass that is a pytree."""

    @property
    def caches(self) -> list[KV]:
        """Keys and values of those layers; the slots for generated tokens come last."""

    @property
    def valid(self) -> Bool[Array, "B S"]:
        """Which of their slots may be seen."""

    @property
    def is_visual(self) -> Bool[Array, "B V"]:
        """Which visual slots hold visual tokens, not newlines."""

    @property
    def attended(self) -> Int[Array, "B"]:
        """Visual tokens (newlines not counted) among them."""

    @property
    def refreshed(self) -> Bool[Array, "B"]:
        """Whether the last step chose them anew."""

    def seen(self) -> Bool[Array, "B V"]:
        """The visual slots that the last step attended to, for whoever wants to look."""


@runtime_checkable
class DecodePruning(Protocol):
    """Stage 2. Layers below ``layer`` attend to everything, the others to what is chosen.

    Hashable, because compiled programs are made for it.
    """

    def __hash__(self) -> int: ...

    @property
    def layer(self) -> int:
        """The first layer that attends to a reduced set; the one before it gives the scores."""

    def start(
        self,
        caches: list[KV],
        valid: Bool[Array, "B S"],
        is_visual: Bool[Array, "B V"],
        scores: Float[Array, "B V"],
    ) -> Any:
        """The state before the first step.

        Args:
            caches: keys and values of the layers from ``layer`` on, over all slots.
            valid: which slots hold a token.
            is_visual: which visual slots hold visual tokens, not newlines.
            scores: attention of the prompt's last token to each visual slot, mean over heads,
                float32.
        """

    def update(
        self,
        state: Any,
        scores: Float[Array, "B V"],
        step: Int[Array, ""],
        active: Bool[Array, "B"],
    ) -> Any:
        """The state for one step.

        Args:
            state: what ``start`` or the last ``update`` gave, new tokens appended by the caller.
            scores: attention of the current token to each visual slot, mean over heads, float32.
            step: index of the slot that the current token takes among the generated ones.
            active: rows that are still generating.
        """
