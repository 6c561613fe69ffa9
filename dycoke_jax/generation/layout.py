"""The static shapes of a batch, known before anything runs."""

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
    """All that is known about a batch before it runs: the static argument of its programs.

    Attributes:
        rows: rows of the batch (B).
        slots: sizes of the segments of the key/value cache.
        compression: method and settings; None traces nothing of compression.
        pruning: second stage of the compression for these slots; None if it prunes nothing.
    """

    rows: int
    slots: Slots
    compression: Compressor | None
    pruning: DecodePruning | None


@lru_cache(maxsize=256)
def plan(
    config: LlavaConfig,
    rows: int,
    frames: int,
    prefix: int,
    question: int,
    generated: int,
    compression: Compressor | None,
) -> Layout:
    """The layout of a batch.

    Args:
        config: the model.
        rows: rows of the batch.
        frames: frames of each clip; 0 for prompts without video.
        prefix: slots of the prefix.
        question: slots of the question.
        generated: slots for generated tokens.
        compression: method and settings, or None for the plain model.

    Raises:
        ConfigError: if the compression cannot work on this model or clip length.
    """
    if frames == 0:
        return Layout(rows, Slots(prefix, 0, question, generated), None, None)
    tokens = frames * config.tokens_per_frame
    if compression is not None:
        compression.check(config, frames)
        features = jax.ShapeDtypeStruct((1, frames, config.tokens_per_frame, 1), jnp.float32)
        kept = jax.eval_shape(compression.select, features)
        tokens = tokens if kept is None else kept.shape[1]
    visual = tokens + newline_slots(config.newline, config.frame_grid, frames)
    slots = Slots(prefix, visual, question, generated)
    pruning = None if compression is None else compression.decode_pruning(slots, tokens)
    return Layout(rows, slots, compression, pruning)
