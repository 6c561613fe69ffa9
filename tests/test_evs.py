"""EVS and its threshold against loops in NumPy, and what a token stage must hold to."""

import itertools
from fractions import Fraction

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dycoke_jax.compression.evs import EVS
from dycoke_jax.compression.protocol import TokenStage
from dycoke_jax.errors import ConfigError

PROGRAMS = {}
STAGES = {
    "evs": EVS(),
    "less than a frame": EVS(0.05),
    "nine tenths": EVS(0.9),
    "all": EVS(1),
    "less than a token a frame": EVS(0.05, "budget"),
    "share of the first frame": EVS(0.25, "budget"),
    "dtd within a budget": EVS(0.3, max_similarity=0.95),
    "dtd and a share of the first frame": EVS(0.9, "budget", 0.95),
}


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
    """A clip of which parts stay as they are, some change a little, and some frames repeat."""
    random = np.random.default_rng(seed)
    made = [random.normal(size=(tokens, width))]
    while len(made) < frames:
        change = random.choice([0, 0, 0.1, 1], (tokens, 1)) * (random.random() < 0.8)
        made.append(made[-1] + change * random.normal(size=(tokens, width)))
    return np.float32(made)


def spread_evenly(tokens, count):
    """The places whose multiples of the golden ratio have the smallest fractional parts."""
    ratio = Fraction(6557470319842, 10610209857723)  # successive Fibonacci numbers
    return sorted(range(tokens), key=lambda place: place * ratio % 1)[:count]


def evs(stage, features):
    """The places that go on of one clip, by one token at a time."""
    features = features.astype(np.float64)
    frames, tokens, _ = features.shape

    def budget_of(count):
        return max(1, int(Fraction(str(stage.budget)) * count))

    budget = budget_of(frames * tokens)
    own = min(tokens if stage.first_frame == "whole" else budget_of(tokens), budget)
    similar = {}
    for frame, token in itertools.product(range(1, frames), range(tokens)):
        a, b = features[frame, token], features[frame - 1, token]
        same = np.array_equal(a, b)
        cosine = 1.0 if same else a @ b / (np.linalg.norm(a) * np.linalg.norm(b))
        if cosine <= stage.max_similarity:
            similar[frame * tokens + token] = cosine
    changed = sorted(similar, key=lambda place: (similar[place], place))
    return sorted(spread_evenly(tokens, own) + changed[: budget - own])


@pytest.mark.parametrize("stage", STAGES.values(), ids=STAGES.keys())
@settings(max_examples=8)
@given(seed=st.integers(0, 10**6))
def test_rows_equal_the_steps_written_as_loops(stage, seed):
    lengths = [7, 5, 1, 2]
    features = np.zeros((4, 7, 12, 16), np.float32)
    for row, length in enumerate(lengths):
        features[row, :length] = clip(seed + row, length)
    rows = select(stage, features, lengths)
    assert rows.places.shape == rows.valid.shape == (4, stage.most_rows(7, 12))
    assert rows.embeds is None
    for row, length in enumerate(lengths):
        wanted = evs(stage, features[row, :length])
        assert kept(rows, row) == wanted
        assert (np.diff(rows.places[row]) >= 0).all()  # as newlines in rows or frames need it
        assert len(wanted) <= stage.most_rows(length, 12)
        assert stage.max_similarity < 1 or len(wanted) == stage.most_rows(length, 12)


def test_a_threshold_leaves_some_clips_below_the_budget_and_others_not():
    stage = STAGES["dtd within a budget"]
    counts = [len(kept(select(stage, np.stack([clip(seed, 7)] * 4)))) for seed in range(20)]
    assert min(counts) < stage.most_rows(7, 12) == max(counts)


@pytest.mark.parametrize(
    ("budget", "frames", "tokens", "rows"),
    [
        (0.25, 32, 196, 1568),
        (0.15, 32, 196, 940),
        (0.1, 32, 196, 627),
        (0.25, 64, 169, 2704),
        (0.29, 1, 100, 29),  # in floats 28.999999999999996
        (0.05, 8, 16, 6),
        (0.01, 1, 9, 1),
        (1, 7, 9, 63),
    ],
)
def test_budgets_are_exact_in_decimal_and_at_least_one(budget, frames, tokens, rows):
    assert EVS(budget).most_rows(frames, tokens) == rows


def test_a_still_clip_goes_on_from_its_beginning():
    """All similarities are equal: after the first frame, the lowest places."""
    features = np.repeat(clip(0, 1), 8, axis=0)[None]
    assert kept(select(EVS(0.25), features)) == [*range(24)]
    own = spread_evenly(12, 3)
    assert kept(select(EVS(0.25, "budget"), features)) == sorted([*own, *range(12, 33)])


def test_a_still_clip_leaves_rows_empty_if_what_stays_the_same_is_dropped():
    features = np.repeat(clip(0, 1), 8, axis=0)[None]
    rows = select(EVS(0.25, max_similarity=0.99), features)
    assert kept(rows) == [*range(12)]
    assert rows.places.shape == (1, 24)
    assert (rows.places[~rows.valid] == 8 * 12 - 1).all()


def test_the_first_frame_takes_its_share_or_all_that_it_can():
    """Of 8 frames of 12 tokens; at a tenth, 9 tokens are less than a frame."""
    features = clip(3, 8)[None]
    for budget, whole, share in [(0.1, 9, 1), (0.25, 12, 3), (1, 12, 12)]:
        of_first = [
            sum(place < 12 for place in kept(select(EVS(budget, first_frame), features)))
            for first_frame in ("whole", "budget")
        ]
        assert of_first == [whole, share]


@pytest.mark.parametrize("side", [4, 13, 14])
def test_the_tokens_of_the_first_frame_lie_in_all_parts_of_it(side):
    """A quarter of a frame is more than some of its rows, columns or halves."""
    places = np.array(kept(select(EVS(0.25), np.ones((1, 1, side * side, 2), np.float32))))
    assert len(places) == side * side // 4
    for axis in np.divmod(places, side):
        assert len(set(axis)) > side / 2
        assert set(axis * 2 // side) == {0, 1}


def test_lengths_of_vectors_change_nothing():
    features = clip(5, 7)[None]
    longer = features * np.float32(2.0) ** np.arange(-3, 4)[:, None, None]
    assert kept(select(EVS(0.5), features)) == kept(select(EVS(0.5), longer))


@pytest.mark.parametrize("first_frame", ["whole", "budget"])
def test_a_row_is_the_same_in_every_batch_and_empty_frames_change_nothing(first_frame):
    """At the number of tokens of a true model; the empty frames hold NaN."""
    stage, lengths = EVS(0.25, first_frame), [5, 3, 4]
    features = np.stack([clip(seed, 5, 196, 64) for seed in range(3)])
    for row, length in enumerate(lengths):
        features[row, length:] = np.nan
    together = select(stage, features, lengths)
    for row, length in enumerate(lengths):
        alone = select(stage, features[row : row + 1, :length])
        assert alone.valid.all()
        assert kept(together, row) == kept(alone)


def test_a_row_without_a_clip_has_no_tokens():
    rows = select(EVS(0.25), np.stack([clip(1, 7)] * 2), [7, 0])
    assert rows.valid.sum(1).tolist() == [21, 0]


def test_nothing_is_compiled_anew_for_other_values(compilations):
    stage = EVS(0.35, max_similarity=0.8)
    select(stage, np.stack([clip(1, 7)] * 2), [7, 7])
    before = compilations()
    select(stage, np.stack([clip(2, 7)] * 2), [7, 1])
    select(stage, np.stack([clip(3, 7)] * 2), [4, 0])
    assert compilations() == before


def test_bfloat16_is_compared_in_float32():
    features = clip(4, 7)[None].astype(ml_dtypes.bfloat16)
    wide = select(EVS(0.5), features.astype(np.float32))
    assert kept(select(EVS(0.5), features)) == kept(wide)


def test_it_is_a_token_stage_that_asks_for_nothing():
    assert isinstance(EVS(), TokenStage)
    assert EVS().signals == ()
    assert hash(EVS()) == hash(EVS(budget=0.25))


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("budget", 0),
        ("budget", 1.5),
        ("budget", "0.25"),
        ("budget", float("nan")),
        ("first_frame", "half"),
        ("first_frame", None),
        ("max_similarity", -1.1),
        ("max_similarity", 1.1),
        ("max_similarity", True),
    ],
)
def test_settings_out_of_range_are_named(unchecked_types, setting, value):
    allowed = "whole or budget" if setting == "first_frame" else r"lie in [(\[]-?\d, 1\]"
    with pytest.raises(ConfigError, match=f"^EVS: {setting} is .*; it must (be )?{allowed}$"):
        EVS(**{setting: value})


def test_program_does_not_grow_with_frames_or_tokens():
    def operations(frames, tokens):
        jaxpr = jax.make_jaxpr(EVS().select)(
            jnp.zeros((2, frames, tokens, 4)), jnp.full(2, frames, jnp.int32)
        )
        return str(jaxpr).count(" = ")

    assert operations(5, 7) == operations(32, 48)
