"""Choosing tokens: the same candidates as transformers, and reproducible draws."""

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from dycoke_jax.generation.sampling import Sampling, _allowed, sample


def settings(temperature, top_k=0, top_p=1.0, seed=0, rows=1):
    return Sampling(
        jnp.full(rows, temperature, jnp.float32),
        jnp.full(rows, top_k, jnp.int32),
        jnp.full(rows, top_p, jnp.float32),
        jnp.full(rows, seed, jnp.int32),
    )


@given(
    seed=st.integers(0, 1000),
    size=st.integers(2, 50),
    temperature=st.floats(0.2, 3),
    top_k=st.integers(0, 60),
    top_p=st.floats(0.05, 1),
)
def test_candidates_are_those_of_transformers(seed, size, temperature, top_k, top_p):
    scores = np.random.default_rng(seed).normal(size=(2, size)).astype(np.float32) * 2
    wanted = TemperatureLogitsWarper(temperature)(None, torch.from_numpy(scores))
    if top_k:
        wanted = TopKLogitsWarper(top_k)(None, wanted)
    if top_p < 1:
        wanted = TopPLogitsWarper(top_p)(None, wanted)
    chosen = settings(temperature, top_k, top_p, rows=2)
    scaled = jnp.asarray(scores) / chosen.temperature[:, None]
    allowed = np.asarray(_allowed(scaled, chosen.top_k, chosen.top_p))
    wanted = torch.isfinite(wanted).numpy()
    # The last candidate of top-p hangs on the rounding of a sum: only it may differ, and only if
    # the sum is that close.
    for row in range(2):
        order = np.argsort(-scores[row])
        differing = np.flatnonzero(allowed[row] != wanted[row])
        assert len(differing) <= 1
        if len(differing):
            p = np.exp(np.where(wanted[row] | allowed[row], scaled[row], -np.inf), dtype=np.float64)
            k = top_k or size
            p = np.exp(np.sort(np.asarray(scaled[row], np.float64))[::-1][:k])
            cumulative = np.cumsum(p / p.sum())
            rank = int(np.flatnonzero(order == differing[0])[0])
            assert abs(cumulative[rank - 1] - top_p) < 1e-5


def test_a_large_vocabulary_has_the_candidates_of_transformers():
    scores = np.random.default_rng(3).normal(size=(4, 5000)).astype(np.float32) * 3
    scores[1, ::7] = scores[1, 0]  # equal scores
    scores[2] = -np.abs(scores[2])
    scores[3, 100:] = -np.inf
    wanted = TopPLogitsWarper(0.9)(None, TopKLogitsWarper(50)(None, torch.from_numpy(scores)))
    allowed = _allowed(jnp.asarray(scores), jnp.full(4, 50), jnp.full(4, 0.9))
    several = np.isfinite(scores) & (scores >= np.sort(scores)[:, [-50]])
    for row in (0, 2, 3):
        np.testing.assert_array_equal(allowed[row], torch.isfinite(wanted[row]))
    assert not np.any(np.asarray(allowed) & ~several)
    # Of equal scores transformers takes some, and we take all or none.
    assert np.asarray(allowed)[1, ::7].all() or not np.asarray(allowed)[1, ::7].any()


@pytest.mark.parametrize(
    ("k", "p", "wanted"), [(2, 1.0, 2), (0, 0.05, 1), (0, 1.0, 6), (5, 0.8, 2)]
)
def test_candidates_of_known_probabilities(k, p, wanted):
    scores = jnp.log(jnp.array([[0.05, 0.5, 0.1, 0.3, 0.03, 0.02]]))
    allowed = _allowed(scores, jnp.array([k]), jnp.array([p]))
    assert int(allowed.sum()) == wanted


def test_temperature_zero_is_greedy_even_beside_a_row_that_draws():
    scores = jnp.asarray(np.random.default_rng(0).normal(size=(2, 40)), jnp.float32)
    mixed = Sampling(
        jnp.array([0.0, 5.0]), jnp.zeros(2, jnp.int32), jnp.ones(2), jnp.zeros(2, jnp.int32)
    )
    assert int(sample(scores, mixed, jnp.int32(0))[0]) == int(scores[0].argmax())


def test_draws_follow_the_probabilities():
    scores = jnp.log(jnp.array([[0.5, 0.3, 0.15, 0.05]]))
    many = settings(1.0, rows=2000)._replace(seed=jnp.arange(2000))
    drawn = sample(jnp.tile(scores, (2000, 1)), many, jnp.int32(3))
    shares = np.bincount(drawn, minlength=4) / 2000
    np.testing.assert_allclose(shares, [0.5, 0.3, 0.15, 0.05], atol=0.04)


def test_a_row_draws_the_same_in_any_batch():
    scores = jnp.asarray(np.random.default_rng(1).normal(size=(3, 40)), jnp.float32)
    together = Sampling(
        jnp.full(3, 1.5), jnp.array([0, 5, 0]), jnp.array([1.0, 1.0, 0.8]), jnp.array([7, 8, 9])
    )
    rows = sample(scores, together, jnp.int32(2))
    for row in range(3):
        alone = Sampling(*(values[row : row + 1] for values in together))
        assert int(sample(scores[row : row + 1], alone, jnp.int32(2))[0]) == int(rows[row])


@pytest.mark.parametrize("change", [{"seed": 1}, {"index": 1}])
def test_seed_and_position_change_the_draw(change):
    scores = jnp.zeros((1, 1000))
    base = int(sample(scores, settings(1.0, seed=0), jnp.int32(0))[0])
    other = int(
        sample(
            scores, settings(1.0, seed=change.get("seed", 0)), jnp.int32(change.get("index", 0))
        )[0]
    )
    assert base != other
