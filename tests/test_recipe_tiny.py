"""The recipe of the tiny model: probe targets, auxiliary losses, and the stages."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.tokenizers import tiny_tokenizer

from dycoke_jax import DycokeError
from dycoke_jax.checkpoint.tokenizer import load_tokenizer
from dycoke_jax.compression.ttm import select
from dycoke_jax.config import TINY
from dycoke_jax.model import Model
from dycoke_jax.models.llava import random_params
from dycoke_jax.models.qwen2 import positions_of
from dycoke_jax.recipes.tiny.alignment import align
from dycoke_jax.recipes.tiny.attention_distillation import (
    AttentionDistillation,
    distillation_loss,
    visual_attention,
)
from dycoke_jax.recipes.tiny.drawn_budgets import DrawnBudgets
from dycoke_jax.recipes.tiny.fit import fit
from dycoke_jax.recipes.tiny.probes import (
    PROBES,
    ProbeLoss,
    probe_loss,
    probe_targets,
    probes_shape,
    train_probes,
)
from dycoke_jax.recipes.tiny.source import Stage, StagedSource
from dycoke_jax.recipes.tiny.tokenizer import save_task_tokenizer
from dycoke_jax.tasks.scenes import Cell, Scene, SceneSettings, Thing
from dycoke_jax.tasks.task import task_clip
from dycoke_jax.training.batches import pack
from dycoke_jax.training.loss import score_answers
from dycoke_jax.training.sources import BatchShape, task_example
from dycoke_jax.training.token_dropping import TokenDropping


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    """The tokenizer of the tiny model."""
    folder = tmp_path_factory.mktemp("tokenizer")
    save_task_tokenizer(folder)
    return load_tokenizer(folder)


def test_fitting_finds_the_lowest_loss():
    target = jnp.array([1.0, -2.0, 0.5])

    def loss(params, shift):
        return ((params["x"] + shift - target) ** 2).sum()

    trained = fit({"x": jnp.zeros(3)}, loss, lambda step: (np.zeros(3, np.float32),), 200, 0.1, "x")
    np.testing.assert_allclose(trained["x"], target, atol=0.02)


def test_probe_targets_follow_a_thing():
    """Worked out by hand: a ring moves right, then down onto a cross; a circle is brief."""
    ring = [Cell(0, 0), Cell(0, 0.5), Cell(0, 1), Cell(0.5, 1), Cell(1, 1), Cell(1, 1)]
    things = (
        Thing("cross", "blue", 0, (Cell(1, 1),) * 8, ()),
        Thing("ring", "red", 1, tuple(ring), ("right", "down"), "blue"),
        Thing("circle", "white", 3, (Cell(3, 3),), ()),
    )
    targets = probe_targets(Scene(things, 8, 0)).reshape(8, 4, 4, -1)
    blue, red, white = 3, 1, 8
    cross, ring_, circle = 4, 6, 1
    right, down = 2, 4
    # row, column, colour, shape, first direction, second direction, order, met, gone
    assert targets[0, 1, 1].tolist() == [2, 2, blue, cross, 0, 0, 1, 0, 0]
    assert targets[0, 0, 0].tolist() == [1, 1, 0, 0, 0, 0, 0, 0, 0]
    assert targets[1, 0, 0].tolist() == [1, 1, red, ring_, 0, 0, 2, 0, 0]
    # Half-way between two cells, the ring covers both.
    assert targets[2, 0, 0].tolist() == [1, 1, red, ring_, right, 0, 2, 0, 0]
    assert targets[2, 0, 1].tolist() == [1, 2, red, ring_, right, 0, 2, 0, 0]
    assert targets[3, 3, 3].tolist() == [4, 4, white, circle, 0, 0, 3, 0, 0]
    assert targets[4, 3, 3].tolist() == [4, 4, 0, 0, 0, 0, 0, 0, white]
    assert targets[4, 1, 1].tolist() == [2, 2, red, ring_, right, down, 2, 0, 0]
    assert targets[5, 1, 1].tolist() == [2, 2, red, ring_, right, down, 2, blue, 0]
    assert targets[7, 1, 1].tolist() == [2, 2, blue, cross, 0, 0, 1, 0, 0]


def test_probe_loss_weights():
    """Worked out by hand: an empty cell, a still thing, a moved thing, and a cell left empty."""
    targets = np.zeros((1, 4, 9), np.int32)
    targets[0, :, :2] = 1
    targets[0, 1, 2:7] = [2, 3, 0, 0, 1]
    targets[0, 2, 2:7] = [4, 1, 2, 3, 2]
    targets[0, 3, 8] = 5
    weights = np.zeros((4, 9))
    weights[[0, 3], 2] = weights[:3, 8] = 0.2
    weights[3, 8] = 1
    weights[1:3, :8] = 1
    weights[2, 4:6] = 4
    random = np.random.default_rng(0)
    states, probes = random.standard_normal((1, 4, 6)), random.standard_normal((6, 9, 9))
    scores = np.einsum("bvd,dqc->bvqc", states, probes)[0]
    likely = scores - np.log(np.exp(scores).sum(-1, keepdims=True))
    chosen = np.take_along_axis(likely, targets[0, :, :, None], axis=2)[..., 0]
    loss = probe_loss(jnp.asarray(states), jnp.asarray(probes), jnp.asarray(targets))
    assert float(loss) == pytest.approx(-(chosen * weights).sum() / weights.sum(), rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("dropping", [None, TokenDropping(0.7), TokenDropping(0.7, at_random=True)])
def test_probe_loss_trains_probes_and_lower_layers_only(tokenizer, dropping):
    """It reads the states after the pre-trained layers, and leaves the answers' loss unchanged."""
    shape = probes_shape(TINY)
    probes = jnp.asarray(np.random.default_rng(0).standard_normal(shape.shape), jnp.float32)
    params = {**random_params(TINY), PROBES: probes}
    batch = pack(tokenizer, [task_example("train", 0, SceneSettings(), 64)], 300)
    targets = jnp.asarray(probe_targets(task_clip("train", 0).scene))[None]

    def score(params, auxiliary):
        key = jax.random.key(0)
        return score_answers(
            Model(params, TINY),
            batch,
            dropping=dropping,
            key=key,
            auxiliary=auxiliary,
            targets=targets,
        )

    gradient = jax.jit(jax.grad(lambda params: score(params, (ProbeLoss(),)).auxiliary))(params)
    for path, slope in gradient.items():
        upper = path.startswith(("language_model.layers.3.", "language_model.layers.5."))
        lower = path.startswith(("language_model.layers.0.self_attn.v", PROBES))
        assert not upper or not slope.any(), path
        assert not lower or slope.any(), path
    both = jax.jit(score, static_argnames="auxiliary")
    with_probes, without = both(params, (ProbeLoss(),)), both(params, ())
    assert float(with_probes.auxiliary) > 0 == float(without.auxiliary)
    assert float(with_probes.loss) == pytest.approx(float(without.loss), rel=1e-6)


def packed(tokenizer):
    """Weights large enough for uneven attention, and a clip of the task with its questions."""
    example = task_example("train", 0, SceneSettings(), 64)
    params = {path: 5 * x if x.ndim == 2 else x for path, x in random_params(TINY).items()}
    return params, pack(tokenizer, [example, example], 300)


def test_visual_attention_equals_that_of_decode_steps(tokenizer):
    """Each query has the weights of a decode step on the same cache, averaged over heads."""
    params, _ = packed(tokenizer)
    layer = Model(params, TINY).bind().language_model.layers[1]
    random = np.random.default_rng(0)
    length, visual = 40, slice(5, 22)
    x = jnp.asarray(random.standard_normal((2, length, TINY.text.hidden_size)), jnp.float32)
    valid = jnp.asarray(random.random((2, length)) < 0.8).at[:, 0].set(True)
    parts = jnp.asarray(np.where(np.arange(length) < visual.stop, 0, 1 + np.arange(length) % 2))
    parts = jnp.broadcast_to(parts, (2, length))
    rope = Model(params, TINY).bind().language_model.rope(positions_of(valid))
    got = visual_attention(layer, x, rope, valid, parts, visual)
    _, cache = layer.prefill(x, rope, valid, parts)
    for query in range(visual.stop, length):
        of_query = tuple(turn[:, :, query : query + 1] for turn in rope)
        own = (parts == 0) | (parts == parts[:, query, None])
        seen = valid & own & (np.arange(length) <= query)
        weights = layer.attention_of(x[:, query : query + 1], of_query, cache, seen)
        wanted = weights[:, :, visual].mean(1)
        np.testing.assert_allclose(got[:, query - visual.stop], wanted, atol=1e-6)


def test_distillation_loss_is_lower_where_student_and_teachers_agree():
    """Attention to text and newlines, and queries that do not count, do not change it."""
    random = np.random.default_rng(0)
    late = jnp.asarray(random.random((2, 1, 3, 6)) ** 4, jnp.float32)
    is_visual = jnp.asarray([[True, True, False, True, True, True]])
    counts = jnp.asarray([[True, False, True]])
    alike = distillation_loss(late.mean(0) * 0.1, late, is_visual, counts)
    other = jnp.asarray(random.random((1, 3, 6)), jnp.float32)
    assert float(distillation_loss(other, late, is_visual, counts)) > float(alike) + 0.1
    elsewhere = other.at[:, 1].set(0.3).at[:, :, 2].set(0.9)
    for early in (other, elsewhere):
        assert float(distillation_loss(early, late, is_visual, counts)) == pytest.approx(
            float(distillation_loss(other, late, is_visual, counts)), rel=1e-6
        )
    slope = jax.grad(distillation_loss, argnums=1)(other, late, is_visual, counts)
    assert not slope.any(), "the layers that read are not to learn to look where the other looks"


@pytest.mark.slow
def test_distillation_trains_the_scoring_layer(tokenizer):
    """No gradient reaches later layers, and ten gradient steps lower the loss."""
    params, batch = packed(tokenizer)
    auxiliary = (AttentionDistillation(3),)

    def loss_of(params):
        return score_answers(Model(params, TINY), batch, auxiliary=auxiliary).auxiliary

    both = jax.jit(jax.value_and_grad(loss_of))
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
    pictures = Stage(0, SceneSettings(1, 1, 1), BatchShape(3, 1, 200), short=True)
    clips = Stage(4, SceneSettings(6, 1, 1), BatchShape(1, 2, 600), short=True, others=(pictures,))
    source = StagedSource(tokenizer, 98, (clips, Stage(1, clips.scenes, clips.shape)))
    shapes = [source.step(number).batch.frames.shape[:3] for number in range(5)]
    assert shapes == [(2, 1, 6), (1, 3, 1), (2, 1, 6), (1, 3, 1), (2, 1, 6)]


def test_drawn_budgets_keep_tokens_of_the_clip_alone():
    """Also where the frames of a batch's clips are few or none; counts differ from clip to clip."""
    random = np.random.default_rng(0)
    features = jnp.asarray(random.standard_normal((48, 8, 6, 4)), jnp.float32)
    frames = np.array([8, 5, 1, 0] * 12)
    rows = DrawnBudgets(40).select(features, jnp.asarray(frames), jax.random.key(1))
    places, valid = np.asarray(rows.places), np.asarray(rows.valid)
    assert places.shape == (48, 40)
    counts = valid.sum(1)
    for of_clip, count, clip in zip(places, counts, frames, strict=True):
        kept = of_clip[:count]
        assert (np.diff(kept) > 0).all()
        assert (kept < 6 * clip).all()
        assert (count > 0) == (clip > 0)
    assert (valid == (np.arange(40) < counts[:, None])).all(), "empty rows come last"
    assert counts.max() == 40
    assert len({*counts[frames == 8].tolist()}) > 6


def test_drawn_budgets_draw_token_merging_of_many_k_and_means_of_tokens():
    random = np.random.default_rng(1)
    still = np.repeat(random.standard_normal((64, 1, 6, 4)), 8, axis=1)
    features = (still + 0.1 * random.standard_normal((64, 8, 6, 4))).astype(np.float32)
    count = jnp.full(64, 8)
    rows = DrawnBudgets(48).select(jnp.asarray(features), count, jax.random.key(2))
    kept_of = [frozenset(p[v].tolist()) for p, v in zip(rows.places, rows.valid, strict=True)]
    merged = set()
    for of_frame in range(1, 6):
        of_k = select(jnp.asarray(features), count, of_frame)
        sets = [frozenset(p[v].tolist()) for p, v in zip(of_k.places, of_k.valid, strict=True)]
        merged |= {of_frame for got, wanted in zip(kept_of, sets, strict=True) if got == wanted}
    assert merged == {1, 2, 3, 4, 5}

    ways = set()
    for clip, kept, embeds in zip(features, kept_of, rows.embeds, strict=True):
        if len(kept) == 48:
            continue
        wanted = {way: [] for way in ("tokens", "over time", "in the frame")}
        unit = clip / np.linalg.norm(clip, axis=-1, keepdims=True)
        members = {way: {place: [place] for place in kept} for way in wanted}
        for place in {*range(48)} - kept:
            frame, at = divmod(place, 6)
            before = [f * 6 + at for f in range(frame) if f * 6 + at in kept]
            if before:
                members["over time"][before[-1]].append(place)
            others = [p for p in range(frame * 6, frame * 6 + 6) if p in kept]
            if others:
                alike = [unit[frame, p % 6] @ unit[frame, at] for p in others]
                members["in the frame"][others[int(np.argmax(alike))]].append(place)
        for way, of_way in members.items():
            flat = clip.reshape(48, 4)
            wanted[way] = [flat[of_way[place]].mean(0) for place in sorted(kept)]
        equal = {
            way
            for way, values in wanted.items()
            if np.allclose(embeds[: len(kept)], values, atol=1e-5)
        }
        assert equal, "rows are tokens, or means of them and dropped ones"
        ways |= equal
    assert ways == {"tokens", "over time", "in the frame"}


def test_alignment_refuses_a_tokenizer_that_splits_names():
    model, tokenizer = Model({}, TINY), tiny_tokenizer()
    with pytest.raises(DycokeError, match="single token for"):
        align(model, tokenizer, steps=1)


@pytest.mark.slow
def test_pre_training_leaves_later_layers_unchanged(tokenizer):
    params = random_params(TINY)
    aligned = align(Model(params, TINY), tokenizer, steps=2)
    probed = train_probes(aligned, steps=2).params
    aligned = aligned.params
    assert params.keys() == aligned.keys() == probed.keys() - {PROBES}
    assert probed[PROBES].shape == probes_shape(TINY).shape
    for path, weight in params.items():
        is_layer = path.startswith("language_model.layers.")
        number = int(path.split(".")[2]) if is_layer else -1
        assert (aligned[path] == weight).all() == is_layer, path
        assert (probed[path] == aligned[path]).all() == (number >= 3), path
