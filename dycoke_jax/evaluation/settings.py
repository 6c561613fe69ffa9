"""The compression settings that an evaluation compares: DyCoke, its parts, and other methods."""

from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction

from dycoke_jax.compression.baselines import RandomTokens, WholeFrames
from dycoke_jax.compression.budget import share_of
from dycoke_jax.compression.dycoke import DyCoke
from dycoke_jax.compression.methods import parse_compression
from dycoke_jax.compression.protocol import Compressor
from dycoke_jax.config import LlavaConfig
from dycoke_jax.errors import ConfigError

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

BUDGETS = (0.5, 0.25, 0.15, 0.1, 0.05)
"""Shares of the visual tokens at which methods are compared."""
LONGER = 8
"""How many times the frames that are read whole a clip has, in the comparison of more frames."""

_BY_BUDGET = {
    "frames": "frames(budget={})",
    "random": "random(budget={})",
    "evs": "evs(budget={})",
    "evs, first frame by budget": "evs(budget={}, first_frame=budget)",
    "unicomp": "unicomp(budget={})",
    "vidcom2": "vidcom2(budget={})",
    "visionzip": "visionzip(budget={})",
    "holitom without merge": "holitom(budget={}, layer=0)",
}
"""Methods whose budget is that of the comparison. The first are the baselines."""


@dataclass(frozen=True)
class Setting:
    """A row of a comparison.

    Attributes:
        name: its name, which no other has.
        compression: the compression; None is the plain model.
        frames: number of frames that are sampled of a clip.
        group: heading of the rows that it is compared with; empty where there are no groups.
        method: what it is a setting of; empty where the name says so.
    """

    name: str
    compression: Compressor | None
    frames: int
    group: str = ""
    method: str = ""


@dataclass(frozen=True)
class Comparison:
    """What is compared, and what cannot be.

    Attributes:
        settings: the rows; all others are compared with the first.
        left_out: a sentence for each method that cannot read as few tokens as some groups do.
    """

    settings: tuple[Setting, ...]
    left_out: tuple[str, ...] = ()


def of_names(settings: Mapping[str, Compressor | None], frames: int) -> Comparison:
    """The comparison of settings with names of their own, on clips of so many frames."""
    return Comparison(tuple(Setting(name, one, frames) for name, one in settings.items()))


def methods(config: LlavaConfig, frames: int) -> Comparison:
    """All methods at ``BUDGETS``, each with as many visual tokens, beside the plain model.

    What counts is what a layer of the language model reads in prefill, on average over the layers.
    Methods that merge or drop inside prefill, after layers that read more, get a budget of their
    own or a share to drop by which that average is as high as allowed, and so does DyCoke, whose
    setting is no budget. A method that reads more with any setting is left out.

    Args:
        config: the model.
        frames: number of frames of a clip.
    """
    whole = Setting(FULL, None, frames)
    groups = {budget: _texts(config, frames, budget) for budget in BUDGETS}
    rows = [
        Setting(text, parse_compression(text), frames, f"{_percent(budget)} of the tokens", method)
        for budget, texts in groups.items()
        for method, text in texts.items()
    ]
    least = _least(config, frames)
    missing = {_percent(budget): least.keys() - texts.keys() for budget, texts in groups.items()}
    return Comparison((whole, *rows), _left_out(missing, least))


def more_frames(config: LlavaConfig, frames: int, clip_frames: int) -> Comparison:
    """Some whole frames, against 2, 4, 8 .. times as many frames for as many visual tokens.

    They are compared as in ``methods``. Whole frames at a budget are no row: that is what the plain
    model reads of fewer frames.

    Args:
        config: the model.
        frames: number of frames that are read whole.
        clip_frames: number of frames of a clip; not more are sampled.

    Raises:
        ConfigError: if the clips are too short.
    """
    if clip_frames < 2 * frames:
        raise ConfigError(
            f"clips of {clip_frames} frames have no room for more frames than {frames}; they need "
            f"{2 * frames} at least"
        )
    rows = [Setting(f"{frames} frames", None, frames)]
    missing: dict[str, set[str]] = {}
    shares: dict[str, Fraction] = {}
    more = 2 * frames
    while more <= clip_frames:
        budget = frames / more
        texts, shares = _texts(config, more, budget), _least(config, more)
        heading = f"{more} frames at {_percent(budget)}"
        rows += [
            Setting(f"{more} frames, {text}", parse_compression(text), more, heading, method)
            for method, text in texts.items()
            if method != "frames"
        ]
        missing[heading] = shares.keys() - texts.keys()
        more *= 2
    return Comparison(tuple(rows), _left_out(missing, shares))


def read_on_average(
    compression: Compressor | None, layers: int, merged: int, kept: int | None = None
) -> Fraction:
    """Number of visual tokens that a layer reads in prefill, as the mean over all layers.

    Args:
        compression: the compression; None is the plain model.
        layers: number of layers of the language model.
        merged: number of visual tokens that enter the language model.
        kept: number of them that go on behind a prompt stage; None: what the stage declares.
    """
    prompt = None if compression is None else compression.stages.prompt
    if prompt is None:
        return Fraction(merged)
    kept = prompt.most_rows(merged) if kept is None else kept
    return Fraction(prompt.layer * merged + (layers - prompt.layer) * kept, layers)


def _texts(config: LlavaConfig, frames: int, budget: float) -> dict[str, str]:
    """The setting of each method, as text, with which it reads as much as the budget allows."""
    most = share_of(frames * config.tokens_per_frame, budget)
    texts = {method: form.format(budget) for method, form in _BY_BUDGET.items()}
    for method, scales in _scales(config).items():
        for scale in scales:
            place = bisect_left(
                scale, Fraction(-most), key=lambda text: -_read(config, frames, text)
            )
            if place < len(scale):
                texts[method] = scale[place]
                break
    return texts


def _scales(config: LlavaConfig) -> dict[str, list[list[str]]]:
    """Settings of the methods that have no budget in this sense.

    Each list is in the order of what its settings read, from most to least; the first list of a
    method in which a setting reads little enough is used.
    """
    layers = config.text.num_layers
    merge = max(1, layers * 18 // 28)  # the authors' layer of a model of 28 layers
    first = (2, 1) if layers > 2 else (1,)  # the paper's layer if it can be
    shares = [number / 200 for number in range(200)]
    return {
        "holitom": [[f"holitom(budget={n / 1000}, layer={merge})" for n in range(1000, 0, -1)]],
        "dycoke": [[f"dycoke(k={k}, p=0)" for k in shares]],
        "fastv": [[f"fastv(layer={layer}, r={r})" for r in shares] for layer in first],
    }


def _read(config: LlavaConfig, frames: int, text: str) -> Fraction:
    """What ``read_on_average`` is at most with a setting."""
    compression = parse_compression(text)
    merged = frames * config.tokens_per_frame
    if compression is not None and compression.stages.tokens is not None:
        merged = compression.stages.tokens.most_rows(frames, config.tokens_per_frame)
    return read_on_average(compression, config.text.num_layers, merged)


def _least(config: LlavaConfig, frames: int) -> dict[str, Fraction]:
    """The smallest share of the visual tokens that each method of ``_scales`` can read."""
    visual = frames * config.tokens_per_frame
    return {
        method: _read(config, frames, scales[-1][-1]) / visual
        for method, scales in _scales(config).items()
    }


def _left_out(
    missing: Mapping[str, Iterable[str]], least: Mapping[str, Fraction]
) -> tuple[str, ...]:
    """Sentences on the methods that are missing in some groups."""
    sentences = []
    for method, share in least.items():
        groups = [group for group, methods in missing.items() if method in methods]
        if groups:
            sentences.append(
                f"{method} is left out at {_listed(groups)}: it reads {_percent(float(share))} of "
                "the tokens at least."
            )
    return tuple(sentences)


def _listed(words: Sequence[str]) -> str:
    return " and ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)


def _percent(share: float) -> str:
    return f"{100 * share:.3g} %"
