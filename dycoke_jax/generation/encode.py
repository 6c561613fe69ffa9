"""Encodes frames to visual tokens, in chunks of a fixed size so that memory is bounded."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, UInt8

from dycoke_jax.model import Model
from dycoke_jax.progress import Progress

MAX_CHUNK = 8
"""Frames that the tower encodes in one call: a few keep any device busy, more only cost memory."""


def encode(
    model: Model,
    clips: Sequence[UInt8[np.ndarray, "F height width 3"]],
    rows: int,
    progress: Progress | None = None,
) -> Float[Array, "B F N D"]:
    """Encodes the frames of all clips, folded together.

    Chunks of one shape are written one after another into one array. So the programs depend on
    ``rows`` and F only, and no frame is encoded for an empty row of the batch.

    Args:
        model: the model.
        clips: at most ``rows`` clips of F frames each, resized to the tower's input.
        rows: rows of the batch (B); those without a clip are filled with zeros.
        progress: called with the frames encoded after each chunk.
    """
    frames = np.concatenate(clips)
    per_clip = len(clips[0])
    chunk = min(MAX_CHUNK, 1 << (rows * per_clip - 1).bit_length())
    tokens = _empty(model, -(-rows * per_clip // chunk) * chunk)
    for start in range(0, len(frames), chunk):
        part = frames[start : start + chunk]
        filled = np.pad(part, [(0, chunk - len(part)), (0, 0), (0, 0), (0, 0)])
        tokens = _encode_chunk(model, tokens, filled, np.int32(start))
        if progress is not None:
            tokens.block_until_ready()
            progress("encoding frames", start + len(part), len(frames))
    return _unfold(tokens, np.int32(len(frames)), rows, per_clip)


@jax.jit(static_argnames="frames")
def _empty(model: Model, frames: int) -> Float[Array, "frames N D"]:
    config = model.config
    return jnp.zeros((frames, config.tokens_per_frame, config.text.hidden_size), model.dtype)


# The array is donated, so that every chunk is written in place.
@jax.jit(donate_argnames="tokens")
def _encode_chunk(
    model: Model,
    tokens: Float[Array, "frames N D"],
    frames: UInt8[Array, "C height width 3"],
    start: Int[Array, ""],
) -> Float[Array, "frames N D"]:
    encoded = model.bind().encode(frames)
    return jax.lax.dynamic_update_slice_in_dim(tokens, encoded, start, axis=0)


@jax.jit(static_argnames=("rows", "per_clip"))
def _unfold(
    tokens: Float[Array, "frames N D"], count: Int[Array, ""], rows: int, per_clip: int
) -> Float[Array, "B F N D"]:
    """Brings the tokens to one row a clip, and replaces those of filled-up frames by zeros."""
    real = jnp.arange(tokens.shape[0]) < count
    tokens = jnp.where(real[:, None, None], tokens, 0)[: rows * per_clip]
    return tokens.reshape(rows, per_clip, *tokens.shape[1:])
