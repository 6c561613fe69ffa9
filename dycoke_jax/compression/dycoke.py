"""The settings of DyCoke (Tao et al., CVPR 2025), and the stages that they stand for."""

from dataclasses import dataclass, fields
from typing import Literal, get_args

from dycoke_jax.checks import choice, number, whole_number
from dycoke_jax.compression.kv_pruning import MaskedCache, OneShot, WorkingSet
from dycoke_jax.compression.protocol import CacheStage, Compression
from dycoke_jax.compression.ttm import Mode, TokenMerging
from dycoke_jax.errors import ConfigError

Parked = Literal["device", "host", "drop"]


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

    Newlines are never compared, dropped or pruned. A newline is left out only if its whole row is
    (see ``generation.assemble.place_newlines``).

    Attributes:
        k: share of a compared frame's tokens that temporal token merging drops, in [0, 1); 0 merges
            nothing.
        layer: first layer, counted from 0, that attends to the pruned cache, in 1..layers-1. The
            layer before it gives the scores.
        p: share of the kept visual tokens that layers from ``layer`` on do not attend to while
            decoding, in [0, 1); 0 prunes nothing.
        threshold: cosine similarity of the attention of successive steps below which the set is
            chosen anew, in (0, 1]. The paper gives no number; 0.9 is that of the published code.
        mode: ``paper``: as the text of the paper describes it. ``official``: as the published code
            computes it.
        parked: where keys and values that are not chosen are kept. ``device``: in device memory, so
            that they can be chosen later. ``host``: in the host's memory, from where all of them
            are copied to the device, a layer at a time, whenever tokens are chosen anew; where the
            device has a memory of its own, that is free while decoding. ``drop``: nowhere; the
            prompt's last token chooses once, and their memory is free while decoding (not part of
            the paper). ``host`` and ``drop`` work in mode ``paper`` only.

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
        if self.parked != "device" and self.mode == "official":
            does = "drops" if self.parked == "drop" else "moves"
            raise ConfigError(
                f"DyCoke: the published code {does} no keys and values; parked {self.parked} needs "
                "mode paper"
            )

    @property
    def stages(self) -> Compression:
        """Token merging and KV pruning; a stage that would change nothing is left out."""
        merges = self.mode == "official" or self.k > 0
        return Compression(
            tokens=TokenMerging(self.k, self.mode) if merges else None,
            cache=self._cache() if self.p > 0 else None,
        )

    def _cache(self) -> CacheStage:
        if self.mode == "official":
            return MaskedCache(self.layer, self.p, self.threshold)
        if self.parked == "drop":
            return OneShot(self.layer, self.p)
        return WorkingSet(self.layer, self.p, self.threshold, on_host=self.parked == "host")


@dataclass(frozen=True)
class DyCokeKV:
    """Dynamic KV pruning alone, to combine it with another method's stages before it.

    Attributes:
        layer: as ``DyCoke.layer``.
        p: as ``DyCoke.p``.
        threshold: as ``DyCoke.threshold``.
        parked: as ``DyCoke.parked``.

    Raises:
        ConfigError: naming the setting and its range.
    """

    layer: int = 3
    p: float = 0.7
    threshold: float = 0.9
    parked: Parked = "device"

    def __post_init__(self) -> None:
        checked = DyCoke(0, self.layer, self.p, self.threshold, parked=self.parked)
        for field in fields(self):
            object.__setattr__(self, field.name, getattr(checked, field.name))

    @property
    def stages(self) -> Compression:
        """KV pruning; nothing where ``p`` is 0."""
        return DyCoke(0, self.layer, self.p, self.threshold, parked=self.parked).stages
