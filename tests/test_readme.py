"""The documented figures are those of the stored evaluation, which is of the model that ships."""

import json
import re
from pathlib import Path

import pytest

from dycoke_jax.assets import TINY
from dycoke_jax.checkpoint import load_params, open_folder
from dycoke_jax.checkpoint.fingerprint import fingerprint
from dycoke_jax.evaluation.settings import DEFAULT, HEADLINES
from dycoke_jax.tasks.questions import KINDS

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
ACCURACY = ROOT / "docs" / "accuracy.md"
DOCS = ROOT / "docs"
PAGES = (
    README,
    ACCURACY,
    DOCS / "jobs.md",
    *(
        DOCS / f"{name}.md"
        for name in (
            *("architecture", "evaluation", "methods", "performance", "serving", "training"),
            "videos",
        )
    ),
)


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
    asked = {kind: stored["settings"]["full"]["kinds"][kind]["asked"] for kind in KINDS}
    blind = sum(stored["blind"][kind] * asked[kind] for kind in KINDS) / sum(asked.values())
    assert table["all questions"][0] == f"{100 * blind:.1f}"


def test_table_of_shares_holds_the_stored_figures(stored):
    lines = ACCURACY.read_text().splitlines()
    settings = {"0.3": "dycoke(k=0.3)", "0.5": "dycoke(k=0.5)", "0.7": DEFAULT}
    for k, name in settings.items():
        result = stored["settings"][name]
        kinds = {kind: scores["accuracy"] for kind, scores in result["kinds"].items()}
        worst = min(kinds, key=kinds.__getitem__)
        low, high = result["all"]["interval"]
        assert (
            f"| `k={k}` | {result['merged']:.0f} | {100 * result['all']['accuracy']:.1f} "
            f"({100 * low:.1f}-{100 * high:.1f}) | {worst} {100 * kinds[worst]:.0f} |"
        ) in lines


def test_text_names_the_numbers_of_clips_and_questions(stored):
    clips = stored["evaluation"]["clips"]
    asked = stored["settings"]["full"]["all"]["asked"]
    assert f"{clips:,} held-out clips, {asked:,} questions" in ACCURACY.read_text()


def test_readme_has_the_stored_headline_figures(stored):
    text = " ".join(README.read_text().split())
    full, dycoke, random, _ = (stored["settings"][name] for name in HEADLINES)
    percent = [f"{100 * result['all']['accuracy']:.1f} %" for result in (full, dycoke, random)]
    clips, asked = stored["evaluation"]["clips"], full["all"]["asked"]
    assert f"{clips:,} held-out made-up clips with {asked:,} questions" in text
    assert f"{percent[0]} correctly without compression" in text
    assert f"{percent[1]} with DyCoke" in text
    assert f"keeps {dycoke['merged']:.0f} of {full['merged']:.0f} visual tokens" in text
    assert f"attends to {dycoke['attended']:.0f} per step" in text
    assert f"dropped at random it is {percent[2]}" in text
    assert random["merged"] == pytest.approx(dycoke["merged"])


def test_readme_is_short():
    assert len(README.read_text().splitlines()) <= 120


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_relative_links_exist(page):
    links = re.findall(r"\]\(([^)]+)\)", page.read_text())
    missing = [link for link in links if "://" not in link and not (page.parent / link).exists()]
    assert not missing


def test_readme_links_to_the_other_pages():
    links = re.findall(r"\]\(([^)]+)\)", README.read_text())
    assert {"docs/accuracy.md", "docs/architecture.md"} <= set(links)


def test_readme_table_names_what_exists():
    places = re.search(r"^## Where things are\n(.*?)^## ", README.read_text(), re.M | re.S)
    assert places
    names = re.findall(r"`([\w/]+/|\w+\.py)`", places[1])
    package = ROOT / "dycoke_jax"
    missing = [n for n in names if not (package / n).exists() and not (ROOT / n).exists()]
    assert len(names) >= 16
    assert not missing
