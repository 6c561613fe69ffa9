"""How a method of token compression plugs in: three optional stages, which combine.

    TokenStage     before the language model: which visual tokens it reads, or rows made of them
    PromptStage    between two layers of prefill: which of them the layers that follow read
    CacheStage     while decoding: which of them the later layers attend to

How many tokens a stage lets through at most is known before anything runs, so shapes are static.
Every stage is hashable, because programs are compiled for it, and it treats every row of a batch
for itself.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, runtime_checkable

from jaxtyping import Array, Bool, Float, Int

from dycoke_jax.cache import Slots
from dycoke_jax.checks import shown
from dycoke_jax.compression.view import View
from dycoke_jax.config import LlavaConfig
from dycoke_jax.errors import ConfigError, RequestError
from dycoke_jax.models.signals import Signal


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


class _Stage(Protocol):
    def __hash__(self) -> int:
        """By value, as of a frozen dataclass: programs are compiled for a stage."""
        return object.__hash__(self)

    def check(self, config: LlavaConfig, frames: int) -> None:
        """Refuses settings that cannot work on a model or clip length.

        Args:
            config: the model.
            frames: number of frames of a clip, at least 1.

        Raises:
            ConfigError: naming the setting and its allowed range.
        """


@runtime_checkable
class TokenStage(_Stage, Protocol):
    """Selects or merges the visual tokens of a clip before the language model reads them.

    A class that derives from it has to define ``most_rows`` and ``select`` only.
    """

    @property
    def signals(self) -> tuple[Signal, ...]:
        """What the stage wants of the vision tower, by default nothing; no more is computed."""
        return ()

    def check(self, config: LlavaConfig, frames: int) -> None:
        """Accepts every model and clip length, by default; see ``_Stage``."""
        return

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
        signals: tuple[Float[Array, "B F N ..."], ...],
    ) -> Rows:
        """Selects the rows that go on.

        Args:
            features: visual tokens of each clip after pooling; those of empty frames are zeros.
            frames: number of frames of each clip, in 1..F (0 in a row without a request); the
                others are empty. The result is that of the clip without them.
            signals: what ``signals`` asks for, in the same order.

        Returns:
            ``most_rows(F, N)`` rows with places among the F * N tokens of each clip, ascending
            where the newline layout of the model is ``grid`` or ``frame``. Empty frames are never
            chosen.
        """


@runtime_checkable
class PromptStage(_Stage, Protocol):
    """Selects or merges visual tokens inside prefill, by what some layers have made of them."""

    @property
    def layer(self) -> int:
        """The first layer that reads the selected rows only, in 1..layers-1."""

    def most_rows(self, tokens: int) -> int:
        """The largest number of rows that go on, of this number of visual tokens."""

    def select(
        self,
        states: Float[Array, "B visual D"],
        scores: Float[Array, "B visual"],
        is_token: Bool[Array, "B visual"],
        tokens: int,
    ) -> Rows:
        """Selects the rows that go on; newlines go on as well and are no candidates.

        Args:
            states: states of the visual slots before layer ``layer``.
            scores: attention weights of the prompt's last token on the visual slots in the layer
                before, as the mean over heads, float32.
            is_token: visual slots that hold visual tokens; newlines and empty slots are none.
            tokens: number of visual slots that are for visual tokens.

        Returns:
            ``most_rows(tokens)`` rows with places among the visual slots. They keep their rotary
            positions.
        """


@runtime_checkable
class CacheStage(_Stage, Protocol):
    """Chooses, in each decode step, what the layers from ``layer`` on attend to."""

    @property
    def layer(self) -> int:
        """The first layer that attends to what is chosen, in 1..layers-1.

        The layer before it gives the scores.
        """

    def start(self, view: View, slots: Slots, scores: Float[Array, "B visual"]) -> View:
        """The view before the first decode step.

        Args:
            view: all slots of the layers from ``layer`` on.
            slots: the segments of these slots.
            scores: attention weights of the prompt's last token on the visual slots in layer
                ``layer - 1``, as the mean over heads, float32.
        """

    def update(
        self, view: View, slots: Slots, scores: Float[Array, "B visual"], active: Bool[Array, "B"]
    ) -> View:
        """The view for one decode step.

        Args:
            view: result of ``start`` or of the last ``update``, with the keys and values of new
                tokens appended and the slot of the current token visible.
            slots: as for ``start``.
            scores: attention weights of the current token on the visual slots in layer
                ``layer - 1``, as the mean over heads, float32.
            active: rows that are still generating.
        """


@dataclass(frozen=True)
class Compression:
    """The stages of one method, or of several together; a stage that is None does nothing.

    Attributes:
        tokens: before the language model.
        prompt: inside prefill.
        cache: while decoding.
    """

    tokens: TokenStage | None = None
    prompt: PromptStage | None = None
    cache: CacheStage | None = None

    @property
    def stages(self) -> "Compression":
        """Itself, see ``Compressor``."""
        return self

    def check(self, config: LlavaConfig, frames: int) -> None:
        """Refuses stages that cannot work on a model or clip length, or together.

        Args:
            config: the model.
            frames: number of frames of a clip, at least 1.

        Raises:
            ConfigError: naming the setting and its allowed range.
        """
        for stage in (self.tokens, self.prompt, self.cache):
            if stage is not None:
                stage.check(config, frames)
        if self.prompt is not None and self.cache is not None:
            first, then = self.prompt.layer, self.cache.layer
            if then <= first:
                raise ConfigError(
                    f"the cache is pruned from layer {then} on; it must be a layer above {first}, "
                    "from which the prompt is pruned"
                )


@runtime_checkable
class Compressor(Protocol):
    """What a user gives as ``compression``: a method with its settings, or stages of several."""

    def __hash__(self) -> int: ...

    @property
    def stages(self) -> Compression:
        """What the method does, and where."""


def combine(*methods: Compressor) -> Compression:
    """Joins the stages of several methods.

    Raises:
        ConfigError: if two of them have the same stage.
    """
    found: dict[str, Any] = {}
    for method in methods:
        for name in ("tokens", "prompt", "cache"):
            stage = getattr(method.stages, name)
            if stage is None:
                continue
            if name in found:
                raise ConfigError(
                    f"{found[name]!r} and {stage!r} cannot be combined: both act "
                    f"{_WHERE[name]}; leave one of them out"
                )
            found[name] = stage
    return Compression(**found)


_WHERE = {
    "tokens": "before the language model",
    "prompt": "inside prefill",
    "cache": "while decoding",
}


def check_layer(name: str, layer: int, config: LlavaConfig) -> None:
    """Refuses a layer that the model does not have.

    Args:
        name: name of the method, for the message.
        layer: first layer at which a stage acts; the layer before it gives the scores.
        config: the model.

    Raises:
        ConfigError: with the allowed range.
    """
    layers = config.text.num_layers
    if layer >= layers:
        raise ConfigError(
            f"{name}: layer is {layer}; with {layers} layers it must lie in 1..{layers - 1}"
        )


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
