"""UniComp against its steps written as loops, and what a token stage must hold to."""

from decimal import Decimal

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dycoke_jax.compression.protocol import Signal, TokenStage
from dycoke_jax.compression.unicomp import UniComp
from dycoke_jax.errors import ConfigError

PROGRAMS = {}


def select(stage, features, keys, frames=None):
    """Compiled once for all tests of the same settings: compiling takes most of the time."""
    if stage not in PROGRAMS:
        PROGRAMS[stage] = jax.jit(stage.select)
    if frames is None:
        frames = [features.shape[1]] * len(features)
    return jax.tree.map(
        np.asarray, PROGRAMS[stage](features, np.asarray(frames, np.int32), (keys,))
    )


def clip(seed, frames, tokens, width=16):
    """Features and keys of a clip with scenes, an odd frame, and alike tokens, some identical."""
    random = np.random.default_rng(seed)
    style = 2 * random.normal(size=width)  # what all frames of a clip have in common
    made = []
    while len(made) < frames:
        kinds = random.integers(0, max(2, tokens // 2), tokens)
        offset = style + random.choice([0.3] * 5 + [8]) * random.normal(size=width)
        features = random.normal(size=(tokens, width))[kinds] + offset
        keys = random.normal(size=(tokens, width))[kinds]
        moved = random.random(tokens) < 0.6
        features[moved] += 0.1 * random.normal(size=features[moved].shape)
        keys[moved] += 0.2 * random.normal(size=keys[moved].shape)
        for repeat in range(random.choice([1, 1, 2, 3])):
            noise = [0, 0.02][repeat % 2]  # the first copy differs a little, the second not at all
            made.append(
                (
                    features + noise * random.normal(size=features.shape),
                    keys + noise * random.normal(size=keys.shape),
                )
            )
    features, keys = zip(*made[:frames], strict=True)
    return np.float32(features), np.float32(keys)


def distinct(seed, frames, tokens, width=16):
    """A clip without alike frames or tokens."""
    random = np.random.default_rng(seed)
    return np.float32(random.normal(size=(2, frames, tokens, width)))


def distance(a, b):
    if np.array_equal(a, b):
        return 0.0
    return 1 - float(a @ b) / (np.linalg.norm(a) * np.linalg.norm(b))


def grouped(features, threshold):
    described = features.mean(1)
    groups = [[0]]
    for frame in range(1, len(features)):
        if distance(described[frame], described[groups[-1][0]]) <= threshold:
            groups[-1].append(frame)
        else:
            groups.append([frame])
    return groups


def bound_of(budget, count, tokens):
    return max(1, min(tokens, 2 * budget // count))


def shared(fused, budget):
    """Shares of the fused frames [F, N, D]."""
    described, count = fused.mean(1), len(fused)
    similar = np.array([[1 - distance(a, b) for b in described] for a in described])
    weights = [np.exp(count**0.5 * (similar.mean() - own.mean())) for own in similar]
    parts = [weight / sum(weights) for weight in weights]
    bound = bound_of(budget, count, fused.shape[1])
    shares = [min(int(part * budget + 1e-3), bound) for part in parts]
    while True:
        below = [frame for frame in range(count) if shares[frame] < bound]
        left = budget - sum(shares)
        if left < len(below) or not below:
            break
        for frame in below:
            shares[frame] = min(shares[frame] + left // len(below), bound)
    for frame in sorted(below, key=lambda frame: -round(parts[frame], 9))[:left]:
        shares[frame] += 1
    return shares


def thinned(features, keys, threshold):
    """Tokens of a fused frame as (token, value), the most unlike first."""
    tokens = range(len(keys))
    away = np.array([[distance(a, b) for b in keys] for a in keys])
    kept = []
    for token in sorted(tokens, key=lambda token: -round(away[token].mean(), 9)):
        if all(away[token, other] >= threshold for other, _ in kept):
            near = [features[other] for other in tokens if away[token, other] < threshold]
            kept.append((token, (features[token] + np.mean(near, 0)) / 2))
    return kept


def unicomp(stage, features, keys):
    """The steps of UniComp on one clip: places [M] and embeddings [M, D]."""
    features, keys = features.astype(np.float64), keys.astype(np.float64)
    frames, tokens, _ = features.shape
    budget = max(1, int(Decimal(str(stage.budget)) * frames * tokens))
    groups = grouped(features, stage.frame_threshold)
    fused = np.array([features[group].mean(0) for group in groups])
    fused_keys = [keys[group].mean(0) for group in groups]
    rows = []
    for group, share, x, k in zip(groups, shared(fused, budget), fused, fused_keys, strict=True):
        kept = thinned(x, k, stage.token_threshold)[:share]
        rows += sorted((group[0] * tokens + token, *value) for token, value in kept)
    rows = np.array(rows)
    return rows[:, 0].astype(int), rows[:, 1:]


def assert_row(rows, index, places, embeds, atol=1e-5):
    """Row ``index`` holds these tokens first and nothing behind them."""
    count = len(places)
    np.testing.assert_array_equal(rows.valid[index], np.arange(rows.valid.shape[1]) < count)
    np.testing.assert_array_equal(rows.places[index, :count], places)
    np.testing.assert_allclose(rows.embeds[index, :count], embeds, rtol=0, atol=atol)
    assert not rows.embeds[index, count:].any()


CASES = {
    "a quarter of 9 frames": (UniComp(), 9, 12),
    "less than one token a frame": (UniComp(budget=0.1), 7, 6),
    "all, other thresholds": (UniComp(1, frame_threshold=0, token_threshold=0.6), 8, 10),
    "one frame": (UniComp(budget=0.5), 1, 12),
}


@given(case=st.sampled_from(sorted(CASES)), seed=st.integers(0, 10**6))
def test_rows_equal_the_steps_written_as_loops(case, seed):
    stage, frames, tokens = CASES[case]
    clips = [clip(seed + row, frames, tokens) for row in range(2)]
    lengths = [frames, max(1, frames - 2)]
    features, keys = (np.stack(each) for each in zip(*clips, strict=True))
    features[1, lengths[1] :], keys[1, lengths[1] :] = 0, 0
    rows = select(stage, features, keys, lengths)
    assert rows.valid.shape[1] == stage.most_rows(frames, tokens)
    for row, length in enumerate(lengths):
        assert 0 < rows.valid[row].sum() <= stage.most_rows(length, tokens)
        assert_row(rows, row, *unicomp(stage, features[row, :length], keys[row, :length]))
        assert (np.diff(rows.places[row]) >= 0).all()  # as newlines in rows or frames need it
        assert rows.places[row].max() < frames * tokens


def test_made_up_clips_have_alike_frames_alike_tokens_and_shares_at_the_bound():
    long_groups = merged_tokens = bounded_shares = free_shares = short_frames = 0
    for seed in range(25):
        stage, frames, tokens = CASES["a quarter of 9 frames"]
        features, keys = clip(seed, frames, tokens)
        groups = grouped(features, stage.frame_threshold)
        fused = np.array([features[group].mean(0) for group in groups])
        budget = stage.most_rows(frames, tokens)
        shares = shared(fused, budget)
        bound = bound_of(budget, len(groups), tokens)
        kept = [thinned(x, keys[group[0]], 0.2) for group, x in zip(groups, fused, strict=True)]
        long_groups += sum(len(group) > 1 for group in groups)
        merged_tokens += sum(len(each) < tokens for each in kept)
        short_frames += sum(len(each) < share for each, share in zip(kept, shares, strict=True))
        bounded_shares += shares.count(bound)
        free_shares += sum(0 < share < bound for share in shares)
    counts = [long_groups, merged_tokens, bounded_shares, free_shares, short_frames]
    assert min(counts) > 10, counts


def test_a_still_background_with_one_odd_token_becomes_two_tokens():
    keys = np.tile(np.float32([1, 0, 2] + [0] * 13), (12, 1))
    keys[4] = np.eye(16)[1]
    features = keys.copy()
    features[7, 2] += 12  # seen by the mean of its 11 alike tokens, not by the keys
    # The fourth frame has twice the length and so the same direction: one group of four.
    features, keys = (np.stack([[x, x, x, 2 * x] + [x] * 5] * 2) for x in (features, keys))
    rows = select(UniComp(), features, keys, [4, 3])
    merged = np.zeros((2, 16))
    merged[0, :3] = [1, 0, 2 + 12 / 11 / 2]
    merged[1, 1] = 1
    assert_row(rows, 0, [0, 4], merged * 5 / 4)
    assert_row(rows, 1, [0, 4], merged)


def test_zero_vectors_are_like_each_other_and_like_nothing_else():
    stage, frames, tokens = CASES["all, other thresholds"]
    features = np.zeros((2, frames, tokens, 16), np.float32)
    features[0, 0] = np.eye(tokens, 16)
    features[0, 0, 1:3] = 0
    rows = select(stage, features, features, [1, 1])
    others = [0, 1, *range(3, tokens)]
    assert_row(rows, 0, others, features[0, 0, others])
    assert_row(rows, 1, [0], np.zeros((1, 16)))


def test_frames_that_take_turns_have_equal_shares():
    """The softmax of equal numbers shares 18 or 24 tokens: 3 a frame, in whatever order it adds."""
    features, keys = (each[[[0, 1] * 4 + [0]] * 2] for each in distinct(3, 2, 12))
    features[0, 6:], keys[0, 6:] = 0, 0
    features[1, 8:], keys[1, 8:] = 0, 0
    rows = select(UniComp(), features, keys, [6, 8])
    for row, frames in enumerate([6, 8]):
        kept = rows.places[row][rows.valid[row]].reshape(frames, 3)
        assert (kept // 12 == np.arange(frames)[:, None]).all()
        np.testing.assert_array_equal(kept[2:] - kept[:-2], 24)


def of_means(means):
    """Clips of unlike tokens, 12 in each of 9 frames, whose frames have these mean tokens."""
    features = np.repeat(np.float32(means)[:, None], 12, axis=1)
    keys = np.broadcast_to(np.eye(12, 16, dtype=np.float32), features.shape)
    return np.stack([features, features]), np.stack([keys, keys])


def test_a_drifting_frame_is_compared_with_the_first_of_its_group():
    """Steps of 5 degrees: two frames are within 0.005 (cos 5 = 0.996), three are not (0.985)."""
    angles = np.radians(5 * np.arange(9))
    means = np.zeros((9, 16))
    means[:, 0], means[:, 1] = np.cos(angles), np.sin(angles)
    rows = select(UniComp(), *of_means(means), [9, 6])
    for row, heads in enumerate([{0, 2, 4, 6, 8}, {0, 2, 4}]):
        assert set(rows.places[row][rows.valid[row]] // 12) == heads


def test_what_a_bounded_frame_cannot_take_goes_to_the_others_in_equal_parts():
    """27 tokens, of which the odd frame's part is 14.6, are bound to 2 * 27 / 9 = 6 a frame.

    The other parts are 1.55, of which 1 is left by rounding. 13 are left for 8 frames: 1 each, and
    then 5 for the first of these equal frames.
    """
    means = np.eye(9, 16, k=1)
    means[:8, 0] = 5  # cosine similarity 25 / 26 with each other, 0 with the last
    rows = select(UniComp(), *of_means(means))
    frames, counts = np.unique(rows.places[0] // 12, return_counts=True)
    assert rows.valid.all()
    assert frames.tolist() == [*range(9)]
    assert counts.tolist() == [3, 3, 3, 3, 3, 2, 2, 2, 6]


@pytest.mark.parametrize(
    ("budget", "frames", "tokens", "rows"),
    [
        (0.25, 32, 196, 1568),
        (0.1, 32, 196, 627),
        (0.29, 1, 100, 29),  # in floats 28.999999999999996
        (1, 7, 9, 63),
        (0.01, 1, 9, 1),
    ],
)
def test_budgets_are_exact_in_decimal_and_at_least_one(budget, frames, tokens, rows):
    assert UniComp(budget=budget).most_rows(frames, tokens) == rows


def test_the_whole_budget_is_spent_where_nothing_is_alike():
    features, keys = (np.stack([each, each]) for each in distinct(5, 9, 12))
    rows = select(UniComp(), features, keys, [9, 7])
    assert rows.valid.sum(1).tolist() == [27, 21]
    assert rows.valid.shape == (2, 27)


def test_what_is_alike_leaves_rows_empty():
    features, keys = (np.stack([each, each]) for each in clip(1, 9, 12))
    rows = select(UniComp(), features, keys)
    assert (rows.valid.sum(1) > 0).all()
    assert (rows.valid.sum(1) < 27).all()
    assert (rows.places[~rows.valid] == 9 * 12 - 1).all()


def test_what_goes_on_depends_on_the_clip_and_is_merged():
    clips = [clip(seed, 9, 12) for seed in (1, 2)]
    features, keys = (np.stack(each) for each in zip(*clips, strict=True))
    rows = select(UniComp(), features, keys)
    first, second = (set(rows.places[row][rows.valid[row]].tolist()) for row in (0, 1))
    assert first != second
    as_they_were = features[0].reshape(9 * 12, -1)[rows.places[0]]
    changed = np.abs(rows.embeds[0] - as_they_were).max(-1)[rows.valid[0]] > 1e-3
    assert changed.any()


@pytest.mark.parametrize("make", [clip, distinct], ids=["alike", "distinct"])
def test_a_row_is_the_same_in_every_batch(make):
    """To the last bit, at the number of tokens of a true model."""
    clips = [make(seed, 5, 196, 64) for seed in range(3)]
    features, keys = (np.stack(each) for each in zip(*clips, strict=True))
    lengths = [5, 3, 4]
    together = select(UniComp(), features, keys, lengths)
    for row, length in enumerate(lengths):
        one = slice(row, row + 1)
        alone = select(UniComp(), features[one], keys[one], [length])
        for of_batch, single in zip(together, alone, strict=True):
            np.testing.assert_array_equal(of_batch[one], single)


@pytest.mark.parametrize("empty", [0, np.nan], ids=["zeros", "nan"])
def test_empty_frames_change_nothing(empty):
    features, keys = clip(7, 13, 12)
    alone = select(UniComp(), features[None], keys[None])
    gap = ((0, 3), (0, 0), (0, 0))
    padded = (np.pad(each, gap, constant_values=empty)[None] for each in (features, keys))
    rows = select(UniComp(), *padded, frames=[13])
    count = alone.valid.sum()
    assert_row(rows, 0, alone.places[0, :count], alone.embeds[0, :count], atol=1e-6)


def test_a_row_without_a_clip_has_no_tokens():
    features, keys = (np.stack([each, 0 * each]) for each in clip(7, 9, 12))
    rows = select(UniComp(), features, keys, [9, 0])
    assert rows.valid[0].any()
    assert not rows.valid[1].any()


def test_nothing_is_compiled_anew_for_other_values(compilations):
    inputs = [[np.stack([each, each]) for each in clip(seed, 9, 12)] for seed in (1, 2, 3)]
    select(UniComp(), *inputs[0], frames=[9, 9])
    before = compilations()
    select(UniComp(), *inputs[1], frames=[9, 1])
    select(UniComp(), *inputs[2], frames=[4, 0])
    assert compilations() == before


def test_bfloat16_is_compared_in_float32():
    clips = (np.stack([each, each]) for each in clip(4, 9, 12))
    features, keys = (each.astype(ml_dtypes.bfloat16) for each in clips)
    rows = select(UniComp(), features, keys)
    wide = select(UniComp(), features.astype(np.float32), keys.astype(np.float32))
    np.testing.assert_array_equal(rows.places, wide.places)
    np.testing.assert_array_equal(rows.valid, wide.valid)
    assert rows.embeds.dtype == ml_dtypes.bfloat16
    np.testing.assert_array_equal(rows.embeds, wide.embeds.astype(ml_dtypes.bfloat16))


def test_it_is_a_token_stage_that_asks_for_keys():
    stage = UniComp()
    assert isinstance(stage, TokenStage)
    assert stage.signals == (Signal("keys"),)
    assert hash(stage) == hash(UniComp(budget=0.25))


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("budget", 0),
        ("budget", 1.5),
        ("budget", "0.25"),
        ("budget", float("nan")),
        ("frame_threshold", -0.1),
        ("frame_threshold", 2.1),
        ("token_threshold", 0),
        ("token_threshold", 2.1),
        ("token_threshold", True),
    ],
)
def test_settings_out_of_range_are_named(unchecked_types, setting, value):
    with pytest.raises(ConfigError, match=f"^UniComp: {setting} is .*; it must lie in [^\n]*$"):
        UniComp(**{setting: value})


def test_program_does_not_grow_with_frames_or_tokens():
    def operations(frames, tokens):
        features = jnp.zeros((2, frames, tokens, 4))
        jaxpr = jax.make_jaxpr(UniComp().select)(features, jnp.full(2, frames), (features,))
        return str(jaxpr).count(" = ")

    assert operations(5, 7) == operations(32, 48)
