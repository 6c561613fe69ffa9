"""The part of a frame that its visual tokens stand for."""

import numpy as np
from jaxtyping import UInt8

from dycoke_jax.config import LlavaConfig


def covered(
    frames: UInt8[np.ndarray, "F height width 3"], config: LlavaConfig
) -> UInt8[np.ndarray, "F side side 3"]:
    """Cuts off what no visual token stands for, so that the tokens share the frame evenly.

    That is the rest at the right and at the bottom: what does not fill a patch of the vision tower
    (6 of 384 pixels, with patches of 14), and patches that do not fill a window of ``average`` or
    ``max`` pooling (one of 27 along a side, in windows of 2).

    Args:
        frames: frames as the model reads them, RGB.
        config: the model.
    """
    patches = config.vision.grid
    if config.pool_mode != "bilinear":
        patches -= patches % config.pool_stride
    side = patches * config.vision.patch_size
    return frames[:, :side, :side]
