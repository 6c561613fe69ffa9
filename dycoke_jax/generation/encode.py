"""Frames to visual tokens, in chunks of a fixed size so that memory is bounded."""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt8

from dycoke_jax.config import LlavaConfig
from dycoke_jax.models.llava import Params, bind

MAX_CHUNK = 8
"""Frames that the tower takes at once: a few keep any device busy, more only take memory."""


def encode(
    config: LlavaConfig,
    params: Params,
    clips: list[UInt8[np.ndarray, "F height width 3"]],
    progress: Callable[[int], None] | None = None,
) -> Float[Array, "B F N D"]:
    """Encodes the frames of all clips, folded together.

    Every chunk has the same shape, so one compiled program serves any number of clips and frames;
    the last chunk is filled up with black frames, whose results are dropped.

    Args:
        config: the model.
        params: its weights.
        clips: B clips of F frames, resized to the tower's input.
        progress: called with the number of frames of each chunk once it is computed.
    """
    frames = np.concatenate(clips)
    chunk = min(MAX_CHUNK, 1 << (len(frames) - 1).bit_length())
    outputs = []
    for start in range(0, len(frames), chunk):
        part = frames[start : start + chunk]
        filled = np.pad(part, [(0, chunk - len(part)), (0, 0), (0, 0), (0, 0)])
        outputs.append(_encode_chunk(config, params, filled))
        if progress is not None:
            outputs[-1].block_until_ready()
            progress(len(part))
    tokens = jnp.concatenate(outputs)[: len(frames)]
    return tokens.reshape(len(clips), -1, *tokens.shape[1:])


@partial(jax.jit, static_argnames="config")
def _encode_chunk(
    config: LlavaConfig, params: Params, frames: UInt8[Array, "C height width 3"]
) -> Float[Array, "C N D"]:
    return bind(config, params).encode(frames)
