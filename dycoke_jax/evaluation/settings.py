"""The compression settings that an evaluation compares: DyCoke, its parts, and baselines."""

from dycoke_jax.compression.baselines import RandomTokens, WholeFrames
from dycoke_jax.compression.dycoke import DyCoke
from dycoke_jax.compression.protocol import Compressor

FULL = "full"
"""Name of the setting without compression."""
DEFAULT = "paper K=0.7 P=0.7 L=3"
"""Name of DyCoke's default settings."""

HEADLINES: dict[str, Compressor | None] = {
    FULL: None,
    DEFAULT: DyCoke(),
    "random tokens K=0.7": RandomTokens(0.7),
    "whole frames K=0.7": WholeFrames(0.7),
}
"""The plain model, DyCoke with its defaults, and two baselines that drop tokens without looking at
them: as many random tokens as DyCoke, and whole frames."""

SWEEPS: dict[str, Compressor | None] = {
    **{f"paper K={k} P=0.7 L=3": DyCoke(k=k) for k in (0.3, 0.5, 0.9)},
    **{f"official K={k} P=0.7": DyCoke(k=k, mode="official") for k in (0.3, 0.5, 0.7, 0.9)},
    **{f"paper K=0.7 P={p} L=3": DyCoke(p=p) for p in (0.5, 0.9)},
    **{f"paper K=0.7 P=0.7 L={layer}": DyCoke(layer=layer) for layer in (1, 2, 4, 5)},
    **{f"stage 1 only K={k}": DyCoke(k=k, p=0.0) for k in (0.3, 0.5, 0.7, 0.9)},
    **{f"stage 2 only P={p}": DyCoke(k=0.0, p=p) for p in (0.5, 0.7, 0.9)},
    **{f"paper drop K=0.7 P={p} L=3": DyCoke(p=p, parked="drop") for p in (0.5, 0.7, 0.9)},
    **{f"random tokens K={k}": RandomTokens(k) for k in (0.3, 0.5, 0.9)},
    **{f"whole frames K={k}": WholeFrames(k) for k in (0.3, 0.5, 0.9)},
}
"""Further settings of the same methods; mostly one parameter differs from ``HEADLINES``."""
