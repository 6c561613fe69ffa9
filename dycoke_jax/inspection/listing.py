"""Lists what methods keep of a clip: as a table of numbers, and as values for JSON."""

from collections.abc import Mapping
from typing import Any

from rich.table import Table
from rich.text import Text

from dycoke_jax.inspection.keeping import Kept

WIDTH = 110
"""Least width of the printed table, in characters."""


def table(methods: Mapping[str, Kept]) -> Table:
    """A table of the numbers of rows in each frame of a clip, and in all of it.

    Args:
        methods: what each method keeps, by its name.
    """
    drawn = Table(show_footer=True)
    drawn.add_column("frame", "all", justify="right")
    for name, kept in methods.items():
        # Text instead of a string, because brackets would be read as markup.
        drawn.add_column(Text(name), kept.counts(), justify="right", overflow="fold")
    of_frames = zip(*(kept.counts_of_frames() for kept in methods.values()), strict=True)
    for number, counts in enumerate(of_frames):
        drawn.add_row(str(number), *counts)
    return drawn


def as_json(
    methods: Mapping[str, Kept], settings: Mapping[str, Mapping[str, Any]]
) -> dict[str, Any]:
    """The rows of each method and their numbers as values that JSON can hold.

    Args:
        methods: what each method keeps of the same clip, by its name.
        settings: the settings of each method, by its name.

    Returns:
        The ``grid`` of a frame's tokens, and under ``methods`` the ``name`` of each with its
        settings (``compression``); its numbers in the whole clip (``tokens``) and in each frame
        (``frames``); ``places`` of its rows among the visual tokens of the clip, in the order in
        which the language model reads them, and which of these rows are ``merged``; and what is
        ``not_shown``.
    """
    return {
        "grid": next(iter(methods.values())).grid,
        "methods": [
            {"name": name, "compression": settings[name]} | _as_json(kept)
            for name, kept in methods.items()
        ],
    }


def _as_json(kept: Kept) -> dict[str, Any]:
    return {
        "tokens": {
            "visual": kept.visual,
            "kept": len(kept.places),
            "merged": int(kept.is_merged.sum()),
        },
        "frames": [{"kept": rows, "merged": merged} for rows, merged in kept.numbers_of_frames],
        "places": kept.places.tolist(),
        "merged": kept.is_merged.tolist(),
        "not_shown": kept.not_shown,
    }
