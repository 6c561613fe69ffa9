"""Programs are compiled before there are requests, and requests of these sizes compile nothing."""

import json

import numpy as np
import pytest
from support.command_line import run_main
from support.tiny import tiny_model, video

from dycoke_jax import Decoding, DyCoke
from dycoke_jax.assets import TINY
from dycoke_jax.compression.fastv import FastV
from dycoke_jax.errors import ConfigError, RequestError

METHOD = DyCoke(layer=1)


@pytest.fixture(scope="module")
def model():
    return tiny_model(layers=2)


def test_requests_of_the_sizes_compile_nothing_and_nor_do_batches_of_what_is_left(
    model, compilations
):
    """Each batch of other clips, questions, limits and ways of sampling."""
    sizes = {"frames": [4], "question_tokens": [8], "max_new_tokens": [32]}
    before = compilations()
    first = model.warm_up(**sizes, batch=(1, 2, 4), compression=METHOD)
    warm = compilations()
    assert first.layouts == 3
    assert first.compiled + first.found == warm - before > 0
    assert first.seconds > 0

    rng = np.random.default_rng(0)
    for requests in (1, 2, 7):
        clips = [video(n, int(rng.integers(3, 5))) for n in range(requests)]
        questions = ["Why? " * int(rng.integers(1, 4)) for _ in clips]
        decoding = [
            Decoding(int(rng.integers(1, 33)), float(rng.choice([0, 0.9])), seed=n)
            for n in range(requests)
        ]
        model.generate(clips, questions, compression=METHOD, decoding=decoding, batch_size=4)
    assert [*model.stream([clips[0]], ["What?"], compression=METHOD, decoding=Decoding(20))]
    assert compilations() == warm

    again = model.warm_up(**sizes, batch=(1, 2, 3, 4), compression=METHOD)
    assert (again.layouts, again.compiled, again.found) == (3, 0, 0)
    model.generate([video(0, 5)], ["Why?"], compression=METHOD, decoding=Decoding(4))
    assert compilations() > warm, "clips of other sizes have programs of their own"


def test_questions_without_a_clip_have_programs_too(model, compilations):
    model.warm_up(frames=[0], batch=[1], question_tokens=[8], max_new_tokens=[32])
    warm = compilations()
    model.generate(None, ["Why?"], decoding=Decoding(5))
    assert compilations() == warm


def test_progress_goes_to_the_number_of_layouts(model):
    seen = []
    sizes = {"frames": [0, 1], "batch": [1], "question_tokens": [8], "max_new_tokens": [8]}
    model.warm_up(**sizes, compression=None, progress=lambda *now: seen.append(now))
    assert seen == [("compiling", done, 2) for done in (0, 1, 2)]


@pytest.mark.parametrize(
    ("arguments", "error", "says"),
    [
        ({"frames": 4}, RequestError, "frames is 4; it must be a list of whole numbers"),
        ({"frames": [-1]}, RequestError, "frames is -1; it must be at least 0"),
        ({"frames": [1], "batch": [0]}, RequestError, "batch is 0; it must be at least 1"),
        ({"frames": [5000], "compression": None}, RequestError, "exceed the model's"),
        ({"frames": [1], "compression": FastV(layer=2)}, ConfigError, "layer is 2"),
    ],
    ids=["no list", "negative", "no rows", "too long", "compression"],
)
@pytest.mark.usefixtures("unchecked_types")
def test_sizes_that_cannot_work_are_refused_in_one_line(model, arguments, error, says):
    with pytest.raises(error) as raised:
        model.warm_up(**arguments)
    assert says in str(raised.value)
    assert "\n" not in str(raised.value)


def test_the_command_says_how_many_programs_were_compiled_or_found(compilations):
    sizes = ("--frames", "2", "--batch", "1,2", "--max-new-tokens", "6", "--question-tokens", 4)
    before = compilations()
    code, out, err = run_main("warmup", "--model", TINY, *sizes, "--compress", "none", "--json")
    assert (code, err) == (0, "")
    shown = json.loads(out)
    assert shown["layouts"] == 2
    assert 0 < shown["compiled"] + shown["found"] <= compilations() - before
    code, out, err = run_main("warmup", "--model", TINY, *sizes, "--compress", "none")
    assert (code, out) == (0, "")
    assert err.startswith("2 layouts: 0 programs compiled, ")


def test_the_command_refuses_sizes_that_are_no_numbers():
    code, _, err = run_main("warmup", "--model", TINY, "--frames", "8-16")
    assert code == 2
    assert err == (
        "error: --frames is '8-16'; it must be whole numbers with commas between them, "
        "such as 1,8\n"
    )
