"""Encodes frames to visual tokens, in chunks of a fixed size so that memory is bounded."""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int, UInt8

from dycoke_jax.hosts import processes_of, replicate
from dycoke_jax.model import Model
from dycoke_jax.models.signals import Signal
from dycoke_jax.progress import Progress
from dycoke_jax.sharding import DATA, MODEL, constrain, constrain_rows, data_size, model_size

MAX_CHUNK = 8
"""Frames that the tower encodes in one call: a few keep any device busy, more only cost memory."""

_Folded = tuple[Float[Array, "shards folded N ..."], ...]
"""The tokens and then the signals, the frames of all clips of a shard one after another."""


class Features(NamedTuple):
    """What the language model and the token stages read of the clips of a batch."""

    tokens: Float[Array, "B F N D"]
    """Visual tokens of each frame after pooling, in raster order and in the dtype of the
    computation. Zeros where a clip has no frame."""
    frames: Int[Array, "B"]
    """Number of frames of each clip, int32; 0 for rows without a clip."""
    signals: tuple[Float[Array, "B F N ..."], ...]
    """What was asked of the vision tower, in that order, pooled as the tokens are: keys
    [B, F, N, vision width] and mean_keys [B, F, N, E] in the dtype of the computation, attention
    [B, F, N] in float32. Zeros where a clip has no frame."""


def encode(
    model: Model,
    clips: Sequence[UInt8[np.ndarray, "_ height width 3"] | None],
    rows: int,
    frames: int,
    signals: tuple[Signal, ...] = (),
    progress: Progress | None = None,
) -> Features:
    """Encodes the frames of all clips, folded together.

    Chunks of one shape are written one after another into one array, which is then unfolded to one
    row a clip. So the programs depend on ``rows``, ``frames`` and ``signals`` only, and no frame is
    encoded that no clip has, but for those that fill up the last chunk.

    On a mesh the clips of each shard of rows are folded by themselves. The devices of the shard
    each encode an equal part of a chunk, and no frame leaves its shard. Of several processes each
    gives the frames of its own shards; of the clips of others only the lengths are read.

    Args:
        model: the model.
        clips: the clip of each row, or None, for at most ``rows`` rows: at least one clip, of 1 to
            ``frames`` frames each, resized to the tower's input.
        rows: rows of the batch (B), a multiple of the shards of the mesh.
        frames: frames of a row (F).
        signals: what to compute of the vision tower besides; nothing else is.
        progress: called with the frames encoded after each chunk.

    Raises:
        ConfigError: if the vision tower does not have a layer that a signal asks for.
    """
    lengths = np.zeros(rows, np.int32)
    lengths[: len(clips)] = [0 if clip is None else len(clip) for clip in clips]
    assert lengths.max() <= frames, "a clip is longer than a row"
    shards, rows_of_shard = data_size(model.mesh), rows // data_size(model.mesh)
    processes, side = processes_of(model.mesh), model.config.vision.image_size
    of_process = rows // processes.count
    first_row = processes.index * of_process
    folded = [
        np.concatenate(
            [
                np.zeros((0, side, side, 3), np.uint8),
                *(clip for clip in clips[first : first + rows_of_shard] if clip is not None),
            ]
        )
        for first in range(first_row, first_row + of_process, rows_of_shard)
    ]
    chunk, most = chunks_of(rows_of_shard * frames, model.mesh)
    arrays = empty_features(model, shards, most, signals)
    of_shards = lengths.reshape(shards, rows_of_shard).sum(1)
    for start in range(0, int(of_shards.max()), chunk):
        parts = [of_shard[start : start + chunk] for of_shard in folded]
        filled = np.stack(
            [np.pad(part, [(0, chunk - len(part)), (0, 0), (0, 0), (0, 0)]) for part in parts]
        )
        arrays = encode_chunk(model, arrays, _placed(filled, model.mesh), np.int32(start), signals)
        if progress is not None:
            arrays[0].block_until_ready()
            done = int(np.minimum(of_shards, start + chunk).sum())
            progress("encoding frames", done, int(of_shards.sum()))
    of_clips = replicate(jnp.asarray(lengths), model.mesh)
    tokens, *others = _unfold(arrays, of_clips, frames, model.mesh)
    return Features(tokens, of_clips, tuple(others))


def _placed(
    frames: UInt8[np.ndarray, "shards chunk height width 3"], mesh: Mesh | None
) -> (
    UInt8[np.ndarray, "shards chunk height width 3"] | UInt8[Array, "_shards chunk height width 3"]
):
    """Brings the frames of the shards of this process to their devices, to each only its own."""
    if mesh is None:
        return frames
    places = NamedSharding(mesh, P(DATA, MODEL))
    return jax.make_array_from_process_local_data(
        places, frames, (data_size(mesh), *frames.shape[1:])
    )


def chunks_of(frames: int, mesh: Mesh | None) -> tuple[int, int]:
    """How many frames of a shard of rows are encoded in a call, and in all calls together.

    Args:
        frames: the most frames that a shard can have.
        mesh: the mesh; the devices of a shard encode equal parts of a chunk.
    """
    lanes = model_size(mesh)
    chunk = lanes * min(MAX_CHUNK, 1 << (-(-frames // lanes) - 1).bit_length())
    return chunk, -(-frames // chunk) * chunk


@jax.jit(static_argnames=("shards", "frames", "signals"))
def empty_features(model: Model, shards: int, frames: int, signals: tuple[Signal, ...]) -> _Folded:
    """Zeros for the features of so many frames of each shard, as ``encode_chunk`` fills them."""
    side = model.config.vision.image_size
    some = jax.ShapeDtypeStruct((shards, model_size(model.mesh), side, side, 3), jnp.uint8)
    shapes = jax.eval_shape(lambda chunk: _encoded(model, chunk, signals), some)
    empty = [jnp.zeros((shards, frames, *shape.shape[2:]), shape.dtype) for shape in shapes]
    return tuple(constrain_rows(empty, model.mesh))


# The arrays are donated, so that every chunk is written in place.
@jax.jit(donate_argnames="arrays", static_argnames="signals")
def encode_chunk(
    model: Model,
    arrays: _Folded,
    frames: UInt8[Array, "shards chunk height width 3"],
    start: Int[Array, ""],
    signals: tuple[Signal, ...],
) -> _Folded:
    """Encodes a chunk of frames, and writes it into the arrays from ``start`` on.

    Args:
        model: the model.
        arrays: features of all frames, donated.
        frames: frames of each shard.
        start: where the first of them is written.
        signals: what to compute of the vision tower besides (static).
    """
    # The language model needs all tokens of a row on each device of its shard.
    encoded = constrain_rows(_encoded(model, frames, signals), model.mesh)
    write = jax.lax.dynamic_update_slice_in_dim
    return tuple(
        write(array, part, start, axis=1) for array, part in zip(arrays, encoded, strict=True)
    )


def _encoded(
    model: Model,
    frames: UInt8[Array, "shards chunk height width 3"],
    signals: tuple[Signal, ...],
) -> _Folded:
    shards, chunk = frames.shape[:2]
    frames = constrain(frames, model.mesh, DATA, MODEL)
    flat = constrain(frames.reshape(-1, *frames.shape[2:]), model.mesh, (DATA, MODEL))
    tokens, computed = model.bind().encode_with_signals(flat, signals)
    return tuple(x.reshape(shards, chunk, *x.shape[1:]) for x in (tokens, *computed))


@jax.jit(static_argnames=("frames", "mesh"))
def _unfold(
    arrays: _Folded, lengths: Int[Array, "B"], frames: int, mesh: Mesh | None
) -> tuple[Float[Array, "B F N ..."], ...]:
    """Brings the frames of each clip to its row, and zeros where it has none."""

    def of_shard(
        array: Float[Array, "folded N ..."], lengths: Int[Array, "rows"]
    ) -> Float[Array, "rows F N ..."]:
        number = jnp.arange(frames)
        places = (jnp.cumsum(lengths) - lengths)[:, None] + number
        places = jnp.where(number < lengths[:, None], places, len(array))  # out of range
        return jnp.take(array, places, axis=0, mode="fill", fill_value=0)

    of_shards = constrain_rows(lengths.reshape(len(arrays[0]), -1), mesh)
    unfolded = [jax.vmap(of_shard)(array, of_shards) for array in arrays]
    rows = [x.reshape(-1, *x.shape[2:]) for x in unfolded]
    return tuple(constrain_rows(rows, mesh))
