"""Arguments and settings of a wrong type are refused in one line that names them."""

import json
from dataclasses import asdict, replace
from fractions import Fraction
from functools import partial
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from support.tiny import tiny_model, video

from dycoke_jax import Decoding, DyCoke, FrameSampling, LlavaVideo, Prompting, Request
from dycoke_jax.assets import TINY
from dycoke_jax.compression.baselines import RandomTokens, WholeFrames
from dycoke_jax.config import TINY as TINY_MODEL
from dycoke_jax.errors import ConfigError, PromptError, RequestError
from dycoke_jax.inputs import build_prompt, stop_ids
from dycoke_jax.inputs.prompts import encode_answer
from dycoke_jax.inspection.tracing import trace_answer
from dycoke_jax.training.run import Intervals
from dycoke_jax.training.sources import BatchShape
from dycoke_jax.training.step import Optimisation
from dycoke_jax.training.token_dropping import TokenDroppingMix

pytestmark = pytest.mark.usefixtures("unchecked_types")

NOT_WHOLE = [None, "8", b"8", 1.5, 2.0, True, np.True_, float("nan"), [1], Fraction(3, 2)]
NOT_NUMBERS = [None, "0.5", b"1", True, np.False_, 1j, [0.5], {"p": 1}, np.ones((2, 2))]
NAN, LARGE = float("nan"), 10**400
TEXTS = [None, 3, 0.5, b"What?", {"role": "user", "content": "What?"}, {"What?"}, range]


@pytest.fixture(scope="module")
def model():
    return tiny_model()


def refuses(error, action, *names):
    """Calls a function that must raise an error of one short line with these words in it."""
    with pytest.raises(error) as caught:
        action()
    line = str(caught.value)
    assert "\n" not in line
    assert len(line) < 200
    for name in names:
        assert name in line


@pytest.mark.parametrize("name", ["max_new_tokens", "top_k", "seed"])
def test_counts_of_decoding_are_whole_numbers(name):
    for value in NOT_WHOLE:
        refuses(RequestError, lambda value=value: Decoding(**{name: value}), name, "whole number")
    refuses(RequestError, lambda: Decoding(**{name: -1}), f"{name} is -1")


@pytest.mark.parametrize("name", ["temperature", "top_p"])
def test_temperature_and_top_p_are_numbers(name):
    for value in NOT_NUMBERS:
        refuses(RequestError, lambda value=value: Decoding(**{name: value}), name, "not a number")
    for value in (NAN, LARGE, float("inf"), -0.5):
        refuses(RequestError, lambda value=value: Decoding(**{name: value}), f"{name} is ")


@pytest.mark.parametrize("name", ["k", "p", "threshold"])
def test_shares_of_dycoke_are_numbers(name):
    for value in NOT_NUMBERS:
        refuses(ConfigError, lambda value=value: DyCoke(**{name: value}), name, "not a number")
    for value in (NAN, LARGE):
        refuses(ConfigError, lambda value=value: DyCoke(**{name: value}), f"{name} is ")


def test_the_layer_of_dycoke_is_a_whole_number():
    for value in NOT_WHOLE:
        refuses(ConfigError, lambda value=value: DyCoke(layer=value), "layer", "whole number")


@pytest.mark.parametrize("name", ["mode", "parked"])
def test_choices_of_dycoke_are_texts(name):
    for value in (None, 3, b"paper", ["paper"], np.array(["paper", "drop"]), "Paper"):
        refuses(ConfigError, lambda value=value: DyCoke(**{name: value}), name, " or ")


@pytest.mark.parametrize("value", [10**30, 10**5000], ids=["large", "larger than Python writes"])
def test_numbers_beyond_every_size_are_refused(model, value):
    refuses(RequestError, lambda: Decoding(value), "max_new_tokens")
    refuses(RequestError, lambda: Decoding(seed=value), "seed")
    refuses(RequestError, lambda: model.generate(None, ["?"], batch_size=value), "batch_size")
    refuses(ConfigError, lambda: DyCoke(layer=value), "layer")
    refuses(ConfigError, lambda: DyCoke(k=value), "k is ")
    refuses(ConfigError, lambda: FrameSampling(value), "frames")


def test_a_temperature_beyond_float32_makes_all_tokens_equally_likely(model):
    """As one that is the largest float32 does; nothing warns of the conversion."""
    largest, beyond = (
        model.generate(None, ["What?"], decoding=Decoding(8, temperature, seed=5))[0].token_ids
        for temperature in (float(np.finfo(np.float32).max), 1e300)
    )
    assert beyond == largest


def test_numbers_of_frames_and_rates_are_checked():
    for value in (*NOT_WHOLE, 0):
        refuses(ConfigError, lambda value=value: FrameSampling(value), "frames is ")
    for value in (*NOT_NUMBERS[1:], NAN, LARGE, 0, -1.0):
        refuses(ConfigError, lambda value=value: FrameSampling(fps=value), "fps is ")
    assert FrameSampling(np.int64(8), np.float32(0.1)) == FrameSampling(8, 0.1)


@pytest.mark.parametrize("method", [RandomTokens, WholeFrames])
def test_shares_of_the_baselines_are_numbers(method):
    for value in (*NOT_NUMBERS, NAN, 1.0):
        refuses(ConfigError, lambda value=value: method(k=value), f"{method.__name__}: k is ")
    for value in (*NOT_NUMBERS[1:], NAN, 0.0):
        refuses(
            ConfigError, lambda value=value: method(budget=value), f"{method.__name__}: budget is "
        )


def test_the_seed_of_random_tokens_is_a_whole_number():
    for value in (*NOT_WHOLE, -1):
        refuses(ConfigError, lambda value=value: RandomTokens(seed=value), "RandomTokens: seed")


@pytest.mark.parametrize("kind", [np.int8, np.uint16, np.int32, np.int64, np.array, jnp.int32])
def test_integers_of_other_libraries_are_whole_numbers(kind):
    assert Decoding(kind(7), top_k=kind(3), seed=kind(5)) == Decoding(7, top_k=3, seed=5)
    assert RandomTokens(seed=kind(2)) == RandomTokens(seed=2)
    assert asdict(DyCoke(layer=kind(2))) == asdict(DyCoke(layer=2))


@pytest.mark.parametrize("kind", [np.float16, np.float32, np.float64, float, str])
def test_floats_of_numpy_stand_for_their_decimal_digits(kind):
    """A float32 of 0.3 drops as many tokens as 0.3, and is written to JSON like it."""
    if kind is str:
        refuses(ConfigError, lambda: DyCoke(k=kind(0.3)), "k is '0.3'")
        return
    settings = DyCoke(k=kind(0.3), p=kind(0.1), threshold=kind(0.9))
    assert settings == DyCoke(k=0.3, p=0.1, threshold=0.9)
    assert hash(settings) == hash(DyCoke(k=0.3, p=0.1, threshold=0.9))
    assert json.loads(json.dumps(asdict(settings)))["k"] == 0.3


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("system", [3, b"Be brief.", ["Be brief."]]),
        ("prompt_format", [None, 3, "chatml", b"checkpoint", ["checkpoint"]]),
        ("time_text", [None, "yes", 1]),
    ],
)
def test_each_setting_of_prompting_is_checked(name, values):
    for value in values:
        refuses(RequestError, lambda value=value: Prompting(**{name: value}), name)


@pytest.mark.parametrize("method", ["generate", "stream"])
@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("decoding", [None, 3, "1", Decoding, {"seed": 1}, DyCoke(), [None], [3], [Decoding]]),
        ("sampling", [None, 8, {"frames": 8}, FrameSampling, DyCoke()]),
        ("prompting", [None, "checkpoint", {"system": "Be brief."}, Prompting, Decoding()]),
        ("allow_damaged", [None, "no", 0]),
        ("batch_size", NOT_WHOLE),
        ("compression", [DyCoke, "DyCoke", 0.7, {"k": 0.7}, True, [DyCoke()]]),
        ("progress", [3, "bar", True]),
    ],
)
def test_each_argument_of_generate_and_stream_is_checked(model, method, name, values):
    """Before anything is read or run."""
    for value in values:
        refuses(
            RequestError,
            lambda value=value: getattr(model, method)(None, ["What?"], **{name: value}),
            name,
        )


def test_what_becomes_of_failures_is_checked(model):
    for value in (None, "ignore", True, b"raise", ["raise"]):
        refuses(
            RequestError,
            lambda value=value: model.generate(None, ["What?"], failures=value),
            "failures",
        )


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("batch_size", NOT_WHOLE),
        ("stream_every", [*NOT_WHOLE[1:], 0]),
        ("compression", [DyCoke, "DyCoke", True]),
        ("progress", [3, "bar", True]),
        ("on_batch", [3, "bar", True]),
    ],
)
def test_each_argument_of_run_is_checked(model, name, values):
    for value in values:
        refuses(RequestError, lambda value=value: model.run([], **{name: value}), name)


@pytest.mark.parametrize("name", ["decoding", "sampling", "prompting", "allow_damaged"])
def test_each_setting_of_a_request_is_checked(name):
    for value in (None, 3, {"frames": 8}, DyCoke()):
        refuses(RequestError, lambda value=value: Request("?", **{name: value}), name)


def test_only_requests_are_prepared(model):
    for value in (None, "What?", ("What?", None), Decoding()):
        refuses(RequestError, lambda value=value: model.prepare(value), "request is ")


@pytest.mark.parametrize(
    "prompts", ["What?", None, 3, b"What?", {"What?"}, Path("What?"), object()]
)
def test_prompts_that_are_no_list_are_refused(model, prompts):
    """A text would otherwise be taken for one question a character."""
    refuses(RequestError, lambda: model.generate(None, prompts), "prompts", "lists")
    refuses(RequestError, lambda: model.generate([None], prompts), "prompts", "lists")


@pytest.mark.parametrize("videos", ["a.mp4", Path("a.mp4"), 3, b"a.mp4", video(0, 1), {"a.mp4"}])
def test_videos_that_are_no_list_are_refused(model, videos):
    refuses(RequestError, lambda: model.generate(videos, ["What?"]), "videos", "lists")


@pytest.mark.parametrize("count", [0, 1, 3])
def test_as_many_videos_as_prompts_are_needed(model, count):
    refuses(RequestError, lambda: model.generate([None] * count, ["?"] * 2), "videos", "2 prompts")


@pytest.mark.parametrize("prompt", TEXTS, ids=repr)
def test_a_prompt_is_a_text_or_a_list_of_messages(model, prompt):
    ask = {"has_video": False}
    refuses(PromptError, lambda: build_prompt(model.tokenizer, prompt, **ask), "the prompt is ")
    refuses(PromptError, lambda: model.generate(None, [prompt]), "the prompt is ")


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        (Optimisation, "steps"),
        *[(partial(Optimisation, 10), name) for name in ("frozen_layers", "warm_up")],
        *[(BatchShape, name) for name in ("rows", "accumulate", "width")],
        *[(Intervals, name) for name in ("log_every", "evaluate_every", "save_every")],
    ],
)
def test_counts_of_training_are_whole_numbers(settings, name):
    for value in (*NOT_WHOLE, -1):
        refuses(ConfigError, lambda value=value: settings(**{name: value}), f"{name} is ")
    assert getattr(settings(**{name: np.int64(3)}), name) == 3


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        *[
            (partial(Optimisation, 10), name)
            for name in ("learning_rate", "language", "projector", "tower", "weight_decay", "clip")
        ],
        *[(TokenDroppingMix, name) for name in ("merged", "random", "k")],
    ],
)
def test_rates_and_shares_of_training_are_numbers(settings, name):
    for value in (*NOT_NUMBERS, NAN, LARGE, -0.5):
        refuses(ConfigError, lambda value=value: settings(**{name: value}), f"{name} is ")
    assert getattr(settings(**{name: np.float32(0.3)}), name) == 0.3


def test_choices_of_training_are_checked():
    for value in (None, "float16", 32, ["float32"]):
        refuses(ConfigError, lambda value=value: Optimisation(10, dtype=value), "dtype is ")
    for value in (None, 1, "yes"):
        refuses(ConfigError, lambda value=value: Optimisation(10, rematerialise=value), "remat")


@pytest.mark.parametrize(
    ("part", "name", "values"),
    [
        ("text", "vocab_size", [*NOT_WHOLE, 0]),
        ("text", "rope_theta", [*NOT_NUMBERS, 0.0, NAN]),
        ("text", "tie_word_embeddings", [None, "true", 1]),
        ("vision", "image_size", [*NOT_WHOLE, 0]),
        ("vision", "layer_norm_eps", [*NOT_NUMBERS, -1e-6]),
    ],
)
def test_sizes_of_a_model_are_checked(part, name, values):
    sizes = getattr(TINY_MODEL, part)
    for value in values:
        refuses(ConfigError, lambda value=value: replace(sizes, **{name: value}), f"{name} is ")


def test_the_layout_of_a_model_is_checked():
    for value in (*NOT_WHOLE, 0, 9):
        refuses(ConfigError, lambda value=value: replace(TINY_MODEL, pool_stride=value), "stride")
    for value in (None, 3, ["max"], np.array(["max", "average"])):
        refuses(ConfigError, lambda value=value: replace(TINY_MODEL, pool_mode=value), "pool mode")
        refuses(ConfigError, lambda value=value: replace(TINY_MODEL, newline=value), "newline")


@pytest.mark.parametrize(
    "prompt",
    [
        [None],
        [3],
        ["What?"],
        [b"What?"],
        [["role", "user"]],
        [{"role": "user"}],
        *[[{"role": role, "content": "?"}] for role in (None, 3, b"user", ["user"], np.ones(2))],
        *[[{"role": "user", "content": c}] for c in (None, 3, b"?", {"type": "text"}, [None])],
        *[[{"role": "user", "content": [{"type": t, "text": "?"}]}] for t in (3, [], np.ones(2))],
        *[[{"role": "user", "content": [{"type": "text", "text": t}]}] for t in (None, 3, b"?")],
    ],
    ids=repr,
)
def test_lists_of_what_are_no_messages_name_the_turn(model, prompt):
    refuses(PromptError, lambda: build_prompt(model.tokenizer, prompt, has_video=True), "turn 1")


def test_system_answer_and_stop_ids_are_checked(model):
    tokenizer = model.tokenizer
    for value in (3, b"Be brief."):
        build = {"system": value, "has_video": False}
        refuses(PromptError, lambda build=build: build_prompt(tokenizer, "?", **build), "system")
        refuses(PromptError, lambda value=value: encode_answer(tokenizer, value), "answer")
    for value in ("7", 7.5, None, True):
        refuses(PromptError, lambda value=value: stop_ids(tokenizer, [value]), "stop id")


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("name_or_path", [None, 3, b"tiny", ["tiny"], True]),
        ("dtype", ["float99", "int8", 3, ["float32"], object()]),
        ("pool_mode", [3, "mean", b"max", ["max"], np.array(["max", "average"]), True]),
        ("progress", [3, "bar"]),
    ],
)
def test_each_argument_of_from_pretrained_is_checked(name, values):
    for value in values:
        arguments = {"name_or_path": TINY} | {name: value}
        refuses(
            (ConfigError, RequestError),
            lambda arguments=arguments: LlavaVideo.from_pretrained(**arguments),
            name,
        )


def test_a_trace_checks_its_arguments_too(model):
    clip = video(0, 4)
    for name, value in (("compression", DyCoke), ("decoding", 1.5), ("prompting", 3)):
        refuses(
            RequestError,
            lambda name=name, value=value: trace_answer(model, clip, "?", **{name: value}),
            name,
        )
