"""The settings of DyCoke (Tao et al., CVPR 2025), and what they mean for shapes."""

from dataclasses import dataclass
from fractions import Fraction
from typing import Literal, get_args

from jaxtyping import Array, Float, Int

from dycoke_jax.cache import Slots
from dycoke_jax.checks import choice, number, whole_number
from dycoke_jax.compression.kv_pruning import MaskedCache, OneShot, WorkingSet
from dycoke_jax.compression.protocol import DecodePruning
from dycoke_jax.compression.ttm import select
from dycoke_jax.config import LlavaConfig
from dycoke_jax.errors import ConfigError

Mode = Literal["paper", "official"]
Parked = Literal["device", "drop"]


@dataclass(frozen=True)
class DyCoke:
    """Temporal token merging before the language model, dynamic KV pruning while it decodes.

    There are two modes. ``paper`` follows the text of the paper (sec. 3.2): every window of four
    frames is treated alike, any number of frames works, kept tokens stay in raster order, and while
    the attention of successive steps stays similar the chosen set is used again. ``official``
    reproduces the published code (github.com/KD-TAO/DyCoke at dd74634) token for token: kept tokens
    in order of ascending similarity, the last window's third frame kept whole, the last of an odd
    number of frames dropped, the last visual token never pruned, and the full cache on steps whose
    attention is similar to that of the step before.

    Attributes:
        k: share of a compared frame's tokens that merging drops, in [0, 1). 0 merges nothing.
        layer: first layer, counted from 0, that attends to the pruned cache, in 1..layers-1. The
            layer before it gives the scores.
        p: share of the kept visual tokens that layers from ``layer`` on do not attend to while
            decoding, in [0, 1). 0 prunes nothing.
        threshold: cosine similarity of the attention of successive steps below which the set is
            chosen anew, in (0, 1]. The paper gives no number; 0.9 is that of the published code.
        mode: ``paper`` or ``official``.
        parked: where keys and values that are not chosen are kept. ``device``: in device memory, so
            that they can be chosen later. ``drop``: nowhere; the prompt's last token chooses once,
            and their memory is free while decoding (mode ``paper`` only; not part of the paper).

    Newlines are never compared, dropped or pruned. A newline is left out only if its whole row is
    (see ``generation.assemble.place_newlines``).

    Raises:
        ConfigError: naming the setting and its range.
    """

    k: float = 0.7
    layer: int = 3
    p: float = 0.7
    threshold: float = 0.9
    mode: Mode = "paper"
    parked: Parked = "device"

    def __post_init__(self) -> None:
        checked = {
            "k": number("DyCoke: k", self.k, 0, 1),
            "layer": whole_number("DyCoke: layer", self.layer, 1, allowed="lie in 1..layers-1"),
            "p": number("DyCoke: p", self.p, 0, 1),
            "threshold": number(
                "DyCoke: threshold", self.threshold, 0, 1, with_low=False, with_high=True
            ),
            "mode": choice("DyCoke: mode", self.mode, get_args(Mode)),
            "parked": choice("DyCoke: parked", self.parked, get_args(Parked)),
        }
        for name, value in checked.items():
            object.__setattr__(self, name, value)
        if self.parked == "drop" and self.mode == "official":
            raise ConfigError(
                "DyCoke: the published code drops no keys and values; parked drop needs mode paper"
            )

    def check(self, config: LlavaConfig, frames: int) -> None:
        """Refuses settings that cannot work on a model or clip length.

        Args:
            config: the model.
            frames: number of frames of a clip, at least 1.

        Raises:
            ConfigError: with the allowed range, or the reason why the published code fails.
        """
        if self.layer >= config.text.num_layers:
            raise ConfigError(
                f"DyCoke: layer is {self.layer}; with {config.text.num_layers} layers it must lie "
                f"in 1..{config.text.num_layers - 1}"
            )
        if self.mode == "official" and config.newline != "one_token":
            raise ConfigError(
                "DyCoke: mode official covers the one_token newline layout only: the published "
                f"code never merges tokens in the {config.newline} layout and fails at the first "
                "decoding step; use mode paper"
            )
        if self.mode == "official" and frames < 5:
            raise ConfigError(
                f"DyCoke: mode official needs at least 5 frames, not {frames}: the published code "
                "fails on shorter clips; use mode paper"
            )

    def select(self, features: Float[Array, "B F N D"]) -> Int[Array, "B M"] | None:
        """Stage 1, see ``ttm.select``. None where every token is kept in its place."""
        if self.mode == "paper" and self.k == 0:
            return None
        kept = self._kept(features.shape[2], self.k)
        return select(features, kept, official=self.mode == "official")

    def decode_pruning(self, slots: Slots, tokens: int) -> DecodePruning | None:
        """Stage 2, see ``kv_pruning``. None where nothing is pruned."""
        if self.p == 0 or tokens == 0:
            return None
        if self.mode == "official":
            # The published code leaves the last visual token out of its candidates.
            kept = self._kept(tokens - 1, self.p)
            return MaskedCache(self.layer, kept, self.threshold, slots)
        kept, protected = self._kept(tokens, self.p), slots.visual - tokens
        if self.parked == "drop":
            return OneShot(self.layer, kept, protected, slots)
        return WorkingSet(self.layer, kept, protected, self.threshold, slots)

    def _kept(self, count: int, dropped: float) -> int:
        if self.mode == "official":
            return int((1 - dropped) * count)  # the published expression, float rounding included
        # Exact in decimal: (1 - 0.9) * 20 is 2, where floats give 1.9999999999999996.
        return int((1 - Fraction(str(dropped))) * count)
