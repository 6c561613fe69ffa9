"""The lessons before the questions: what is told about each visual token, and that it is learnt."""

import jax.numpy as jnp
import numpy as np
import pytest
from tokenizers_for_tests import tiny_tokenizer

from dycoke_jax import DycokeError
from dycoke_jax.evaluation.scenes import Cell, Scene, Thing
from dycoke_jax.training import tiny, watching
from dycoke_jax.training.alignment import align
from dycoke_jax.training.lessons import teach
from dycoke_jax.training.watching import facts_of


def test_lessons_find_the_lowest_loss():
    target = jnp.array([1.0, -2.0, 0.5])

    def loss(params, shift):
        return ((params["x"] + shift - target) ** 2).sum()

    trained = teach({"x": jnp.zeros(3)}, loss, lambda step: (np.zeros(3, np.float32),), 200, 0.1)
    np.testing.assert_allclose(trained["x"], target, atol=0.02)


def test_facts_follow_a_thing():
    """By hand: a ring goes right, then down onto a cross; a circle shows up for one frame."""
    ring = [Cell(0, 0), Cell(0, 0.5), Cell(0, 1), Cell(0.5, 1), Cell(1, 1), Cell(1, 1)]
    things = (
        Thing("cross", "blue", 0, (Cell(1, 1),) * 8, ()),
        Thing("ring", "red", 1, tuple(ring), ("right", "down"), "blue"),
        Thing("circle", "white", 3, (Cell(3, 3),), ()),
    )
    facts = facts_of(Scene(things, 8, 0)).reshape(8, 4, 4, -1)
    blue, red, white = 3, 1, 8
    cross, ring_, circle = 4, 6, 1
    right, down = 2, 4
    # row, column, colour, shape, first way, second way, order, met, gone
    assert facts[0, 1, 1].tolist() == [2, 2, blue, cross, 0, 0, 1, 0, 0]
    assert facts[0, 0, 0].tolist() == [1, 1, 0, 0, 0, 0, 0, 0, 0]
    assert facts[1, 0, 0].tolist() == [1, 1, red, ring_, 0, 0, 2, 0, 0]
    # Half-way between two cells it lies on both.
    assert facts[2, 0, 0].tolist() == [1, 1, red, ring_, right, 0, 2, 0, 0]
    assert facts[2, 0, 1].tolist() == [1, 2, red, ring_, right, 0, 2, 0, 0]
    assert facts[3, 3, 3].tolist() == [4, 4, white, circle, 0, 0, 3, 0, 0]
    assert facts[4, 3, 3].tolist() == [4, 4, 0, 0, 0, 0, 0, 0, white]
    assert facts[4, 1, 1].tolist() == [2, 2, red, ring_, right, down, 2, 0, 0]
    assert facts[5, 1, 1].tolist() == [2, 2, red, ring_, right, down, 2, blue, 0]
    assert facts[7, 1, 1].tolist() == [2, 2, blue, cross, 0, 0, 1, 0, 0]


def test_alignment_names_what_it_cannot_teach():
    params, tokenizer = {}, tiny_tokenizer()
    with pytest.raises(DycokeError, match="single token for"):
        align(tiny.SIZES, params, tokenizer, steps=1)


@pytest.mark.slow
def test_lessons_leave_the_upper_layers_alone(tmp_path):
    from dycoke_jax.inputs.prompts import load_tokenizer
    from dycoke_jax.models.llava import random_params

    tiny.save_tokenizer(tmp_path / "words")
    params = random_params(tiny.SIZES)
    aligned = align(tiny.SIZES, params, load_tokenizer(tmp_path / "words"), steps=2)
    watched = watching.watch(tiny.SIZES, aligned, steps=2)
    assert params.keys() == aligned.keys() == watched.keys()
    for path, weight in params.items():
        is_layer = path.startswith("language_model.layers.")
        number = int(path.split(".")[2]) if is_layer else -1
        assert (aligned[path] == weight).all() == is_layer, path
        assert (watched[path] == aligned[path]).all() == (number >= 3), path
