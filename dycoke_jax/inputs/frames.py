"""Resizes video frames as in the models' training.

LLaVA-OneVision and LLaVA-Video resize every video frame to a square without keeping its aspect
ratio (``SigLipImageProcessor`` of LLaVA-NeXT; tiling and padding are for still images only). The
frames stay uint8: the normalisation ``(x / 255 - 0.5) / 0.5`` is part of the compiled vision
function.
"""

import numpy as np
from jaxtyping import UInt8
from PIL import Image


def resize(
    frame: UInt8[np.ndarray, "height width 3"] | Image.Image, size: int
) -> UInt8[np.ndarray, "{size} {size} 3"]:
    """Resizes one frame to a square with an antialiased bicubic filter, without keeping its aspect.

    Args:
        frame: uint8 RGB values [height, width, 3], or an image of any mode, converted to RGB.
        size: side of the result in pixels (384 for the released checkpoints).

    Returns:
        uint8 RGB values [size, size, 3], identical to the reference's before its normalisation.
    """
    # The reference uses Pillow, and other libraries' bicubic filters give different pixels.
    image = frame if isinstance(frame, Image.Image) else Image.fromarray(frame)
    if image.mode.startswith("I"):  # 16-bit grey, which Pillow would cut off at 255
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    image = image.convert("RGB").resize((size, size), Image.Resampling.BICUBIC)
    return np.array(image)
