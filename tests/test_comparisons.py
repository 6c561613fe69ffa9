"""Which settings are compared: as many tokens for each method, by arithmetic of its own."""

import re
from math import floor
from pathlib import Path

import pytest

from dycoke_jax.compression.methods import METHODS, parse_compression
from dycoke_jax.compression.protocol import Compressor
from dycoke_jax.config import PRESETS, TINY
from dycoke_jax.errors import ConfigError
from dycoke_jax.evaluation.report import lines_of
from dycoke_jax.evaluation.settings import (
    BUDGETS,
    HEADLINES,
    methods,
    more_frames,
    of_names,
)

PAGE = Path(__file__).parent.parent / "docs" / "methods.md"


def read(text, frames, tokens, layers):
    """What a layer reads on average, from the description of each method."""
    name, _, rest = text.partition("(")
    settings = {key: float(value) for key, value in re.findall(r"(\w+)=([\d.]+)", rest)}
    visual = frames * tokens

    def part(share, count):
        return floor(share * count + 1e-9)

    def behind(layer, before, after):
        return (layer * before + (layers - layer) * after) / layers

    if name == "dycoke":
        # Of each window of four frames the first is kept whole.
        return frames // 4 * tokens + frames * 3 // 4 * part(1 - settings["k"], tokens)
    if name == "fastv":
        return behind(settings["layer"], visual, part(1 - settings["r"], visual))
    kept = part(settings["budget"], visual)
    if name == "frames":
        return max(1, kept // tokens) * tokens
    if name == "holitom" and settings["layer"] > 0:
        return behind(settings["layer"], kept, max(1, kept // 2))
    return kept


@pytest.mark.parametrize("preset", ["tiny", "onevision-0.5b", "onevision-7b"])
def test_all_methods_of_a_group_read_as_many_tokens(preset):
    """As many as the budget allows, or a little fewer where the setting has no finer steps."""
    config, frames = PRESETS[preset], 32
    tokens, layers = config.tokens_per_frame, config.text.num_layers
    found = methods(config, frames)
    assert found.settings[0].compression is None
    for setting in found.settings[1:]:
        budget = BUDGETS[[f"{100 * b:.3g} % of the tokens" for b in BUDGETS].index(setting.group)]
        counted = read(setting.name, frames, tokens, layers)
        most = floor(budget * frames * tokens + 1e-9)
        assert counted <= max(most, tokens if setting.method == "frames" else 0)
        # A step of DyCoke is a token of each compared frame, that of whole frames a frame, that of
        # FastV half a hundredth of all tokens, and that of HoliTom a thousandth.
        step = {
            "dycoke": frames,
            "frames": tokens,
            "fastv": frames * tokens / 200,
            "holitom": frames * tokens / 1000 + 1,
        }
        assert counted > most - step.get(setting.method, 1)
        assert setting.compression == parse_compression(setting.name)


def test_every_method_is_compared_where_it_can_read_so_little():
    found = methods(TINY, 16)
    by_group = {}
    for setting in found.settings[1:]:
        by_group.setdefault(setting.group, []).append(setting.name.partition("(")[0])
    everywhere = METHODS.keys() - {"dycoke", "dycoke-kv", "fastv", "holitom-merge"}
    for group, names in by_group.items():
        more = {"dycoke", "fastv"} if group in ("50 % of the tokens", "25 % of the tokens") else {}
        assert set(names) == everywhere.union(more)
    assert len(by_group) == 5
    # A quarter of the frames are kept whole; and layer 0 of 6 reads all, the others 1 of 256.
    assert found.left_out == (
        "dycoke is left out at 15 %, 10 % and 5 %: it reads 25 % of the tokens at least.",
        "fastv is left out at 15 %, 10 % and 5 %: it reads 17 % of the tokens at least.",
    )
    assert len({setting.name for setting in found.settings}) == len(found.settings)
    assert {setting.frames for setting in found.settings} == {16}


def test_more_frames_read_as_many_tokens_as_the_whole_ones():
    found = more_frames(TINY, 16, 128)
    first, *others = found.settings
    assert (first.name, first.compression, first.frames) == ("16 frames", None, 16)
    groups = {setting.group: setting.frames for setting in others}
    assert groups == {
        "32 frames at 50 %": 32,
        "64 frames at 25 %": 64,
        "128 frames at 12.5 %": 128,
    }
    for setting in others:
        assert setting.name.startswith(f"{setting.frames} frames, ")
        counted = read(setting.name.split(", ", 1)[1], setting.frames, 16, 6)
        assert 256 - 32 < counted <= 256
    assert found.left_out[0] == (
        "dycoke is left out at 128 frames at 12.5 %: it reads 25 % of the tokens at least."
    )
    with pytest.raises(ConfigError, match="they need 32 at least"):
        more_frames(TINY, 16, 31)


def test_lines_of_the_plot_join_the_settings_of_a_method():
    lines = lines_of(methods(TINY, 16))
    assert lines["full"] == ["full"]
    assert lines["vidcom2"] == [f"vidcom2(budget={budget})" for budget in BUDGETS]
    assert len(lines["dycoke"]) == 2
    lines = lines_of(more_frames(TINY, 16, 64))
    names = ["16 frames", "32 frames, vidcom2(budget=0.5)", "64 frames, vidcom2(budget=0.25)"]
    assert lines["vidcom2"] == names
    assert "full" not in lines
    assert [*lines_of(of_names(HEADLINES, 16))] == [
        "full",
        "paper",
        "random tokens",
        "whole frames",
    ]


def test_the_page_names_every_method_and_only_settings_that_there_are():
    text = PAGE.read_text()
    named = re.findall(r"^\| `([\w-]+)` \|", text, re.M)
    assert named == [*METHODS]
    for method in re.findall(r'--compress "([^"]+)"', text):
        assert isinstance(parse_compression(method), Compressor)
