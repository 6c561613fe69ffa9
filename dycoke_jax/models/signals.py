"""What may be asked of the vision tower beside its features."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from dycoke_jax.checks import choice, whole_number
from dycoke_jax.config import VisionConfig

Kind = Literal["keys", "mean_keys", "attention"]


@dataclass(frozen=True)
class Signal:
    """What a token stage wants to know of the vision tower beside its features.

    It is computed for each frame alone, and pooled to N values a frame as the features are.

    Attributes:
        kind: ``keys``: the keys of the layer's attention, heads side by side. ``mean_keys``: their
            mean over heads. ``attention``: the attention that each patch receives, as the mean over
            heads and queries, float32.
        layer: number of the layer of the tower, from 0; a negative number counts from the end of
            the layers that are run, so that -1 is the last of them.

    Raises:
        ConfigError: naming the setting.
    """

    kind: Kind
    layer: int = -1

    def __post_init__(self) -> None:
        choice("Signal: kind", self.kind, get_args(Kind))
        whole_number("Signal: layer", self.layer, -(10**6))


def check_signals(config: VisionConfig, signals: Sequence[Signal]) -> None:
    """Checks that a vision tower has the layers that signals ask for.

    Raises:
        ConfigError: naming the layer and how many there are.
    """
    layers = config.num_layers
    for signal in signals:
        allowed = f"lie in {-layers}..{layers - 1}, because the vision tower runs {layers} layers"
        whole_number("Signal: layer", signal.layer, -layers, layers - 1, allowed=allowed)
