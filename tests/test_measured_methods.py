"""docs/methods.md: its tables hold the stored figures, which are of the model that ships."""

import json
from pathlib import Path

import pytest

from dycoke_jax.assets import TINY
from dycoke_jax.checkpoint import load_params, open_folder
from dycoke_jax.checkpoint.fingerprint import fingerprint
from dycoke_jax.evaluation.settings import Comparison, methods, more_frames

DOCS = Path(__file__).parent.parent / "docs"
PAGE = DOCS / "methods.md"
CONFIG = open_folder(TINY).config
COMPARISONS: dict[str, Comparison] = {
    "methods": methods(CONFIG, 16),
    "more-frames": more_frames(CONFIG, 16, 128),
}


def stored(name):
    return json.loads((DOCS / f"{name}.json").read_text())


def table(first_cell, following):
    """Rows of the table that begins with ``first_cell``, behind the text ``following``."""
    text = PAGE.read_text()
    lines = text[text.index(following) :].splitlines()
    start = next(number for number, line in enumerate(lines) if line.startswith(f"| {first_cell} "))
    rows = {}
    for line in lines[start:]:
        if not line.startswith("|"):
            break
        name, *cells = (cell.strip() for cell in line.split("|")[1:-1])
        rows[name] = cells
    return rows


def by_method(comparison, results, cell):
    """What the table says: a row for each method, with a cell for each group that it is in."""
    groups = list(dict.fromkeys(s.group for s in comparison.settings if s.group))
    rows = {}
    for setting in comparison.settings:
        if setting.group:
            row = rows.setdefault(setting.method, [""] * len(groups))
            row[groups.index(setting.group)] = cell(results[setting.name])
    return rows


def accuracy(result):
    low, high = result["all"]["interval"]
    return f"{100 * result['all']['accuracy']:.1f} ({100 * low:.1f}-{100 * high:.1f})"


def read(result):
    return f"{result['read']:.0f}"


@pytest.mark.parametrize("name", COMPARISONS)
def test_figures_are_of_the_model_that_ships(name):
    assert stored(name)["evaluation"]["model"] == fingerprint(load_params(open_folder(TINY)))


@pytest.mark.parametrize("name", COMPARISONS)
def test_tables_hold_the_stored_figures(name):
    comparison, results = COMPARISONS[name], stored(name)["settings"]
    marker = f"<!-- {name} -->"
    shown, counted = table("method", marker), table("tokens read", marker)
    for rows, cell in ((shown, accuracy), (counted, read)):
        expected = by_method(comparison, results, cell)
        assert {name: rows[name] for name in expected} == expected


@pytest.mark.parametrize("name", COMPARISONS)
def test_text_has_the_figure_of_whole_frames_and_the_number_of_clips(name):
    everything = stored(name)
    text = " ".join(PAGE.read_text().split())
    first = everything["settings"][COMPARISONS[name].settings[0].name]
    clips, asked = everything["evaluation"]["clips"], first["all"]["asked"]
    assert f"{clips} clips, {asked:,} questions" in text
    assert f"{accuracy(first)} with all" in text
