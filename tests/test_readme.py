"""The documented figures are those of the stored evaluation, which is of the model that ships."""

import json
import re
from pathlib import Path

import pytest

from dycoke_jax.assets import TINY
from dycoke_jax.checkpoint import load_params, open_folder
from dycoke_jax.checkpoint.fingerprint import fingerprint
from dycoke_jax.evaluation.settings import HEADLINES
from dycoke_jax.tasks.questions import KINDS

ROOT = Path(__file__).parent.parent
ACCURACY = ROOT / "docs" / "accuracy.md"


@pytest.fixture(scope="module")
def stored():
    return json.loads((ROOT / "docs" / "accuracy.json").read_text())


def test_evaluation_is_of_the_model_that_ships(stored):
    assert stored["evaluation"]["model"] == fingerprint(load_params(open_folder(TINY)))
    assert stored["evaluation"]["clips"] == 1000


def test_table_holds_the_stored_figures(stored):
    lines = ACCURACY.read_text().splitlines()
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines if "|" in line]
    table = {row[0].strip("*"): row[1:] for row in rows}
    for column, name in enumerate(HEADLINES, start=1):
        result = stored["settings"][name]
        assert table["visual tokens read"][column] == f"{result['merged']:.0f}"
        assert table["attended to per step"][column] == f"{result['attended']:.0f}"
        low, high = result["all"]["interval"]
        wanted = f"{100 * result['all']['accuracy']:.1f} ({100 * low:.1f}-{100 * high:.1f})"
        assert table["all questions"][column].strip("*") == wanted
        for kind in KINDS:
            assert table[kind][column] == f"{100 * result['kinds'][kind]['accuracy']:.0f}"
    for kind in KINDS:
        assert table[kind][0] == f"{100 * stored['blind'][kind]:.0f}"


def test_text_names_the_number_of_questions(stored):
    asked = stored["settings"]["full"]["all"]["asked"]
    assert re.search(rf"{asked:,} questions", ACCURACY.read_text())


def test_readme_has_the_stored_headline_figures(stored):
    text = " ".join((ROOT / "README.md").read_text().split())
    percent = {
        name: f"{100 * stored['settings'][name]['all']['accuracy']:.1f} %" for name in HEADLINES
    }
    full, dycoke, random, _ = HEADLINES
    assert f"{percent[full]} of the answers without compression" in text
    assert f"{percent[dycoke]} with DyCoke" in text
    assert f"at random leaves {percent[random]}" in text
    assert f"{stored['settings'][full]['all']['asked']:,} questions" in text


def test_readme_is_short_and_its_links_exist():
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) <= 120
    links = [link for link in re.findall(r"\]\(([^)]+)\)", text) if "://" not in link]
    assert links
    assert all((ROOT / link).exists() for link in links)
