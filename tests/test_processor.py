"""Processor files: what would treat frames otherwise is refused by name."""

import json

import pytest

from dycoke_jax.checkpoint.processor import check_processor
from dycoke_jax.errors import CheckpointError, ConfigError

PUBLISHED = {
    "do_convert_rgb": True,
    "do_normalize": True,
    "do_pad": True,
    "do_rescale": True,
    "do_resize": True,
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
    "image_processor_type": "LlavaOnevisionImageProcessor",
    "resample": 3,
    "rescale_factor": 0.00392156862745098,
    "size": {"height": 384, "width": 384},
}


def write(folder, name, settings):
    (folder / name).write_text(json.dumps(settings))


def test_published_settings_pass(tmp_path):
    check_processor(tmp_path, 384)
    write(tmp_path, "preprocessor_config.json", PUBLISHED)
    write(
        tmp_path, "processor_config.json", {"video_processor": PUBLISHED, "num_image_tokens": 729}
    )
    check_processor(tmp_path, 384)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("image_mean", [0.48145466, 0.4578275, 0.40821073]),
        ("image_std", [0.5, 0.5, 0.4]),
        ("rescale_factor", 1.0),
        ("resample", 2),
        ("do_normalize", False),
        ("do_rescale", False),
        ("do_resize", False),
        ("do_center_crop", True),
        ("size", {"shortest_edge": 384}),
        ("size", {"height": 336, "width": 336}),
    ],
)
@pytest.mark.parametrize("place", ["image", "video", "both in one file"])
def test_other_settings_are_refused_by_name(tmp_path, key, value, place):
    settings = PUBLISHED | {key: value}
    if place == "image":
        write(tmp_path, "preprocessor_config.json", settings)
    elif place == "video":
        write(tmp_path, "video_preprocessor_config.json", settings)
    else:
        write(tmp_path, "processor_config.json", {"video_processor": settings})
    with pytest.raises(ConfigError, match=key):
        check_processor(tmp_path, 384)


def test_files_that_are_not_json(tmp_path):
    (tmp_path / "preprocessor_config.json").write_text("{")
    with pytest.raises(CheckpointError, match="not readable as JSON"):
        check_processor(tmp_path, 384)


def test_files_of_transformers_itself(tmp_path):
    """As the image processor of this model family saves itself."""
    from transformers import LlavaOnevisionImageProcessorPil

    mean = [0.5, 0.5, 0.5]
    size = {"height": 384, "width": 384}
    LlavaOnevisionImageProcessorPil(image_mean=mean, image_std=mean, size=size).save_pretrained(
        tmp_path
    )
    check_processor(tmp_path, 384)
