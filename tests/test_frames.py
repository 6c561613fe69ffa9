"""Resizing equals the reference's preprocessing."""

import jax
import numpy as np
import pytest
from PIL import Image
from transformers import LlavaOnevisionImageProcessorPil, SiglipImageProcessorPil

from dycoke_jax.inputs import resize
from dycoke_jax.models.siglip import normalise

SHAPES = [(216, 384), (480, 270), (384, 384), (100, 1000), (7, 5), (9, 9), (1080, 1920)]


def noise(height: int, width: int) -> np.ndarray:
    return np.random.default_rng(height * width).integers(0, 256, (height, width, 3), np.uint8)


def normalized(frame: np.ndarray) -> np.ndarray:
    """As the compiled vision function does it, channels first."""
    return np.asarray(jax.jit(normalise)(frame[None]))[0].transpose(2, 0, 1)


@pytest.mark.parametrize("shape", SHAPES)
def test_equals_siglip_processor(shape: tuple[int, int]) -> None:
    frame = noise(*shape)
    processor = SiglipImageProcessorPil(size={"height": 384, "width": 384}, resample=3)
    got = resize(frame, 384)
    raw = processor(frame, do_rescale=False, do_normalize=False, return_tensors="np")
    np.testing.assert_array_equal(got.transpose(2, 0, 1), raw["pixel_values"][0])
    full = processor(
        frame, image_mean=[0.5] * 3, image_std=[0.5] * 3, return_tensors="np"
    ).pixel_values[0]
    np.testing.assert_allclose(normalized(got), full, atol=1e-6)


@pytest.mark.parametrize("shape", SHAPES)
def test_equals_base_view_of_onevision_processor(shape: tuple[int, int]) -> None:
    # Its first patch is the whole image squeezed to a square, as every frame of a video is.
    frame = noise(*shape)
    processor = LlavaOnevisionImageProcessorPil(
        image_mean=[0.5] * 3, image_std=[0.5] * 3, image_grid_pinpoints=[[384, 768], [768, 384]]
    )
    full = processor(frame, return_tensors="np").pixel_values[0][0]
    np.testing.assert_allclose(normalized(resize(frame, 384)), full, atol=1e-6)


def test_result_is_uint8_and_leaves_its_input_alone() -> None:
    frame = noise(20, 30)
    before = frame.copy()
    got = resize(frame, 14)
    assert got.shape == (14, 14, 3)
    assert got.dtype == np.uint8
    assert got.flags.writeable
    np.testing.assert_array_equal(frame, before)


def test_views_that_are_not_contiguous() -> None:
    frame = noise(40, 30)
    np.testing.assert_array_equal(resize(frame[::-1, ::2], 8), resize(frame[::-1, ::2].copy(), 8))
    np.testing.assert_array_equal(resize(np.rot90(frame), 8), resize(np.rot90(frame).copy(), 8))


@pytest.mark.parametrize("mode", ["L", "RGBA", "CMYK", "1"])
def test_images_of_other_modes_become_rgb(mode: str) -> None:
    image = Image.fromarray(noise(30, 40)).convert(mode)
    np.testing.assert_array_equal(resize(image, 16), resize(np.array(image.convert("RGB")), 16))
