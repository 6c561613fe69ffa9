"""Paints the frames of a scene."""

from functools import lru_cache

import numpy as np
from jaxtyping import Float, UInt8

from dycoke_jax.tasks.scenes import GRID, Scene

_RGB = {
    "red": (220, 40, 40),
    "green": (40, 170, 60),
    "blue": (50, 80, 235),
    "yellow": (240, 220, 50),
    "purple": (150, 50, 200),
    "orange": (250, 140, 20),
    "cyan": (60, 215, 225),
    "white": (245, 245, 245),
}
_SIZE = 0.86
"""Height and width of a thing as a share of those of a grid cell."""
_SAMPLES = 6
"""Points along each side of a pixel at which a shape is sampled, for smooth edges."""


def draw(scene: Scene, size: int = 64) -> UInt8[np.ndarray, "F {size} {size} 3"]:
    """Paints the frames of a scene: its things over a dim background that changes slowly.

    Args:
        scene: the scene; its seed decides background, noise, exact colours and small shifts.
        size: height and width of a frame in pixels.

    Returns:
        RGB frames.
    """
    # A random stream of its own, independent of the one that draw_scene uses.
    random = np.random.default_rng([scene.seed, 1])
    canvas = _background(random, scene.frames, size)
    cell = size / GRID
    pixels = round(cell * _SIZE)
    for thing in scene.things:
        shape, colour = _mask(thing.shape, pixels)[..., None], np.array(_RGB[thing.colour])
        colour = np.clip(colour + random.uniform(-12, 12, 3), 0, 255).astype(np.float32)
        shift = random.uniform(-0.06, 0.06, 2) * cell
        for frame, place in enumerate(thing.cells, start=thing.appears):
            top, left = (
                int(np.clip(round((value + 0.5) * cell + delta - pixels / 2), 0, size - pixels))
                for value, delta in zip(place, shift, strict=True)
            )
            area = canvas[frame, top : top + pixels, left : left + pixels]
            area += shape * (colour - area)
    canvas += random.standard_normal(canvas.shape, np.float32) * random.uniform(0, 3)
    return np.clip(np.rint(canvas), 0, 255).astype(np.uint8)


def _background(
    random: np.random.Generator, frames: int, size: int
) -> Float[np.ndarray, "F {size} {size} 3"]:
    """A dim colour gradient that becomes brighter or darker with time, as RGB in 0..255."""
    colour = random.uniform(25, 85, 3)
    slope = random.uniform(-20, 20, (2, 3))
    drift = random.uniform(-12, 12) * np.linspace(0, 1, frames)
    along = np.linspace(-1, 1, size)
    still = colour + along[:, None, None] * slope[0] + along[None, :, None] * slope[1]
    return (still[None] + drift[:, None, None, None]).astype(np.float32)


@lru_cache(maxsize=64)
def _mask(shape: str, pixels: int) -> Float[np.ndarray, "{pixels} {pixels}"]:
    """The share of each pixel that a shape covers, in [0, 1]."""
    fine = pixels * _SAMPLES
    along = (np.arange(fine) + 0.5) / fine * 2 - 1
    y, x = np.meshgrid(along, along, indexing="ij")
    radius = np.hypot(x, y)
    match shape:
        case "circle":
            inside = radius < 0.95
        case "square":
            inside = np.maximum(abs(x), abs(y)) < 0.85
        case "triangle":
            inside = (y < 0.85) & (abs(x) < (y + 0.95) / 1.8)
        case "cross":
            inside = (np.minimum(abs(x), abs(y)) < 0.28) & (np.maximum(abs(x), abs(y)) < 0.95)
        case "diamond":
            inside = abs(x) + abs(y) < 1.0
        case "ring":
            inside = (radius < 0.98) & (radius > 0.55)
        case _:
            raise ValueError(f"no such shape: {shape}")
    parts = inside.reshape(pixels, _SAMPLES, pixels, _SAMPLES)
    return parts.mean((1, 3)).astype(np.float32)
