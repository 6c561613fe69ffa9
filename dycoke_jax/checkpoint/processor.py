"""Checks a checkpoint's processor files against the preprocessing that is implemented."""

from collections.abc import Iterator, Mapping
from math import isclose
from pathlib import Path
from typing import Any

from dycoke_jax.checks import shown
from dycoke_jax.errors import ConfigError
from dycoke_jax.files import read_json_object

# The value supported for each setting, where a file has it. Lists are compared by element.
_MUST_BE: Mapping[str, Any] = {
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
    "rescale_factor": 1 / 255,
    "resample": 3,  # Pillow's bicubic
    "do_normalize": True,
    "do_rescale": True,
    "do_resize": True,
    "do_center_crop": False,
}


def check_processor(folder: Path, size: int) -> None:
    """Checks that the processor settings describe the preprocessing that is implemented.

    Frames are resized to a square without keeping their aspect ratio, with a bicubic filter, and
    normalised to [-1, 1], as for SigLIP. The files checked are ``preprocessor_config.json``,
    ``video_preprocessor_config.json`` and the processor sections of ``processor_config.json``,
    which transformers 5 writes. Files and settings that are absent pass.

    Args:
        folder: the checkpoint's folder.
        size: side in pixels of the vision tower's square input.

    Raises:
        ConfigError: naming the file and the setting that is not supported.
        CheckpointError: if a file cannot be read as JSON.
    """
    for name, settings in _processors(folder):
        for key, wanted in _MUST_BE.items():
            if settings.get(key) is not None and not _equal(settings[key], wanted):
                raise ConfigError(
                    f"{name}: {key} is {shown(settings[key])}, which is not supported "
                    f"(supported: {wanted!r})"
                )
        sides = settings.get("size")
        if sides is not None and sides not in (size, {"height": size, "width": size}):
            raise ConfigError(
                f"{name}: size is {shown(sides)}; the vision tower takes {size} x {size}"
            )


def _processors(folder: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    for name in ("preprocessor_config.json", "video_preprocessor_config.json"):
        if (folder / name).exists():
            yield name, read_json_object(folder / name)
    together = folder / "processor_config.json"
    if together.exists():
        settings = read_json_object(together)
        for part in ("image_processor", "video_processor"):
            if isinstance(settings.get(part), dict):
                yield f"{together.name}: {part}", settings[part]


def _equal(value: Any, wanted: Any) -> bool:
    if isinstance(wanted, list):
        return (
            isinstance(value, list)
            and len(value) == len(wanted)
            and all(_equal(a, b) for a, b in zip(value, wanted, strict=True))
        )
    if isinstance(wanted, float):
        return isinstance(value, int | float) and isclose(value, wanted, rel_tol=1e-6)
    return bool(value == wanted)
