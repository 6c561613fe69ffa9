"""A small model without files, for tests of generation."""

import numpy as np

from dycoke_jax import LlavaVideo
from dycoke_jax.config import LlavaConfig, TextConfig, VisionConfig
from dycoke_jax.model import Model
from dycoke_jax.models.llava import random_params
from support.tokenizers import tiny_tokenizer

SIDE = 98


def tiny_model(newline="one_token", pool_mode="bilinear", layers=4, seed=0, stops=False):
    """Weights large enough that answers vary and attention changes from step to step."""
    config = LlavaConfig(
        VisionConfig(32, 48, 2, 4, patch_size=14, image_size=SIDE),
        TextConfig(320, 48, 64, layers, 4, 2, 12, tie_word_embeddings=True),
        newline=newline,
        pool_mode=pool_mode,
    )
    params = {
        name: weight * (10.0 if weight.ndim >= 2 else 1.0)
        for name, weight in random_params(config, seed).items()
    }
    model = LlavaVideo(Model(params, config), tiny_tokenizer())
    if not stops:
        model.stop_ids = ()
    return model


def video(seed, frames, moving=0.3):
    """Random frames of which a part changes from one to the next."""
    rng = np.random.default_rng(seed)
    still = rng.integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)
    clip = np.repeat(still[None], frames, axis=0)
    changed = rng.random((frames, SIDE, SIDE, 1)) < moving
    return np.where(changed, rng.integers(0, 256, clip.shape, dtype=np.uint8), clip)
