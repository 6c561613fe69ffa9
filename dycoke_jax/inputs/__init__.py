"""Prepares model inputs: uint8 frames from a clip, and token ids from a question.

Everything here runs on the host; no accelerator is used.
"""

from dycoke_jax.inputs.clip import Clip, clip_from_array
from dycoke_jax.inputs.frames import resize
from dycoke_jax.inputs.limits import DecodingLimits
from dycoke_jax.inputs.prompts import (
    DEFAULT_SYSTEM,
    Prompt,
    Prompting,
    Tokenizer,
    build_prompt,
    stop_ids,
    time_instruction,
)
from dycoke_jax.inputs.sampling import FrameSampling, frame_indices, frame_times
from dycoke_jax.inputs.video import check_clip, count_frames, read_clip

__all__ = [
    "DEFAULT_SYSTEM",
    "Clip",
    "DecodingLimits",
    "FrameSampling",
    "Prompt",
    "Prompting",
    "Tokenizer",
    "build_prompt",
    "check_clip",
    "clip_from_array",
    "count_frames",
    "frame_indices",
    "frame_times",
    "read_clip",
    "resize",
    "stop_ids",
    "time_instruction",
]
