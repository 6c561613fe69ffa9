"""Methods of token compression as text, such as ``random(k=0.5)``."""

import contextlib
from dataclasses import asdict, dataclass, fields

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dycoke_jax import DyCoke
from dycoke_jax.compression.baselines import RandomTokens, WholeFrames
from dycoke_jax.compression.dycoke import DyCokeKV
from dycoke_jax.compression.evs import EVS
from dycoke_jax.compression.methods import METHODS, described, parse_compression
from dycoke_jax.compression.protocol import Compressor, combine
from dycoke_jax.compression.vidcom2 import VidCom2
from dycoke_jax.errors import ConfigError

pytestmark = pytest.mark.usefixtures("unchecked_types")


@pytest.mark.parametrize(
    ("text", "compression"),
    [
        ("none", None),
        (" none ", None),
        ("dycoke", DyCoke()),
        ("dycoke()", DyCoke()),
        ("dycoke(k=.7, mode=official)", DyCoke(k=0.7, mode="official")),
        ("dycoke(k=0,layer=2,p=5e-1)", DyCoke(k=0.0, layer=2, p=0.5)),
        ("dycoke(parked='drop', mode=\"paper\")", DyCoke(parked="drop")),
        ("random(k=0.5)", RandomTokens(k=0.5)),
        ("random ( seed = 3 ,\n k = 0.25 )", RandomTokens(k=0.25, seed=3)),
        ("frames(k=0.5)", WholeFrames(k=0.5)),
        ("frames(k=0.5, budget=none)", WholeFrames(k=0.5)),
        ("random(budget=.25)", RandomTokens(budget=0.25)),
        ("evs(budget=.1, first_frame=budget)", EVS(0.1, "budget")),
        ("vidcom2(budget=.25)+dycoke-kv(p=.7)", combine(VidCom2(0.25), DyCokeKV(p=0.7))),
    ],
    ids=repr,
)
def test_a_text_names_a_method_and_its_settings(text, compression):
    parsed = parse_compression(text)
    assert parsed == compression
    assert type(parsed) is type(compression)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "the name of a method is missing at the end"),
        ("0.5", "the name of a method is missing before '0.5'"),
        ("nothing", "there is no method 'nothing'; there are none, dycoke, "),
        ("DyCoke", "there is no method 'DyCoke'"),
        ("random(p=0.5)", "random has no setting 'p'; it has k, seed"),
        ("random(0.5)", "settings are given by name, such as k=0.5"),
        ("random(k 0.5)", "= is missing before '0.5'"),
        ("random(k=)", "a value of k is missing before ')'"),
        ("random(k", "= is missing at the end"),
        ("random(k=0.5", ", or ) is missing at the end"),
        ("random(", "the name of a setting is missing at the end"),
        ("random(k=0.5,)", "the name of a setting is missing before ')'"),
        ("random(k=0.5))", "+ is missing before ')'"),
        ("random k=0.5", "+ is missing before 'k'"),
        ("random(k=(0.5))", "a value of k is missing before '('"),
        ("random(k=0.5 seed=3)", ", or ) is missing before 'seed'"),
        ("random(k=0.5, k=0.5)", "k is given twice"),
        ("random(k=0.5x)", "a value of k is missing before '0.5x)'"),
        ("dycoke(mode='paper)", "a value of mode is missing before"),
        ("random(k=1.5)", "RandomTokens: k is 1.5; it must lie in [0, 1)"),
        ("random(k=true)", "RandomTokens: k is True, not a number"),
        ("random(k=none)", "RandomTokens: k is None, not a number"),
        ("random(k=.5, budget=.25)", "RandomTokens: k is 0.5 and budget is 0.25; give one of them"),
        ("vidcom2(budget=none)", "VidCom2: budget is None, not a number; it must lie in (0, 1]"),
        ("random(k=half)", "RandomTokens: k is 'half', not a number"),
        ("random(k=1e999)", "RandomTokens: k is inf"),
        ("random(seed=2.5)", "RandomTokens: seed is 2.5, not a whole number"),
        (f"random(seed={'9' * 5000})", "RandomTokens: seed is inf, not a whole number"),
        ("dycoke(mode=fast)", "DyCoke: mode is 'fast'; it must be paper or official"),
        ("none(k=0.5)", "none has no settings"),
        ("none+dycoke", "none has no settings, and cannot be combined"),
        ("dycoke+none", "none has no settings, and cannot be combined"),
        ("dycoke+", "the name of a method is missing at the end"),
        ("dycoke|random", "+ is missing before '|random'"),
    ],
    ids=lambda value: repr(value[:40]),
)
def test_faults_are_named_in_one_line(text, says):
    with pytest.raises(ConfigError) as caught:
        parse_compression(text)
    line = str(caught.value)
    assert says in line
    assert "\n" not in line
    assert len(line) < 200


def test_a_setting_without_default_must_be_given(monkeypatch):
    @dataclass(frozen=True)
    class Strict:
        budget: float

    monkeypatch.setitem(METHODS, "strict", Strict)
    with pytest.raises(ConfigError, match="compression 'strict': strict needs the setting budget"):
        parse_compression("strict")
    assert parse_compression("strict(budget=.25)") == Strict(0.25)


def test_two_methods_for_the_same_tokens_cannot_be_combined():
    with pytest.raises(ConfigError):
        parse_compression("frames(k=0.5)+random(k=0.5)")


@pytest.mark.parametrize("text", [None, 3, b"dycoke", DyCoke()], ids=repr)
def test_what_is_no_text_is_refused(text):
    with pytest.raises(ConfigError, match="compression is "):
        parse_compression(text)


PARTS = [*METHODS, *"()=,+-'\"x 0\n\0é", "none", "k", "layer", "mode", "seed", "paper", "true"]
PARTS += ["0.5", ".5", "1e9", "nan", "false"]
TEXTS = st.text(max_size=40) | st.lists(st.sampled_from(PARTS), max_size=12).map("".join)
CALLS = st.lists(st.sampled_from(["k=", "layer=", "mode=", "seed=", *PARTS]), max_size=6).map(
    lambda parts: f"dycoke({''.join(parts)})"
)


@given(TEXTS | CALLS)
@settings(
    max_examples=500,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],  # it is the same for all texts
)
def test_any_text_gives_a_compressor_or_none_or_a_config_error(text):
    compression = None
    with contextlib.suppress(ConfigError):
        compression = parse_compression(text)
    assert compression is None or isinstance(compression, Compressor)


@pytest.mark.parametrize("name", METHODS)
def test_the_defaults_of_every_method_written_as_text_are_read_back(name):
    defaults = METHODS[name]()
    written = [f"{field.name}={getattr(defaults, field.name)}" for field in fields(defaults)]
    assert parse_compression(f"{name}({', '.join(written)})") == defaults == parse_compression(name)


@pytest.mark.parametrize("name", METHODS)
def test_a_compressor_is_described_by_its_name_and_settings(name):
    assert described(METHODS[name]()) == {"method": name, **asdict(METHODS[name]())}
