"""Token dropping with the number of kept tokens and the way of choosing them drawn for each clip.

A model that has practised one way of dropping tokens, with one number of them, is good at that one
only, and then a comparison of methods measures what the model has practised. So each clip of each
training step draws both here. Apart from temporal token merging, the method of the package, the
ways are simple stand-ins for what methods do: random tokens with more in some frames than in
others, tokens that change, and kept rows that are means of several tokens.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from dycoke_jax.compression.protocol import Rows
from dycoke_jax.compression.ranking import exact_k, rank_in_row
from dycoke_jax.compression.ttm import similarity_map

_LEAST_SHARE = 0.05
"""Least share of the tokens that is kept; its logarithm is drawn uniformly."""
_ALL = 0.15
"""Share of the clips that keep as many tokens as there is room for."""
_MERGING, _RANDOM = 0.4, 0.3
"""Shares of the clips that drop tokens by temporal token merging, and that keep random tokens. The
others keep the tokens that change most."""
_LEAST_K, _GREATEST_K = 0.1, 0.9
"""Range of the K of temporal token merging."""
_OVER_TIME, _IN_FRAME = 0.25, 0.25
"""Shares of the clips in which a dropped token is averaged into the last token kept at its place,
and into the most similar token kept of its frame."""


@dataclass(frozen=True)
class DrawnBudgets:
    """Token dropping that is drawn for each clip; a ``training.token_dropping.TokenSelection``.

    Attributes:
        most: number of rows that the language model reads at most, at least 1. A clip of more
            visual tokens never keeps all of them.
    """

    most: int = 256

    def choose(self, step: int, seed: int) -> "DrawnBudgets":
        """The selection of a step, which is the same for all."""
        return self

    def select(
        self, features: Float[Array, "B F N D"], frames: Int[Array, "B"], key: Array | None
    ) -> Rows:
        """Draws for each clip how many tokens are kept and which; needs a key."""
        assert key is not None
        batch, length, tokens, width = features.shape
        of_order, of_means = jax.random.split(key)
        order, count = jax.vmap(_draw_order)(
            1 - similarity_map(features), frames, jax.random.split(of_order, batch)
        )
        order = order.reshape(batch, -1)
        rows = exact_k(order, order >= 0, count, min(self.most, length * tokens))
        kept = jnp.zeros_like(order, bool).at[jnp.arange(batch)[:, None], rows.places]
        assert rows.valid is not None
        is_kept = kept.max(rows.valid).reshape(batch, length, tokens)
        means = jax.vmap(_draw_means)(features, is_kept, jax.random.split(of_means, batch))
        embeds = jnp.take_along_axis(
            means.reshape(batch, -1, width), rows.places[:, :, None], axis=1
        )
        return rows._replace(embeds=embeds)


def _draw_order(
    distances: Float[Array, "F N"], frames: Int[Array, ""], key: Array
) -> tuple[Float[Array, "F N"], Int[Array, ""]]:
    """Draws a score of each token, and how many of the tokens with the highest scores are kept.

    Args:
        distances: 1 - similarity of each token and the one that it is compared with in temporal
            token merging; NaN in the frames that are compared with none.
        frames: number of frames of the clip.
        key: random key.

    Returns:
        Scores of at least 0, and -1 in empty frames; and the number of kept tokens.
    """
    length, tokens = distances.shape
    of_way, of_share, of_all, of_k, of_weight, of_frames, of_tokens = jax.random.split(key, 7)
    # With weight 1 whole frames are kept, and with weight 0 no frame has more than its share.
    weight = jnp.clip(jax.random.uniform(of_weight, minval=-0.5, maxval=1.2), 0, 1)
    by_token = jax.random.uniform(of_tokens, (length, tokens))
    uneven = weight * jax.random.uniform(of_frames, (length, 1)) + (1 - weight) * by_token

    is_whole = jnp.isnan(distances)
    change = jnp.where(is_whole, 0.3 * by_token, distances) + 0.1 * weight * by_token
    change = change.at[0].add(3.0)

    least = jnp.log(_LEAST_SHARE)
    share = jnp.exp(jax.random.uniform(of_share, minval=least, maxval=0.0))
    share = jnp.where(jax.random.uniform(of_all) < _ALL, 1.0, share)
    count = jnp.maximum(1, jnp.round(share * frames * tokens)).astype(jnp.int32)

    # Temporal token merging keeps the frames that are compared with none, and of each other frame
    # as many tokens of the lowest similarity.
    k = jax.random.uniform(of_k, minval=_LEAST_K, maxval=_GREATEST_K)
    of_frame = jnp.round((1 - k) * tokens).astype(jnp.int32)
    ranks = rank_in_row(jnp.nan_to_num(distances))
    merging = jnp.where(is_whole | (ranks < of_frame), 1.0, 0.0)
    is_there = jnp.arange(length)[:, None] < frames
    merged = ((merging > 0) & is_there).sum(dtype=jnp.int32)

    way = jax.random.uniform(of_way)
    scores = jnp.where(way < _MERGING, merging, jnp.where(way < _MERGING + _RANDOM, uneven, change))
    count = jnp.where((way < _MERGING) & (share < 1), merged, count)
    return jnp.where(is_there, scores, -1.0), jnp.minimum(count, frames * tokens)


def _draw_means(
    features: Float[Array, "F N D"], kept: Bool[Array, "F N"], key: Array
) -> Float[Array, "F N D"]:
    """Draws whether kept tokens become means that include dropped ones, and computes them."""
    length, tokens, _ = features.shape
    numbers = jnp.arange(length)[:, None]
    last = jax.lax.cummax(jnp.where(kept, numbers, -1), axis=0)
    over_time = jax.nn.one_hot(last, length, axis=0)  # [kept frame, frame, place]
    unit = features / jnp.maximum(jnp.linalg.norm(features, axis=-1, keepdims=True), 1e-6)
    alike = jnp.where(kept[:, None], jnp.einsum("fnd,fmd->fnm", unit, unit), -2.0)
    nearest = jnp.where(kept, jnp.arange(tokens), alike.argmax(-1))
    in_frame = jax.nn.one_hot(nearest, tokens, axis=1)  # [frame, kept place, place]
    drawn = jax.random.uniform(key)
    time_means = jnp.einsum("gfn,fnd->gnd", over_time, features)
    time_means /= jnp.maximum(over_time.sum(1), 1)[:, :, None]
    frame_means = jnp.einsum("fmn,fnd->fmd", in_frame, features)
    frame_means /= jnp.maximum(in_frame.sum(2), 1)[:, :, None]
    merged = jnp.where(drawn < _OVER_TIME, time_means, frame_means)
    return jnp.where(drawn < _OVER_TIME + _IN_FRAME, merged, features)
