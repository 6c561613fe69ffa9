"""Encodes frames to visual tokens, in chunks of a fixed size so that memory is bounded."""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, UInt8

from dycoke_jax.model import Model
from dycoke_jax.models.signals import Signal
from dycoke_jax.progress import Progress

MAX_CHUNK = 8
"""Frames that the tower encodes in one call: a few keep any device busy, more only cost memory."""

_Folded = tuple[Float[Array, "folded N ..."], ...]
"""The tokens and then the signals, the frames of all clips one after another."""


class Features(NamedTuple):
    """What the language model and the token stages read of the clips of a batch."""

    tokens: Float[Array, "B F N D"]
    """Visual tokens of each frame after pooling, in raster order and in the dtype of the
    computation. Zeros where a clip has no frame."""
    frames: Int[Array, "B"]
    """Number of frames of each clip, int32; 0 for rows without a clip."""
    signals: tuple[Float[Array, "B F N ..."], ...]
    """What was asked of the vision tower, in that order, pooled as the tokens are: keys
    [B, F, N, vision width] in the dtype of the computation, attention [B, F, N] in float32. Zeros
    where a clip has no frame."""


def encode(
    model: Model,
    clips: Sequence[UInt8[np.ndarray, "_ height width 3"]],
    rows: int,
    frames: int,
    signals: tuple[Signal, ...] = (),
    progress: Progress | None = None,
) -> Features:
    """Encodes the frames of all clips, folded together.

    Chunks of one shape are written one after another into one array, which is then unfolded to one
    row a clip. So the programs depend on ``rows``, ``frames`` and ``signals`` only, and no frame is
    encoded that no clip has, but for those that fill up the last chunk.

    Args:
        model: the model.
        clips: at least one and at most ``rows`` clips of 1 to ``frames`` frames each, resized to
            the tower's input.
        rows: rows of the batch (B).
        frames: frames of a row (F).
        signals: what to compute of the vision tower besides; nothing else is.
        progress: called with the frames encoded after each chunk.

    Raises:
        ConfigError: if the vision tower does not have a layer that a signal asks for.
    """
    lengths = np.zeros(rows, np.int32)
    lengths[: len(clips)] = [len(clip) for clip in clips]
    assert lengths.max() <= frames, "a clip is longer than a row"
    folded = np.concatenate(clips)
    chunk = min(MAX_CHUNK, 1 << (rows * frames - 1).bit_length())
    arrays = _empty(model, -(-rows * frames // chunk) * chunk, signals)
    for start in range(0, len(folded), chunk):
        part = folded[start : start + chunk]
        filled = np.pad(part, [(0, chunk - len(part)), (0, 0), (0, 0), (0, 0)])
        arrays = _encode_chunk(model, arrays, filled, np.int32(start), signals)
        if progress is not None:
            arrays[0].block_until_ready()
            progress("encoding frames", start + len(part), len(folded))
    tokens, *others = _unfold(arrays, lengths, frames)
    return Features(tokens, jnp.asarray(lengths), tuple(others))


@jax.jit(static_argnames=("frames", "signals"))
def _empty(model: Model, frames: int, signals: tuple[Signal, ...]) -> _Folded:
    side = model.config.vision.image_size
    one = jax.ShapeDtypeStruct((1, side, side, 3), jnp.uint8)
    shapes = jax.eval_shape(lambda frame: _encoded(model, frame, signals), one)
    return tuple(jnp.zeros((frames, *shape.shape[1:]), shape.dtype) for shape in shapes)


# The arrays are donated, so that every chunk is written in place.
@jax.jit(donate_argnames="arrays", static_argnames="signals")
def _encode_chunk(
    model: Model,
    arrays: _Folded,
    frames: UInt8[Array, "C height width 3"],
    start: Int[Array, ""],
    signals: tuple[Signal, ...],
) -> _Folded:
    encoded = _encoded(model, frames, signals)
    write = jax.lax.dynamic_update_slice_in_dim
    return tuple(
        write(array, part, start, axis=0) for array, part in zip(arrays, encoded, strict=True)
    )


def _encoded(
    model: Model, frames: UInt8[Array, "C height width 3"], signals: tuple[Signal, ...]
) -> _Folded:
    tokens, computed = model.bind().encode_with_signals(frames, signals)
    return tokens, *computed


@jax.jit(static_argnames="frames")
def _unfold(
    arrays: _Folded, lengths: Int[Array, "B"], frames: int
) -> tuple[Float[Array, "B F N ..."], ...]:
    """Brings the frames of each clip to its row, and zeros where it has none."""
    number = jnp.arange(frames)
    places = (jnp.cumsum(lengths) - lengths)[:, None] + number
    places = jnp.where(number < lengths[:, None], places, arrays[0].shape[0])  # out of range
    return tuple(jnp.take(array, places, axis=0, mode="fill", fill_value=0) for array in arrays)
