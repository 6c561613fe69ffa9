"""Temporal token merging, stage 1 of DyCoke (paper, sec. 3.2 and eq. 3)."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int


def select(
    features: Float[Array, "B F N D"], kept: int, *, official: bool = False
) -> Int[Array, "B M"]:
    """Selects the visual tokens that enter the language model.

    Frames are taken in windows of four, f0 f1 f2 f3. All tokens of f0 are kept. f1 is compared with
    f0, f3 with f2 and f2 with f0, token by token at the same place, and the ``kept`` tokens of the
    compared frame with the lowest similarity are kept. Nothing is averaged: merging means that the
    redundant copy is dropped. A short last window follows the same rules for its frames.

    It is one vectorised operation, because F alone says which frames are compared.

    Args:
        features: pooled visual tokens of B clips without newlines, of any float dtype; similarity
            is computed in float32.
        kept: number of tokens to keep of each compared frame, in 0..N.
        official: follow the published code instead: the kept tokens of a frame are in order of
            ascending similarity, the third frame of a last, full window is kept whole, and the
            last of an odd number of frames is dropped. F must be at least 5.

    Returns:
        Indices into the F * N tokens of each clip, frame by frame; within a frame in raster order
        (``official``: ascending similarity). M depends on F, N and ``kept`` only. Equal
        similarities are resolved by the lower index first; identical tokens have similarity
        exactly 1.
    """
    batch, frames, tokens, _ = features.shape
    reference = _references(frames, official)
    last = frames - frames % 2 if official else frames
    whole = np.array([f for f in range(last) if f not in reference], np.int32)
    compared, similarity = _compare(features, reference)
    _, places = jax.lax.top_k(-similarity, kept)
    if not official:
        places = jnp.sort(places, axis=-1)

    # Both kinds of frames side by side, then one static permutation that puts frames in order.
    of_whole = whole[:, None] * tokens + np.arange(tokens, dtype=np.int32)
    of_compared = places.astype(jnp.int32) + (compared * tokens)[None, :, None]
    candidates = jnp.concatenate(
        [
            jnp.broadcast_to(jnp.asarray(of_whole).reshape(1, -1), (batch, of_whole.size)),
            of_compared.reshape(batch, -1),
        ],
        axis=1,
    )
    frame_of = np.concatenate([np.repeat(whole, tokens), np.repeat(compared, kept)])
    return candidates[:, np.argsort(frame_of, kind="stable")]


def similarity_map(
    features: Float[Array, "B F N D"], *, official: bool = False
) -> Float[Array, "B F N"]:
    """The similarities by which ``select`` decides.

    Args:
        features: as for ``select``.
        official: as for ``select``.

    Returns:
        Cosine similarity in float32 of each token and the token that it is compared with; NaN in
        frames that are compared with none.
    """
    batch, frames, tokens, _ = features.shape
    compared, similarity = _compare(features, _references(frames, official))
    return jnp.full((batch, frames, tokens), jnp.nan).at[:, compared].set(similarity)


def _compare(
    features: Float[Array, "B F N D"], reference: dict[int, int]
) -> tuple[Int[np.ndarray, "compared"], Float[Array, "B compared N"]]:
    """The compared frames in ascending order, and the similarity of each of their tokens."""
    compared = np.array(sorted(reference), np.int32)
    others = np.array([reference[f] for f in sorted(reference)], np.int32)
    return compared, _cosine(features[:, compared], features[:, others])


def _references(frames: int, official: bool) -> dict[int, int]:
    """The frame with which each compared frame is compared."""
    odd = {f: f - 1 for f in range(1, frames, 2)}
    third = {f: f - 2 for f in range(2, frames, 4)}
    if official:
        # The published loop runs over range(0, F - 4, 4) and so misses a last, full window.
        third = {f: other for f, other in third.items() if other < frames - 4}
    return odd | third


def _cosine(
    a: Float[Array, "B compared N D"], b: Float[Array, "B compared N D"]
) -> Float[Array, "B compared N"]:
    """Cosine similarity in float32; 0 where a vector is zero, exactly 1 where both are equal."""
    a, b = a.astype(jnp.float32), b.astype(jnp.float32)
    product, norm_a, norm_b = (a * b).sum(-1), (a * a).sum(-1), (b * b).sum(-1)
    similarity = product / jnp.maximum(jnp.sqrt(norm_a * norm_b), jnp.finfo(jnp.float32).tiny)
    # A compiler may sum the three in different orders, and the last bits of near-1 similarities
    # would then choose among the equal tokens of a still clip, differently in every batch size.
    return jnp.where((a == b).all(-1) & (norm_a > 0), 1.0, similarity)
