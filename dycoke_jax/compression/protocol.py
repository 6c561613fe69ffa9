"""What a compressor offers to the rest of the library.

Stage 1 selects the visual tokens of a clip that enter the language model. Stage 2 chooses, at each
decode step, the visual slots that the later layers attend to. The number of tokens that each lets
through is known before anything runs, so that shapes are static.
"""

from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Protocol, get_args, runtime_checkable

from jaxtyping import Array, Bool, Float, Int

from dycoke_jax.cache import KV, Slots
from dycoke_jax.checks import choice, shown, whole_number
from dycoke_jax.config import LlavaConfig
from dycoke_jax.errors import RequestError


@dataclass(frozen=True)
class Signal:
    """What a token stage wants to know of the vision tower beside its features.

    It is computed for each frame alone, and pooled to N values a frame as the features are.

    Attributes:
        kind: ``keys``: the keys of the layer's attention, heads side by side. ``attention``: the
            attention that each patch receives, as the mean over heads and queries, float32.
        layer: number of the layer of the tower, from 0; a negative number counts from the end of
            the layers that are run, so that -1 is the last of them.

    Raises:
        ConfigError: naming the setting.
    """

    kind: Literal["keys", "attention"]
    layer: int = -1

    def __post_init__(self) -> None:
        choice("Signal: kind", self.kind, get_args(Literal["keys", "attention"]))
        whole_number("Signal: layer", self.layer, -(10**6))


class Rows(NamedTuple):
    """Which visual tokens go on, as a stage selects them.

    ``places`` alone drops tokens and keeps the others as they are. With ``embeds`` the rows are
    new: each is made of several tokens, and ``places`` says where it stands among the old ones.
    """

    places: Int[Array, "B M"]
    """Places among the tokens that came in, in the order in which the language model reads them."""
    valid: Bool[Array, "B M"] | None = None
    """Rows that hold a token, for a stage that keeps at most M. None: all of them do. The place of
    an empty row is any that keeps the order."""
    embeds: Float[Array, "B M D"] | None = None
    """New embeddings. None: those of the tokens at ``places``."""


@runtime_checkable
class TokenStage(Protocol):
    """Selects or merges the visual tokens of a clip before the language model reads them.

    Hashable, because programs are compiled for it; batched, and every row for itself.
    """

    def __hash__(self) -> int: ...

    @property
    def signals(self) -> tuple[Signal, ...]:
        """What the stage wants of the vision tower; nothing else is computed."""

    def check(self, config: LlavaConfig, frames: int) -> None:
        """Refuses settings that cannot work on a model or clip length.

        Args:
            config: the model.
            frames: number of frames of a clip, at least 1.

        Raises:
            ConfigError: naming the setting and its allowed range.
        """

    def most_rows(self, frames: int, tokens: int) -> int:
        """The largest number of rows that go on (M).

        Args:
            frames: frames of a clip.
            tokens: visual tokens of a frame (N).
        """

    def select(
        self,
        features: Float[Array, "B F N D"],
        frames: Int[Array, "B"],
        signals: tuple[Float[Array, "B F N *channels"], ...],
    ) -> Rows:
        """Selects the rows that go on.

        Args:
            features: visual tokens of each clip after pooling; those of empty frames are zeros.
            frames: number of frames of each clip, in 1..F; the others are empty. The result is that
                of the clip without them.
            signals: what ``signals`` asks for, in the same order.

        Returns:
            ``most_rows(F, N)`` rows with places among the F * N tokens of each clip, ascending
            where the newline layout of the model is ``grid`` or ``frame``. Empty frames are never
            chosen.
        """


@runtime_checkable
class Compressor(Protocol):
    """A method with its settings. Hashable, because programs are compiled for it."""

    def __hash__(self) -> int: ...

    def check(self, config: LlavaConfig, frames: int) -> None:
        """Refuses settings that cannot work on a model or clip length.

        Args:
            config: the model.
            frames: number of frames of a clip, at least 1.

        Raises:
            ConfigError: naming the setting and its allowed range.
        """

    def select(self, features: Float[Array, "B F N D"]) -> Int[Array, "B M"] | None:
        """Stage 1: selects the visual tokens that enter the language model.

        Args:
            features: visual tokens of each clip after pooling.

        Returns:
            Indices into the F * N tokens of each clip, in the order in which the language model
            reads them. None where the settings keep every token in its place.
        """

    def decode_pruning(self, slots: Slots, tokens: int) -> "DecodePruning | None":
        """Stage 2 for one layout of a batch.

        Args:
            slots: sizes of the segments of the cache.
            tokens: kept visual tokens of a prompt (M).

        Returns:
            The pruning, or None where the settings prune nothing.
        """


def check_compressor(compression: Any) -> None:
    """Checks the argument ``compression`` of the functions that answer questions.

    Args:
        compression: a compressor, or None for the plain model.

    Raises:
        RequestError: if it is anything else, such as the class in place of its settings.
    """
    is_compressor = isinstance(compression, Compressor) and not isinstance(compression, type)
    if compression is not None and not is_compressor:
        raise RequestError(
            f"compression is {shown(compression)}; it must be a compressor such as DyCoke(), or "
            "None for the plain model"
        )


@runtime_checkable
class PrunedCache(Protocol):
    """What the layers from ``DecodePruning.layer`` on attend to. A dataclass that is a pytree."""

    @property
    def caches(self) -> list[KV]:
        """Keys and values of those layers. The slots for generated tokens come last."""

    @property
    def visible(self) -> Bool[Array, "B S"]:
        """Slots of ``caches`` that the current token may attend to."""

    @property
    def is_visual(self) -> Bool[Array, "B visual"]:
        """Visual slots that hold visual tokens, not newlines."""

    @property
    def attended(self) -> Int[Array, "B"]:
        """Number of visual tokens, newlines not counted, that are visible."""

    @property
    def refreshed(self) -> Bool[Array, "B"]:
        """Whether the last step chose anew."""

    def chosen_slots(self) -> Bool[Array, "B visual"]:
        """Visual slots that are chosen, newlines among them; for inspection."""


@runtime_checkable
class DecodePruning(Protocol):
    """Stage 2. Layers below ``layer`` attend to all tokens, the others to what is chosen.

    Hashable, because programs are compiled for it.
    """

    def __hash__(self) -> int: ...

    @property
    def layer(self) -> int:
        """The first layer that attends to what is chosen. The layer before it gives the scores."""

    def start(
        self,
        caches: list[KV],
        valid: Bool[Array, "B S"],
        is_visual: Bool[Array, "B visual"],
        scores: Float[Array, "B visual"],
    ) -> Any:
        """The state before the first decode step.

        Args:
            caches: keys and values of the layers from ``layer`` on, over all slots.
            valid: slots that hold a token.
            is_visual: visual slots that hold visual tokens, not newlines.
            scores: attention weights of the prompt's last token on the visual slots in layer
                ``layer - 1``, as the mean over heads, float32.
        """

    def update(
        self,
        state: Any,
        scores: Float[Array, "B visual"],
        step: Int[Array, ""],
        active: Bool[Array, "B"],
    ) -> Any:
        """The state for one decode step.

        Args:
            state: result of ``start`` or of the last ``update``, with the keys and values of new
                tokens appended by the caller.
            scores: attention weights of the current token on the visual slots in layer
                ``layer - 1``, as the mean over heads, float32.
            step: index of the current token's slot among the generated ones, from 0.
            active: rows that are still generating.
        """
