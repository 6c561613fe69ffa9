"""Ranks and exact counts against trimming and filling one by one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dycoke_jax.compression.ranking import exact_k, rank_in_row

CANDIDATES = 11
choose = jax.jit(exact_k, static_argnums=3)


def trimmed_or_filled(scores, in_mask, k):
    """Takes the worst out of the mask, or the best of the others in, one after the other."""
    chosen = {index for index, inside in enumerate(in_mask) if inside}
    while len(chosen) > k:
        chosen.remove(min(chosen, key=lambda index: (scores[index], -index)))
    while len(chosen) < k:
        others = set(range(len(scores))) - chosen
        chosen.add(max(others, key=lambda index: (scores[index], -index)))
    return sorted(chosen)


@given(seed=st.integers(0, 10**6))
def test_exactly_k_are_chosen_as_by_trimming_and_filling(seed):
    """Scores are of few values, so that ties are everywhere; one of them is minus infinity."""
    random = np.random.default_rng(seed)
    scores = np.float32(random.choice([-np.inf, -1.5, -0.0, 0.0, 0.25, 2], (4, CANDIDATES)))
    in_mask = random.random((4, CANDIDATES)) < random.random((4, 1))
    k = np.int32(random.integers(0, 9, 4))
    rows = choose(scores, in_mask, k, 8)
    assert rows.places.shape == rows.valid.shape == (4, 8)
    for row in range(4):
        wanted = trimmed_or_filled(scores[row], in_mask[row], k[row])
        np.testing.assert_array_equal(rows.valid[row], np.arange(8) < k[row])
        np.testing.assert_array_equal(rows.places[row, : k[row]], wanted)
        assert (np.asarray(rows.places[row, k[row] :]) == CANDIDATES - 1).all()


@pytest.mark.parametrize("shape", [(9,), (3, 9), (2, 3, 9)], ids=str)
def test_ranks_count_from_the_highest_score_and_the_lower_index_is_first(shape):
    scores = np.float32(np.random.default_rng(0).integers(-2, 3, shape))
    ranks = np.asarray(rank_in_row(jnp.asarray(scores))).reshape(-1, 9)
    for row, rank in zip(scores.reshape(-1, 9), ranks, strict=True):
        wanted = sorted(range(9), key=lambda index: (-row[index], index))
        assert np.argsort(rank).tolist() == wanted
