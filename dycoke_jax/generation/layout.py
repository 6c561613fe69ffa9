"""The static shape of a batch, known before anything runs."""

from dataclasses import dataclass
from functools import lru_cache

import jax
import jax.numpy as jnp

from dycoke_jax.cache import Slots
from dycoke_jax.compression.protocol import Compressor, DecodePruning
from dycoke_jax.config import LlavaConfig
from dycoke_jax.generation.assemble import newline_slots


@dataclass(frozen=True)
class Layout:
    """What a batch's programs are compiled for."""

    slots: Slots
    pruning: DecodePruning | None


@lru_cache(maxsize=256)
def plan(
    config: LlavaConfig,
    frames: int,
    prefix: int,
    question: int,
    generated: int,
    compression: Compressor | None,
) -> Layout:
    """The layout for clips of ``frames`` frames (0: no video) and these segment sizes.

    Raises:
        ConfigError: where the compression cannot work on this model or clip length.
    """
    if frames == 0:
        return Layout(Slots(prefix, 0, question, generated), None)
    tokens = frames * config.tokens_per_frame
    if compression is not None:
        compression.check(config, frames)
        features = jax.ShapeDtypeStruct((1, frames, config.tokens_per_frame, 1), jnp.float32)
        kept = jax.eval_shape(compression.merge, features)
        tokens = tokens if kept is None else kept.shape[1]
    visual = tokens + newline_slots(config.newline, config.frame_grid, frames)
    slots = Slots(prefix, visual, question, generated)
    pruning = None if compression is None else compression.decode_pruning(slots, tokens)
    return Layout(slots, pruning)
