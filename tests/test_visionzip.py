"""VisionZip against its steps written as loops."""

from decimal import Decimal

import jax
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dycoke_jax.compression.protocol import Signal, TokenStage
from dycoke_jax.compression.visionzip import VisionZip
from dycoke_jax.errors import ConfigError

PROGRAMS = {}


def select(stage, features, attention, keys, frames=None):
    """Compiled once for all tests of the same settings: compiling takes most of the time."""
    if stage not in PROGRAMS:
        PROGRAMS[stage] = jax.jit(stage.select)
    if frames is None:
        frames = [features.shape[1]] * len(features)
    rows = PROGRAMS[stage](features, np.asarray(frames, np.int32), (attention, keys))
    return jax.tree.map(np.asarray, rows)


def clips(seed, rows, frames, tokens, width=12, *, still=False):
    """Features, attention and keys of clips in which some tokens are the same, or all of them."""
    random = np.random.default_rng(seed)
    kinds = random.integers(0, 1 if still else tokens, (rows, frames, tokens))
    features = random.normal(size=(tokens, width))[kinds]
    keys = random.normal(size=(tokens, 6))[kinds]
    attention = random.integers(1, 2 if still else tokens, kinds.shape) / tokens
    return np.float32(features), np.float32(attention), np.float32(keys)


def of_frame(features, attention, keys, kept, share):
    """The kept tokens of a frame as (place, value)."""
    dominant = int(Decimal(str(share)) * kept)
    order = sorted(range(len(attention)), key=lambda token: -attention[token])
    rows = {token: features[token] for token in order[:dominant]}
    others = sorted(order[dominant:])
    if kept > dominant:
        step = len(others) // (kept - dominant)
        targets = others[::step][: kept - dominant]
        went = {target: [] for target in targets}
        for token in others:
            if token not in went:
                unit = keys[[token, *targets]]
                unit = unit / np.linalg.norm(unit, axis=1, keepdims=True)
                went[targets[int(np.argmax(np.round(unit[1:] @ unit[0], 9)))]].append(token)
        for target, merged in went.items():
            rows[target] = features[target]
            if merged:
                rows[target] = rows[target] + np.mean(features[merged], axis=0)
    return sorted(rows.items())


def visionzip(stage, features, attention, keys):
    """The steps of VisionZip on one clip: places [M] and embeddings [M, D]."""
    features, attention, keys = (np.float64(x) for x in (features, attention, keys))
    tokens, rows, spent = attention.shape[1], [], 0
    for frame in range(len(features)):
        budget = max(1, int(Decimal(str(stage.budget)) * (frame + 1) * tokens))
        kept, spent = budget - spent, budget
        of = of_frame(features[frame], attention[frame], keys[frame], kept, stage.dominant)
        rows += [(frame * tokens + token, value) for token, value in of]
    places, values = zip(*rows, strict=True)
    return np.array(places), np.array(values)


def assert_row(rows, index, places, embeds, atol=1e-5):
    """Row ``index`` holds these tokens first, and all that follow are empty."""
    count = len(places)
    np.testing.assert_array_equal(rows.valid[index], np.arange(rows.valid.shape[1]) < count)
    np.testing.assert_array_equal(rows.places[index, :count], places)
    np.testing.assert_allclose(rows.embeds[index, :count], embeds, rtol=0, atol=atol)


CASES = {
    "a quarter of 7 frames": (VisionZip(), 7, 25),
    "less than one token a frame": (VisionZip(0.05), 6, 9),
    "nine tenths": (VisionZip(0.9), 5, 16),
    "all": (VisionZip(1), 2, 16),
    "one frame": (VisionZip(0.3), 1, 25),
    "half of them dominant": (VisionZip(0.4, dominant=0.5), 3, 25),
    "none dominant": (VisionZip(0.4, dominant=0), 3, 16),
}


@given(case=st.sampled_from(sorted(CASES)), seed=st.integers(0, 10**6), still=st.booleans())
def test_rows_equal_the_steps_written_as_loops(case, seed, still):
    """The second clip of each batch is shorter, so that empty frames follow it."""
    stage, frames, tokens = CASES[case]
    features, attention, keys = clips(seed, 2, frames, tokens, still=still)
    lengths = [frames, max(1, frames - 2)]
    for of_clips in (features, attention, keys):
        of_clips[1, lengths[1] :] = 0
    rows = select(stage, features, attention, keys, lengths)
    assert rows.valid.shape[1] == stage.most_rows(frames, tokens)
    assert (np.diff(rows.places) >= 0).all()  # as newlines in rows or frames need it
    for row, length in enumerate(lengths):
        of_clip = (x[row, :length] for x in (features, attention, keys))
        places, embeds = visionzip(stage, *of_clip)
        assert len(places) == max(1, int(Decimal(str(stage.budget)) * length * tokens))
        assert_row(rows, row, places, embeds)


@pytest.mark.parametrize(("budget", "dominant"), [(50, 42), (20, 16)], ids=str)
def test_counts_are_those_of_the_published_port(budget, dominant):
    """Its settings are tokens of each frame, such as 50 or 20; here of 200."""
    features, attention, keys = np.random.default_rng(0).normal(size=(3, 1, 2, 200, 4))
    stage = VisionZip(budget / 200)
    rows = select(stage, *(np.float32(x) for x in (features, attention[..., 0], keys)))
    as_they_were = np.float32(features).reshape(400, 4)[rows.places[0]]
    unchanged = (rows.embeds[0] == as_they_were).all(1).reshape(2, budget).sum(1)
    assert unchanged.tolist() == [dominant, dominant]


def test_a_contextual_token_is_a_sum_of_two():
    """Of 16 alike tokens 4 go on, 3 of them dominant; the fourth is the target of the 12 others."""
    features = np.ones((1, 1, 16, 4), np.float32)
    attention = np.float32(np.arange(16)).reshape(1, 1, 16)
    rows = select(VisionZip(0.25), features, attention, features)
    assert rows.places.tolist() == [[0, 13, 14, 15]]
    assert rows.embeds[0, :, 0].tolist() == [2, 1, 1, 1]


def test_what_goes_on_depends_on_attention_and_what_is_merged_on_keys():
    features, attention, keys = clips(3, 2, 4, 25)
    rows = select(VisionZip(), features, attention, keys)
    other = select(VisionZip(), features, 1 - attention, keys)
    assert (rows.places != other.places).any()
    other = select(VisionZip(), features, attention, keys[..., ::-1].copy() ** 3)
    np.testing.assert_array_equal(rows.places, other.places)
    assert np.abs(rows.embeds - other.embeds).max() > 0.1


def test_a_row_is_the_same_in_every_batch():
    """At the number of tokens of a true model."""
    of_clips, lengths = clips(5, 3, 4, 196, 64), [4, 2, 3]
    together = select(VisionZip(0.15), *of_clips, lengths)
    for row, length in enumerate(lengths):
        one = slice(row, row + 1)
        alone = select(VisionZip(0.15), *(x[one] for x in of_clips), [length])
        np.testing.assert_array_equal(together.places[one], alone.places)
        np.testing.assert_array_equal(together.valid[one], alone.valid)
        np.testing.assert_allclose(together.embeds[one], alone.embeds, rtol=0, atol=1e-6)


def test_a_row_without_a_clip_has_no_tokens():
    rows = select(VisionZip(), *clips(7, 2, 7, 25), [7, 0])
    assert rows.valid.any(1).tolist() == [True, False]


def test_nothing_is_compiled_anew_for_other_values(compilations):
    select(VisionZip(), *clips(8, 2, 7, 25))
    before = compilations()
    select(VisionZip(), *clips(9, 2, 7, 25), [3, 0])
    assert compilations() == before


def test_bfloat16_is_compared_in_float32():
    features, attention, keys = clips(4, 2, 7, 25)
    half = [x.astype(ml_dtypes.bfloat16) for x in (features, keys)]
    rows = select(VisionZip(), half[0], attention, half[1])
    wide = select(VisionZip(), *(x.astype(np.float32) for x in (half[0], attention, half[1])))
    np.testing.assert_array_equal(rows.places, wide.places)
    assert rows.embeds.dtype == ml_dtypes.bfloat16
    np.testing.assert_array_equal(rows.embeds, wide.embeds.astype(ml_dtypes.bfloat16))


def test_it_is_a_token_stage_that_asks_for_attention_and_keys():
    assert isinstance(VisionZip(), TokenStage)
    assert VisionZip().signals == (Signal("attention"), Signal("mean_keys"))
    assert hash(VisionZip()) == hash(VisionZip(budget=0.25))


@pytest.mark.parametrize(
    ("setting", "value", "allowed"),
    [
        ("budget", 0, "(0, 1]"),
        ("budget", 1.1, "(0, 1]"),
        ("budget", "0.25", "(0, 1]"),
        ("dominant", 1, "[0, 1)"),
        ("dominant", -0.1, "[0, 1)"),
    ],
)
def test_settings_out_of_range_are_named(unchecked_types, setting, value, allowed):
    with pytest.raises(ConfigError) as caught:
        VisionZip(**{setting: value})
    assert str(caught.value).startswith(f"VisionZip: {setting} is ")
    assert str(caught.value).endswith(f"it must lie in {allowed}")
