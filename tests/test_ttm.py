"""Temporal token merging: the authors' results, the paper's text, and every odd clip length."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.reference import cosine, paper_merge

from dycoke_jax import DyCoke
from dycoke_jax.compression.ttm import similarity_map

ONE_CLIP_CASES = range(9)


def clip(seed, frames, tokens=9, width=16, batch=None):
    shape = (frames, tokens, width) if batch is None else (batch, frames, tokens, width)
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def merged(features, **settings):
    """Compiled, as in use: a compiler may sum in another order than single operations do."""
    return padded(features, [features.shape[1]] * len(features), **settings)


def padded(features, frames, **settings):
    """The places that are kept of each clip, which has so many frames; the others are empty."""
    stage = DyCoke(**settings).stages.tokens
    rows = jax.jit(stage.select)(jnp.asarray(features), jnp.asarray(frames, jnp.int32))
    assert rows.embeds is None
    assert rows.places.shape == (len(features), stage.most_rows(*features.shape[1:3]))
    kept = [np.asarray(p)[np.asarray(v)] for p, v in zip(rows.places, rows.valid, strict=True)]
    same = len({len(row) for row in kept}) == 1
    return np.stack(kept) if same else kept


@pytest.mark.parametrize("case", ONE_CLIP_CASES)
def test_official_equals_the_authors_code(golden, case):
    data = np.load(golden / "ttm_official.npz")
    meta = json.loads(str(data["meta"]))[case]
    features = data[f"in{case}"]
    shape = (1, meta["frames"], meta["tokens_per_frame"], meta["dim"])
    index = merged(features.reshape(shape), k=meta["k"], mode="official")[0]
    np.testing.assert_array_equal(index, data[f"idx{case}"])
    np.testing.assert_array_equal(features[index], data[f"out{case}"])


@given(
    frames=st.integers(1, 14),
    tokens=st.integers(1, 30),
    batch=st.integers(1, 3),
    k=st.sampled_from([0.1, 0.3, 0.5, 0.7, 0.9, 0.95]),
    seed=st.integers(0, 1000),
)
def test_paper_equals_the_text_of_the_paper(frames, tokens, batch, k, seed):
    features = clip(seed, frames, tokens, batch=batch)
    index = merged(features, k=k)
    for row in range(batch):
        np.testing.assert_array_equal(index[row], paper_merge(features[row], k))


@pytest.mark.parametrize("mode", ["paper", "official"])
@pytest.mark.parametrize("lengths", [(5, 6, 7, 8), (9, 11, 13, 14, 16)], ids=["8", "16"])
def test_empty_frames_change_nothing(mode, lengths):
    """Clips of several lengths in one batch keep what each keeps alone."""
    features = clip(7, lengths[-1], 7, batch=len(lengths))
    for row, length in enumerate(lengths):
        features[row, length:] = 0
    together = padded(features, lengths, k=0.6, mode=mode)
    for row, length in enumerate(lengths):
        alone = merged(features[row : row + 1, :length], k=0.6, mode=mode)[0]
        np.testing.assert_array_equal(together[row], alone)


def test_similarity_map_is_what_merging_decides_by():
    features = clip(3, 7, 5, batch=1)
    alike = np.asarray(similarity_map(jnp.asarray(features)))[0]
    others = {1: 0, 2: 0, 3: 2, 5: 4, 6: 4}
    assert np.flatnonzero(np.isnan(alike).all(1)).tolist() == [0, 4]
    for frame, other in others.items():
        wanted = [
            cosine(*pair) for pair in zip(features[0, frame], features[0, other], strict=True)
        ]
        np.testing.assert_allclose(alike[frame], wanted, atol=1e-6)


@pytest.mark.parametrize(
    ("frames", "k", "kept"),
    [
        (8, 0.3, 1273), (8, 0.5, 1078), (8, 0.7, 878),
        (16, 0.3, 2487), (16, 0.5, 2058), (16, 0.7, 1618),
        (32, 0.3, 4915), (32, 0.5, 4018), (32, 0.7, 3098),
        (64, 0.3, 9771), (64, 0.5, 7938), (64, 0.7, 6058),
        (6, 0.3, 940), (6, 0.5, 784), (6, 0.7, 624),
        (33, 0.3, 4856), (33, 0.5, 3920), (33, 0.7, 2960),
    ],
)  # fmt: skip
def test_official_counts_are_the_published_ones(frames, k, kept):
    assert merged(clip(0, frames, 196, 4, batch=1), k=k, mode="official").shape == (1, kept)


@pytest.mark.parametrize(
    ("frames", "k", "kept"),
    [(32, 0.7, 2960), (32, 0.3, 4856), (1, 0.7, 196), (2, 0.7, 254), (3, 0.7, 312), (5, 0.7, 566)],
)
def test_paper_counts_lose_no_frame(frames, k, kept):
    index = merged(clip(0, frames, 196, 4, batch=1), k=k)
    assert index.shape == (1, kept)
    assert set(index[0] // 196) == set(range(frames))


@pytest.mark.parametrize("batch", [1, 2, 4])
@pytest.mark.parametrize(("tokens", "width"), [(30, 1152), (196, 896), (58, 64), (64, 16)])
def test_identical_frames_keep_the_first_tokens_by_index(batch, tokens, width):
    """A short clip repeats frames; rounding must not decide which of equal tokens stay."""
    still = np.repeat(clip(3, 1, tokens, width, batch=batch), 4, axis=1)
    kept = int(tokens * 0.3 + 1e-9)
    expected = [*range(tokens)]
    for frame in (1, 2, 3):
        expected += range(frame * tokens, frame * tokens + kept)
    for row in merged(still, k=0.7):
        np.testing.assert_array_equal(row, expected)


def test_zero_vectors_are_unlike_everything():
    features = clip(1, 2, 10)
    features[1, 4] = 0
    features[1, [0, 1, 2, 3, 5, 6, 7, 8, 9]] = features[0, [0, 1, 2, 3, 5, 6, 7, 8, 9]]
    assert merged(features[None], k=0.9)[0].tolist() == [*range(10), 14]


def test_rows_of_a_batch_do_not_mix():
    features = clip(5, 7, 20, batch=3)
    together = merged(features, k=0.6)
    for row in range(3):
        np.testing.assert_array_equal(together[row], merged(features[row : row + 1], k=0.6)[0])


def test_shares_are_exact_in_decimal():
    """(1 - 0.9) * 20 is 2; in floats it is 1.9999999999999996, which would keep one token."""
    assert merged(clip(0, 2, 20, batch=1), k=0.9).shape == (1, 22)


def test_bfloat16_features_are_compared_in_float32():
    features = jnp.asarray(clip(9, 4, 50, batch=1), jnp.bfloat16)
    np.testing.assert_array_equal(
        merged(features, k=0.5), merged(np.asarray(features, np.float32), k=0.5)
    )


def test_program_does_not_grow_with_frames():
    """No Python loop over frames: the number of operations is the same for any clip."""

    def operations(frames):
        features, count = jnp.zeros((2, frames, 9, 4)), jnp.full(2, frames)
        return len(jax.make_jaxpr(DyCoke().stages.tokens.select)(features, count).eqns)

    assert operations(8) == operations(64)
