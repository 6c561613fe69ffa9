"""Attention, rotary embedding, pooling and newline placement against plain versions."""

from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.plain_attention import plain_attention

from dycoke_jax.cache import KV
from dycoke_jax.compression.protocol import Rows
from dycoke_jax.generation.assemble import all_rows, newline_slots, place_newlines
from dycoke_jax.ops.attention import (
    _read_then_write,
    _write_then_read,
    attention,
    blockwise_attention,
    decode_attention,
)
from dycoke_jax.ops.pooling import pool
from dycoke_jax.ops.rope import rotate, rotations
from dycoke_jax.ops.rows import by_row

LONG = pytest.param(4400, marks=pytest.mark.slow)  # more than MAX_STAGES blocks of queries


def normal(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


@pytest.mark.parametrize("length", [1, 255, 256, 257, 700, LONG])
@pytest.mark.parametrize("causal", [True, False])
def test_attention_with_holes(length, causal):
    """Blocks of every size, grouped heads, keys that are not there, queries without any key."""
    q, k, v = normal(0, 2, 6, length, 8), normal(1, 2, 2, length, 8), normal(2, 2, 2, length, 8)
    valid = np.random.default_rng(3).random((2, length)) < 0.7
    valid[1, : length // 2] = False
    seen = np.broadcast_to(valid[:, None], (2, length, length)).copy()
    if causal:
        seen &= np.tril(np.ones((length, length), bool))
    out = attention(*map(jnp.asarray, (q, k, v, valid)), causal=causal)
    np.testing.assert_allclose(out, plain_attention(q, k, v, seen), atol=2e-6)


@pytest.mark.parametrize("length", [512, 729])
@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
def test_one_head_after_the_other_gives_the_same_numbers(length, causal):
    """On CPUs, where there are many tokens: bit for bit what all heads together give."""
    q, k, v = normal(0, 2, 6, length, 8), normal(1, 2, 2, length, 8), normal(2, 2, 2, length, 8)
    valid = np.random.default_rng(3).random((2, length)) < 0.7
    arrays = [*map(jnp.asarray, (q, k, v, valid))]
    together = jax.jit(blockwise_attention, static_argnames="causal")(*arrays, causal=causal)
    lowered = jax.jit(attention, static_argnames="causal").lower(*arrays, causal=causal)
    assert "while" in lowered.as_text(), "a loop over the heads"
    np.testing.assert_array_equal(attention(*arrays, causal=causal), together)


@pytest.mark.parametrize("length", [40, 300, LONG])
def test_attention_keeps_parts_apart(length):
    """Part 0 is seen by all that come after; the others by themselves only."""
    q, k, v = normal(0, 2, 6, length, 8), normal(1, 2, 2, length, 8), normal(2, 2, 2, length, 8)
    parts = np.sort(np.random.default_rng(3).integers(0, 4, (2, length)), axis=1)
    valid = np.random.default_rng(4).random((2, length)) < 0.8
    own = (parts[:, None, :] == 0) | (parts[:, None, :] == parts[:, :, None])
    seen = own & valid[:, None] & np.tril(np.ones((length, length), bool))
    arrays = map(jnp.asarray, (q, k, v, valid))
    out = attention(*arrays, causal=True, parts=jnp.asarray(parts))
    np.testing.assert_allclose(out, plain_attention(q, k, v, seen), atol=2e-6)


@pytest.mark.parametrize(
    "form", [decode_attention, _read_then_write, _write_then_read], ids=lambda form: form.__name__
)
def test_decode_attention_and_its_weights(form):
    q, k, v = normal(0, 2, 6, 1, 8), normal(1, 2, 2, 30, 8), normal(2, 2, 2, 30, 8)
    valid = np.random.default_rng(3).random((2, 30)) < 0.5
    valid[:, 17] = True
    whole = KV(*map(jnp.asarray, (k, v)))
    own = whole.part(17, 18)
    # What the cache holds in the slot of the query's own key and value is not read.
    cache = whole.write(KV(own.keys + 5, own.values - 7), 17)
    out, weights, cache = form(jnp.asarray(q), cache, own, 17, jnp.asarray(valid))
    np.testing.assert_allclose(out, plain_attention(q, k, v, valid[:, None]), atol=2e-6)
    np.testing.assert_allclose(weights.sum(-1), 1, atol=1e-6)
    assert (np.asarray(weights)[~np.broadcast_to(valid[:, None], weights.shape)] == 0).all()
    np.testing.assert_array_equal(cache.keys, k)
    np.testing.assert_array_equal(cache.values, v)


def test_prefill_attention_holds_no_square_matrix():
    """Its memory grows with the length, not with the length squared."""

    def temporaries(length):
        shape = jax.ShapeDtypeStruct((1, 2, length, 8), jnp.float32)
        program = jax.jit(lambda q, k, v: attention(q, k, v, causal=True)).lower(*[shape] * 3)
        return program.compile().memory_analysis().temp_size_in_bytes

    sizes = [temporaries(length) for length in (4096, 8192, 16384, 32768)]
    assert all(after < 2.2 * before for before, after in pairwise(sizes))
    assert sizes[-1] < 8 * 256 * 32768 * 4


def test_rotary_positions_are_relative():
    """A query and a key turned by the same distance keep their product, at any offset."""
    x, y = jnp.asarray(normal(0, 1, 1, 1, 64)), jnp.asarray(normal(1, 1, 1, 1, 64))

    def product(a, b):
        turn = lambda z, p: rotate(z, rotations(jnp.array([[p]]), 64, 1e6))  # noqa: E731
        return float((turn(x, a) * turn(y, b)).sum())

    assert product(3, 10) == pytest.approx(product(20003, 20010), abs=2e-3)
    assert product(0, 0) == pytest.approx(float((x * y).sum()), abs=1e-5)


@given(side=st.integers(1, 12), stride=st.integers(1, 4), seed=st.integers(0, 99))
@pytest.mark.parametrize("mode", ["bilinear", "average", "max"])
def test_pooling_equals_torch(mode, side, stride, seed):
    if stride > side:
        stride = side
    x = normal(seed, 2, side * side, 3)
    grid = torch.from_numpy(x).reshape(2, side, side, 3).permute(0, 3, 1, 2)
    if mode == "bilinear":
        size = [-(-side // stride)] * 2
        wanted = torch.nn.functional.interpolate(grid, size=size, mode="bilinear")
    elif mode == "average":
        wanted = torch.nn.functional.avg_pool2d(grid, stride)
    else:
        wanted = torch.nn.functional.max_pool2d(grid, stride)
    wanted = wanted.permute(0, 2, 3, 1).reshape(2, -1, 3)
    np.testing.assert_allclose(pool(jnp.asarray(x), mode, stride), wanted, atol=1e-6)


GRID = (2, 3)
NEWLINE = -np.ones(4, np.float32)


def place(features, rows, where):
    return place_newlines(jnp.asarray(features), rows, jnp.asarray(NEWLINE), where, GRID)


def rows_of(kept, valid=None):
    return Rows(jnp.asarray(kept, jnp.int32), None if valid is None else jnp.asarray(valid))


def plain_sequence(clip, kept, where):
    """The tokens and newlines that a clip's visual segment should hold, one by one."""
    rows, columns = GRID
    tokens = rows * columns
    flat = clip.reshape(-1, clip.shape[-1])
    span = {"grid": columns, "frame": tokens}.get(where)
    sequence = []
    for position, index in enumerate(kept):
        sequence.append((flat[index], True))
        following = kept[position + 1] if position + 1 < len(kept) else None
        if span and (following is None or following // span != index // span):
            sequence.append((NEWLINE, False))
    if where == "one_token":
        sequence.append((NEWLINE, False))
    return sequence


@pytest.mark.parametrize("where", ["one_token", "grid", "frame", "no_token"])
@given(seed=st.integers(0, 500), frames=st.integers(1, 4), share=st.floats(0.05, 1))
def test_newlines_follow_the_rows_that_are_left(where, seed, frames, share):
    """Also where whole rows or frames are gone: their newline goes with them."""
    features = normal(seed, 2, frames, 6, 4)
    total = frames * 6
    count = max(1, int(share * total))
    rng = np.random.default_rng(seed)
    kept = np.stack([np.sort(rng.permutation(total)[:count]) for _ in range(2)])
    visual = place(features, rows_of(kept), where)
    assert visual.valid.shape[1] == count + newline_slots(where, GRID, frames)
    for row in range(2):
        wanted = plain_sequence(features[row], kept[row], where)
        valid = np.asarray(visual.valid[row])
        np.testing.assert_array_equal(visual.embeds[row][valid], [vector for vector, _ in wanted])
        np.testing.assert_array_equal(visual.is_visual[row][valid], [is_v for _, is_v in wanted])
        tokens = valid & np.asarray(visual.is_visual[row])
        np.testing.assert_array_equal(visual.places[row][tokens], kept[row])


@pytest.mark.parametrize("where", ["one_token", "grid", "frame", "no_token"])
@given(seed=st.integers(0, 500), frames=st.integers(1, 4), share=st.floats(0.05, 1))
def test_empty_rows_leave_no_trace(where, seed, frames, share):
    """Of M rows some hold no token, in the middle and at the end: neither do their newlines."""
    features = normal(seed, 1, frames, 6, 4)
    total = frames * 6
    count = max(1, int(share * total))
    rng = np.random.default_rng(seed)
    kept, valid = np.sort(rng.permutation(total)[:count]), rng.random(count) < 0.6
    visual = place(features, rows_of(kept[None], valid[None]), where)
    wanted = plain_sequence(features[0], kept[valid], where)
    found = np.asarray(visual.valid[0])
    assert int(found.sum()) == len(wanted)
    if wanted:
        np.testing.assert_array_equal(visual.embeds[0][found], [vector for vector, _ in wanted])
        np.testing.assert_array_equal(visual.is_visual[0][found], [is_v for _, is_v in wanted])


def test_new_rows_stand_where_their_places_say():
    features, made = normal(1, 1, 2, 6, 4), normal(2, 1, 3, 4)
    rows = rows_of([[1, 4, 7]])._replace(embeds=jnp.asarray(made))
    visual = place(features, rows, "grid")
    found = np.asarray(visual.valid[0])
    wanted = [made[0, 0], NEWLINE, made[0, 1], NEWLINE, made[0, 2], NEWLINE]
    np.testing.assert_array_equal(visual.embeds[0][found], wanted)


@pytest.mark.parametrize("where", ["one_token", "grid", "frame", "no_token"])
def test_all_tokens_kept_is_the_reference_layout(where):
    """LLaVA-NeXT's add_token_per_grid, add_token_per_frame and the single token, in torch."""
    features = normal(1, 1, 3, 6, 4)
    clip = torch.from_numpy(features[0])
    newline = torch.from_numpy(NEWLINE)
    if where == "grid":
        grid = clip.reshape(3, 2, 3, 4)
        wanted = torch.cat([grid, newline.expand(3, 2, 1, 4)], dim=2).reshape(-1, 4)
    elif where == "frame":
        wanted = torch.cat([clip, newline.expand(3, 1, 4)], dim=1).reshape(-1, 4)
    else:
        wanted = clip.reshape(-1, 4)
        if where == "one_token":
            wanted = torch.cat([wanted, newline[None]])
    visual = place(features, all_rows(jnp.asarray(features), jnp.array([3])), where)
    assert visual.valid.all()
    np.testing.assert_array_equal(visual.embeds[0], wanted)


def test_official_order_is_kept_with_one_newline():
    features = normal(2, 1, 2, 6, 4)
    kept = np.array([[3, 0, 11, 7]])
    visual = place(features, rows_of(kept), "one_token")
    np.testing.assert_array_equal(visual.embeds[0, :4], features.reshape(12, 4)[kept[0]])
    np.testing.assert_array_equal(visual.embeds[0, 4], NEWLINE)


def test_long_rows_are_computed_one_after_another_with_the_same_numbers():
    """And gradients; a batch of short rows, or of one row, is computed at once."""
    rng = np.random.default_rng(0)
    weight = jnp.asarray(rng.standard_normal((8, 8), np.float32))
    seen = []

    def function(x, scale, nothing):
        assert nothing is None
        seen.append(x.shape)
        return jnp.tanh(x @ weight) * scale[:, None, None], x.sum(-1)

    def both(x, scale):
        seen.clear()
        out, sums = by_row(function, x, scale, None)
        shapes = {shape[0] for shape in seen}
        return out, sums, shapes

    scale = jnp.asarray([2.0, -1.0, 0.5])
    x = jnp.asarray(rng.standard_normal((3, 520, 8), np.float32))
    out, sums, shapes = both(x, scale)
    assert 1 in shapes  # what a CPU computes
    right = np.tanh(np.asarray(x) @ np.asarray(weight)) * np.asarray(scale)[:, None, None]
    np.testing.assert_allclose(out, right, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(sums, np.asarray(x).sum(-1), rtol=1e-4, atol=1e-5)
    gradient = jax.grad(lambda x: by_row(function, x, scale, None)[0].sum())(x)
    slope = np.asarray(scale)[:, None, None] * (
        1 - np.tanh(np.asarray(x) @ np.asarray(weight)) ** 2
    )
    np.testing.assert_allclose(gradient, slope @ np.asarray(weight).T, rtol=1e-3, atol=1e-4)
    assert both(x[:, :100], scale)[2] == {3}
    assert both(x[:1], scale[:1])[2] == {1}
