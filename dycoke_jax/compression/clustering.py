"""Clustering tokens by density peaks."""

from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from dycoke_jax.compression.ranking import rank_in_row
from dycoke_jax.compression.similarity import ROUNDING, equal_pairs


class Clusters(NamedTuple):
    """Tokens in clusters, each around one of them."""

    is_centre: Bool[Array, "tokens"]
    centre: Int[Array, "tokens"]
    """The centre of the cluster of each token, int32; of a centre itself. What stands at tokens
    that are no candidates has no meaning."""


def density_peaks(
    vectors: Float[Array, "tokens channels"],
    candidates: Bool[Array, "tokens"],
    count: Int[Array, ""],
    neighbours: int,
) -> Clusters:
    """Clusters tokens around density peaks (DPC-kNN: Rodriguez and Laio 2014; Du et al. 2016).

    The distance of two tokens is that of their vectors, divided by the root of the number of
    channels. The density of a token is exp(-m), where m is the mean of the squared distances to the
    nearest tokens, itself among them. The centres are the tokens with the highest product of
    density and distance to the nearest token of higher density; for the densest one this is the
    largest distance of all. Every other token belongs to the nearest centre.

    Published code adds random numbers to densities, because those of two tokens that are each
    other's nearest are often equal. Here of equal densities the lower index is the higher one, and
    of equal products, or equally near centres, the lower index is taken.

    Args:
        vectors: a vector for each token, of any float dtype; distances are in float32.
        candidates: tokens that are clustered; the others are as if they were not there.
        count: number of centres, 0 up to the number of candidates.
        neighbours: number of nearest tokens (k), at most ``count`` of them.
    """
    channels, index = vectors.shape[-1], jnp.arange(len(vectors))
    pairs = candidates[:, None] & candidates
    squared, same = _squared_distances(vectors, pairs)

    nearest, _ = lax.top_k(jnp.where(pairs, -squared, -jnp.inf), min(neighbours, len(vectors)))
    used = jnp.arange(nearest.shape[-1]) < jnp.minimum(count, neighbours)
    nearest = jnp.where(used, nearest, 0).sum(-1)
    log_density = (nearest / (jnp.clip(count, 1, neighbours) * channels))[same]
    is_denser = (log_density > log_density[:, None]) | (
        (log_density == log_density[:, None]) & (index < index[:, None])
    )
    largest = jnp.where(pairs, squared, 0).max()
    to_denser = jnp.where(pairs & is_denser, squared, largest).min(-1)

    # The logarithm of the product, whose density may be too small for float32.
    score = log_density + jnp.log(to_denser / channels) / 2
    score = jnp.maximum(score, jnp.finfo(jnp.float32).min)
    is_centre = rank_in_row(jnp.where(candidates, score, -jnp.inf)) < count
    nearest_centre = jnp.argmin(jnp.where(is_centre, squared, jnp.inf), axis=-1)
    # Of identical tokens the first is a centre if any is.
    centre = jnp.where(is_centre, index, same[nearest_centre])
    return Clusters(is_centre, centre.astype(jnp.int32))


def _squared_distances(
    vectors: Float[Array, "tokens channels"], pairs: Bool[Array, "tokens tokens"]
) -> tuple[Float[Array, "tokens tokens"], Int[Array, "tokens"]]:
    """Squared distances in float32, and for each token the first that is the same.

    They are symmetric, and 0 between tokens that are the same, to the last bit: rounding does not
    choose among the tokens of a still clip.

    Args:
        vectors: the vectors.
        pairs: pairs of candidates; the distances of others have no meaning.
    """
    products = jnp.matmul(
        vectors, vectors.T, precision="highest", preferred_element_type=jnp.float32
    )
    norms = jnp.diagonal(products)
    both = norms[:, None] + norms
    squared = jnp.maximum(both - (products + products.T), 0)
    equal = pairs & equal_pairs(vectors, squared <= ROUNDING * both)
    return jnp.where(equal, 0, squared), jnp.argmax(equal, axis=-1)
