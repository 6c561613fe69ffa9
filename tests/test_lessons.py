"""The lessons before the questions: what is told about each visual token, and that it is learnt."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.tokenizers import tiny_tokenizer

from dycoke_jax import DycokeError
from dycoke_jax.checkpoint.tokenizer import load_tokenizer
from dycoke_jax.config import TINY
from dycoke_jax.models.llava import bind, random_params
from dycoke_jax.models.qwen2 import positions_of
from dycoke_jax.tasks.scenes import Cell, Scene, SceneSettings, Thing
from dycoke_jax.training import tiny, watching
from dycoke_jax.training.alignment import align
from dycoke_jax.training.batches import pack
from dycoke_jax.training.foresight import foresight_loss, visual_attention
from dycoke_jax.training.lessons import teach
from dycoke_jax.training.loss import Thinning, score_answers
from dycoke_jax.training.sources import BatchShape, Stage, TaskSource, task_example
from dycoke_jax.training.watching import READERS, fact_loss, facts_of, readers_shape


def test_lessons_find_the_lowest_loss():
    target = jnp.array([1.0, -2.0, 0.5])

    def loss(params, shift):
        return ((params["x"] + shift - target) ** 2).sum()

    trained = teach(
        {"x": jnp.zeros(3)}, loss, lambda step: (np.zeros(3, np.float32),), 200, 0.1, "x"
    )
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


def test_facts_weigh_as_much_as_they_tell():
    """By hand: an empty place, a thing at rest, a moved one, and where one was briefly."""
    facts = np.zeros((1, 4, 9), np.int32)
    facts[0, :, :2] = 1
    facts[0, 1, 2:7] = [2, 3, 0, 0, 1]
    facts[0, 2, 2:7] = [4, 1, 2, 3, 2]
    facts[0, 3, 8] = 5
    weights = np.zeros((4, 9))
    weights[[0, 3], 2] = weights[:3, 8] = 0.2
    weights[3, 8] = 1
    weights[1:3, :8] = 1
    weights[2, 4:6] = 4
    random = np.random.default_rng(0)
    states, readers = random.standard_normal((1, 4, 6)), random.standard_normal((6, 9, 9))
    scores = np.einsum("bvd,dqc->bvqc", states, readers)[0]
    likely = scores - np.log(np.exp(scores).sum(-1, keepdims=True))
    chosen = np.take_along_axis(likely, facts[0, :, :, None], axis=2)[..., 0]
    loss = fact_loss(jnp.asarray(states), jnp.asarray(readers), jnp.asarray(facts))
    assert float(loss) == pytest.approx(-(chosen * weights).sum() / weights.sum(), rel=1e-5)


@pytest.mark.parametrize("thinning", [None, Thinning(0.7), Thinning(0.7, at_random=True)])
def test_facts_are_learned_beside_the_answers(tmp_path, thinning):
    """From the states of the layer that the lesson taught, of the tokens that are there."""
    tiny.save_tokenizer(tmp_path / "words")
    tokenizer = load_tokenizer(tmp_path / "words")
    shape = readers_shape(TINY)
    readers = jnp.asarray(np.random.default_rng(0).standard_normal(shape.shape), jnp.float32)
    params = {**random_params(TINY), READERS: readers}
    example = task_example("train", 0, SceneSettings(), 64, with_facts=True)
    batch = pack(tokenizer, [example], 300)

    def score(params, batch):
        key = jax.random.key(0)
        return score_answers(TINY, params, batch, thinning=thinning, key=key)

    def beside(params):
        return score(params, batch).beside

    gradient = jax.jit(jax.grad(beside))(params)
    for path, slope in gradient.items():
        upper = path.startswith(("language_model.layers.3.", "language_model.layers.5."))
        lower = path.startswith(("language_model.layers.0.self_attn.v", "readers"))
        assert not upper or not slope.any(), path
        assert not lower or slope.any(), path
    with_facts = jax.jit(score)(params, batch)
    without = jax.jit(score)(params, batch._replace(facts=None))
    assert float(with_facts.beside) > 0 == float(without.beside)
    assert float(with_facts.loss) == pytest.approx(float(without.loss), rel=1e-6)


def packed(tmp_path):
    """A clip of the task with its questions, and weights that do not look at everything alike."""
    tiny.save_tokenizer(tmp_path / "words")
    tokenizer = load_tokenizer(tmp_path / "words")
    example = task_example("train", 0, SceneSettings(), 64)
    params = {path: 5 * x if x.ndim == 2 else x for path, x in random_params(TINY).items()}
    return params, pack(tokenizer, [example, example], 300)


def test_attention_of_questions_is_that_of_the_layer(tmp_path):
    """Row for row the weights that a decoding step would give, in the mean of the heads."""
    params, _ = packed(tmp_path)
    layer = bind(TINY, params).language_model.layers[1]
    random = np.random.default_rng(0)
    length, shared, visual = 40, 25, slice(5, 22)
    x = jnp.asarray(random.standard_normal((2, length, TINY.text.hidden_size)), jnp.float32)
    valid = jnp.asarray(random.random((2, length)) < 0.8).at[:, 0].set(True)
    parts = jnp.asarray(np.where(np.arange(length) < shared, 0, 1 + np.arange(length) % 2))
    parts = jnp.broadcast_to(parts, (2, length))
    rope = bind(TINY, params).language_model.rope(positions_of(valid))
    got = visual_attention(layer, x, rope, valid, parts, visual, shared)
    _, cache = layer.prefill(x, rope, valid, parts)
    for query in range(shared, length):
        of_query = tuple(turn[:, :, query : query + 1] for turn in rope)
        own = (parts == 0) | (parts == parts[:, query, None])
        seen = valid & own & (np.arange(length) <= query)
        weights = layer.attention_of(x[:, query : query + 1], of_query, cache, seen)
        wanted = weights[:, :, visual].mean(1)
        np.testing.assert_allclose(got[:, query - shared], wanted, atol=1e-6)


def test_foresight_is_best_where_both_look_at_the_same():
    """Whatever the text and newlines get; and what is not counted does not count."""
    random = np.random.default_rng(0)
    late = jnp.asarray(random.random((2, 1, 3, 6)) ** 4, jnp.float32)
    is_visual = jnp.asarray([[True, True, False, True, True, True]])
    counts = jnp.asarray([[True, False, True]])
    alike = foresight_loss(late.mean(0) * 0.1, late, is_visual, counts)
    other = jnp.asarray(random.random((1, 3, 6)), jnp.float32)
    assert float(foresight_loss(other, late, is_visual, counts)) > float(alike) + 0.1
    elsewhere = other.at[:, 1].set(0.3).at[:, :, 2].set(0.9)
    for early in (other, elsewhere):
        assert float(foresight_loss(early, late, is_visual, counts)) == pytest.approx(
            float(foresight_loss(other, late, is_visual, counts)), rel=1e-6
        )
    slope = jax.grad(foresight_loss, argnums=1)(other, late, is_visual, counts)
    assert not slope.any(), "the layers that read are not to learn to look where the other looks"


def test_foresight_teaches_the_layer_that_chooses(tmp_path):
    """Its gradient goes to the layers up to that one, and a few steps lower it."""
    params, batch = packed(tmp_path)
    thinning = Thinning(0, pruned_layer=3)

    def beside(params):
        return score_answers(TINY, params, batch, thinning=thinning).beside

    both = jax.jit(jax.value_and_grad(beside))
    first, gradient = both(params)
    for path, slope in gradient.items():
        later = path.startswith(tuple(f"language_model.layers.{n}." for n in (3, 4, 5)))
        assert not later or not slope.any(), path
    assert gradient["language_model.layers.2.self_attn.q_proj.weight"].any()
    for _ in range(10):
        loss, gradient = both(params)
        norm = jnp.sqrt(sum((slope**2).sum() for slope in gradient.values()))
        params = {path: x - 0.05 * gradient[path] / norm for path, x in params.items()}
    assert float(loss) < float(first) - 0.07


def test_stages_may_take_turns():
    tokenizer = tiny_tokenizer()
    pictures = Stage(0, SceneSettings(1, 1, 1), BatchShape(3, 1, 200), drill=True)
    clips = Stage(4, SceneSettings(6, 1, 1), BatchShape(1, 2, 600), drill=True, other=pictures)
    source = TaskSource(tokenizer, 98, (clips, Stage(1, clips.scenes, clips.shape)))
    shapes = [source.batch(step)[0].frames.shape[:3] for step in range(5)]
    assert shapes == [(2, 1, 6), (1, 3, 1), (2, 1, 6), (1, 3, 1), (2, 1, 6)]


def test_alignment_names_what_it_cannot_teach():
    params, tokenizer = {}, tiny_tokenizer()
    with pytest.raises(DycokeError, match="single token for"):
        align(TINY, params, tokenizer, steps=1)


@pytest.mark.slow
def test_lessons_leave_the_upper_layers_alone(tmp_path):
    tiny.save_tokenizer(tmp_path / "words")
    params = random_params(TINY)
    aligned = align(TINY, params, load_tokenizer(tmp_path / "words"), steps=2)
    watched = watching.watch(TINY, aligned, steps=2)
    assert params.keys() == aligned.keys() == watched.keys() - {READERS}
    assert watched[READERS].shape == readers_shape(TINY).shape
    for path, weight in params.items():
        is_layer = path.startswith("language_model.layers.")
        number = int(path.split(".")[2]) if is_layer else -1
        assert (aligned[path] == weight).all() == is_layer, path
        assert (watched[path] == aligned[path]).all() == (number >= 3), path
