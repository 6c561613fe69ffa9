"""VidCom2 against its steps written as loops, and what a token stage must hold to."""

import math
from fractions import Fraction

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from dycoke_jax.compression.protocol import TokenStage
from dycoke_jax.compression.vidcom2 import VidCom2
from dycoke_jax.errors import ConfigError

PROGRAMS = {}


def select(stage, features, frames=None):
    """Compiled once for all tests of the same settings: compiling takes most of the time."""
    if stage not in PROGRAMS:
        PROGRAMS[stage] = jax.jit(stage.select)
    if frames is None:
        frames = [features.shape[1]] * len(features)
    return jax.tree.map(np.asarray, PROGRAMS[stage](features, np.asarray(frames, np.int32)))


def kept(rows, row=0):
    return rows.places[row][rows.valid[row]].tolist()


def clip(seed, frames, tokens=12, width=16):
    """A clip of scenes of which some differ much from the others; channels vary unequally."""
    random = np.random.default_rng(seed)
    scale = random.uniform(0.1, 2, width)
    style = 2 * random.normal(size=width)
    made = []
    while len(made) < frames:
        scene = style + random.choice([0.2, 0.2, 0.4]) * random.normal(size=(tokens, width))
        for _ in range(random.choice([1, 2, 3])):
            made.append(scene + 0.1 * random.normal(size=scene.shape))
    return np.float32(np.array(made[:frames]) * scale)


def similarity(x, centre):
    squared = sum((a - b) ** 2 for a, b in zip(x, centre, strict=True))
    return sum(math.exp(-squared / (2 * width)) for width in (0.125, 0.25, 0.5, 1, 2))


def described(features):
    """The similarities of each token [F, N] to the mean token of the clip, and of its frame."""
    features = features.astype(np.float64)
    variances = features.reshape(-1, features.shape[-1]).var(0)
    lowest = np.argsort(variances, kind="stable")[: len(variances) // 2]
    units = features[..., lowest]
    units = units / np.linalg.norm(units, axis=-1, keepdims=True)
    of_clip = units.mean((0, 1))
    to_clip = np.array([[similarity(x, of_clip) for x in frame] for frame in units])
    to_frame = np.array([[similarity(x, frame.mean(0)) for x in frame] for frame in units])
    return to_clip, to_frame


def shares(to_clip, budget):
    """Tokens of each frame before rounding."""
    unlike = -to_clip.mean(1)
    weights = np.exp((unlike - unlike.max()) / 0.01)
    p = weights / weights.sum()
    return np.minimum(1, budget * (1 + p - p.mean())) * to_clip.shape[1]


def vidcom2(stage, features):
    """The places that go on of one clip, and how far rounding errors are from changing them."""
    frames, tokens, _ = features.shape
    to_clip, to_frame = described(features)
    summed = to_clip + to_frame
    share = shares(to_clip, stage.budget)
    counts = [max(1, round(each)) for each in share]
    chosen = []
    for frame, count in enumerate(counts):
        order = sorted(range(tokens), key=lambda token: (summed[frame, token], token))
        chosen += [frame * tokens + token for token in order[:count]]
    summed = summed.ravel()
    budget = max(1, int(Fraction(str(stage.budget)) * frames * tokens))
    while len(chosen) > budget:
        chosen.remove(max(chosen, key=lambda place: (summed[place], place)))
    while len(chosen) < budget:
        others = set(range(frames * tokens)) - set(chosen)
        chosen.append(min(others, key=lambda place: (summed[place], place)))
    of_rounding = np.abs(share % 1 - 0.5).min()
    of_order = np.diff(np.sort(summed)).min()
    return sorted(chosen), min(of_rounding / 100, of_order)


@pytest.mark.parametrize("budget", [0.05, 0.1, 0.25, 0.6, 0.9, 1], ids=str)
@settings(max_examples=6)
@given(seed=st.integers(0, 10**6))
def test_rows_equal_the_steps_written_as_loops(budget, seed):
    stage, lengths = VidCom2(budget), [7, 5, 1, 2]
    features = np.zeros((4, 7, 12, 16), np.float32)
    for row, length in enumerate(lengths):
        features[row, :length] = clip(seed + row, length)
    rows = select(stage, features, lengths)
    assert rows.places.shape == rows.valid.shape == (4, stage.most_rows(7, 12))
    assert rows.embeds is None
    for row, length in enumerate(lengths):
        wanted, margin = vidcom2(stage, features[row, :length])
        assume(margin > 5e-6)
        assert kept(rows, row) == wanted
        assert len(wanted) == stage.most_rows(length, 12)
        assert (np.diff(rows.places[row]) >= 0).all()  # as newlines in rows or frames need it


def test_made_up_clips_have_unlike_frames_and_tokens_to_add_or_to_drop():
    unlike = added = dropped = 0
    for seed in range(10):
        to_clip, _ = described(clip(seed, 7))
        quarter, more = (
            [max(1, round(each)) for each in shares(to_clip, budget)] for budget in (0.25, 0.6)
        )
        unlike += max(quarter) > 4
        dropped += sum(quarter) > 21
        added += sum(more) < 50
    assert min(unlike, added, dropped) > 3, (unlike, added, dropped)


def test_an_unlike_frame_keeps_twice_the_mean_share():
    """Of 32 frames of 196 tokens a quarter: 96 of one and 47 of each other, and then 15 more."""
    features = np.repeat(clip(2, 1, 196), 32, axis=0)
    features[5] = clip(3, 1, 196)
    counts = np.bincount(np.array(kept(select(VidCom2(0.25), features[None]))) // 196)
    others = np.delete(counts, 5)
    assert counts[5] >= 96
    assert others.min() >= 47
    assert counts[5] - 96 + (others - 47).sum() == 15


@pytest.mark.parametrize("budget", [0.05, 0.125, 0.25, 0.375, 0.9], ids=str)
def test_a_clip_of_equal_tokens_goes_on_from_the_beginning_of_its_frames(budget):
    """Half tokens round to even in each frame, and the rest is added or dropped in order."""
    features = np.full((2, 7, 12, 16), 0.3, np.float32)
    rows = select(VidCom2(budget), features, [7, 4])
    for row, frames in enumerate([7, 4]):
        total = VidCom2(budget).most_rows(frames, 12)
        each = max(1, round(budget * 12))
        first = [frame * 12 + token for frame in range(frames) for token in range(each)]
        others = [place for place in range(frames * 12) if place not in first]
        wanted = sorted([*first, *others][:total])
        assert kept(rows, row) == wanted


def test_still_clips_and_channels_that_do_not_vary_are_no_accident():
    """Equal frames of unlike tokens: each frame keeps the same tokens, whatever the batch."""
    features = np.repeat(clip(8, 1), 8, axis=0)
    features[..., 4:] = features[0, 0, 4:]
    alone = kept(select(VidCom2(0.25), features[None]))
    frames = np.array(alone).reshape(8, 3)
    np.testing.assert_array_equal(frames, frames[0] + 12 * np.arange(8)[:, None])
    assert kept(select(VidCom2(0.25), np.stack([clip(1, 8), features])), 1) == alone


@pytest.mark.parametrize(
    ("budget", "frames", "tokens", "rows"),
    [
        (0.25, 32, 196, 1568),
        (0.15, 32, 196, 940),
        (0.1, 32, 196, 627),
        (0.25, 64, 169, 2704),
        (0.05, 8, 16, 6),
        (0.01, 1, 9, 1),
        (1, 7, 9, 63),
    ],
)
def test_budgets_are_exact_in_decimal_and_at_least_one(budget, frames, tokens, rows):
    assert VidCom2(budget).most_rows(frames, tokens) == rows


def test_a_row_is_the_same_in_every_batch_and_empty_frames_change_nothing():
    """At the number of tokens of a true model; the empty frames hold NaN."""
    stage, lengths = VidCom2(0.25), [5, 3]
    features = np.stack([clip(seed, 5, 196, 65) for seed in range(2)])
    for row, length in enumerate(lengths):
        features[row, length:] = np.nan
    together = select(stage, features, lengths)
    for row, length in enumerate(lengths):
        alone = select(stage, features[row : row + 1, :length])
        assert alone.valid.all()
        assert kept(together, row) == kept(alone)


def test_a_row_without_a_clip_has_no_tokens():
    rows = select(VidCom2(), np.stack([clip(1, 7)] * 2), [7, 0])
    assert rows.valid.sum(1).tolist() == [21, 0]


def test_nothing_is_compiled_anew_for_other_values(compilations):
    stage = VidCom2(0.35)
    select(stage, np.stack([clip(1, 7)] * 2), [7, 7])
    before = compilations()
    select(stage, np.stack([clip(2, 7)] * 2), [7, 1])
    select(stage, np.stack([clip(3, 7)] * 2), [4, 0])
    assert compilations() == before


def test_bfloat16_is_compared_in_float32():
    features = clip(4, 7)[None].astype(ml_dtypes.bfloat16)
    wide = select(VidCom2(0.5), features.astype(np.float32))
    assert kept(select(VidCom2(0.5), features)) == kept(wide)


def test_it_is_a_token_stage_that_asks_for_nothing():
    assert isinstance(VidCom2(), TokenStage)
    assert VidCom2().signals == ()
    assert hash(VidCom2()) == hash(VidCom2(budget=0.25))


@pytest.mark.parametrize("value", [0, 1.5, -0.25, "0.25", float("nan"), None, True])
def test_budgets_out_of_range_are_named(unchecked_types, value):
    allowed = r"it must lie in \(0, 1\]"
    with pytest.raises(ConfigError, match=f"^VidCom2: budget is .*; {allowed}$"):
        VidCom2(value)


def test_program_does_not_grow_with_frames_or_tokens():
    def operations(frames, tokens):
        jaxpr = jax.make_jaxpr(VidCom2().select)(
            jnp.zeros((2, frames, tokens, 4)), jnp.full(2, frames, jnp.int32)
        )
        return str(jaxpr).count(" = ")

    assert operations(5, 7) == operations(32, 48)
