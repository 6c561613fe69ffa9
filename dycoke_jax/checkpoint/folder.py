"""A checkpoint's folder: which kind it is, its configuration, and what it holds."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from dycoke_jax.checkpoint.hf_folder import hf_weights
from dycoke_jax.checkpoint.location import locate
from dycoke_jax.checkpoint.orbax_folder import PARAMS, orbax_weights
from dycoke_jax.checkpoint.tensors import Weights
from dycoke_jax.config import LlavaConfig
from dycoke_jax.errors import CheckpointError

CONFIG = "config.json"


@dataclass(frozen=True)
class Checkpoint:
    """A folder that holds a model, not yet read.

    Attributes:
        folder: absolute path.
        config: the model's configuration.
        kind: "hf" for safetensors in any layout, "orbax" for a converted folder.
    """

    folder: Path
    config: LlavaConfig
    kind: Literal["hf", "orbax"]


def open_checkpoint(name_or_path: str | Path) -> Checkpoint:
    """Finds a checkpoint and reads its configuration.

    Args:
        name_or_path: a folder, or a hub id ``org/name``, which is downloaded.

    Raises:
        CheckpointError: when it cannot be found or config.json cannot be read.
        ConfigError: when config.json describes something that is not supported.
    """
    folder = locate(name_or_path)
    return Checkpoint(folder, LlavaConfig.from_hf(read_config(folder)), kind_of(folder))


def kind_of(folder: Path) -> Literal["hf", "orbax"]:
    """Whether a folder holds an Orbax checkpoint or Hugging Face files."""
    return "orbax" if (folder / PARAMS).is_dir() else "hf"


def read_config(folder: Path) -> dict[str, Any]:
    """The parsed ``config.json`` of a folder.

    Raises:
        CheckpointError: when it is absent, not JSON or not an object.
    """
    path = folder / CONFIG
    try:
        config = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise CheckpointError(f"{folder} has no {CONFIG}") from None
    except (ValueError, OSError) as error:
        raise CheckpointError(f"{path} is not readable as JSON ({error})") from error
    if not isinstance(config, dict):
        raise CheckpointError(f"{path} must hold an object, not {type(config).__name__}")
    return config


def open_weights(checkpoint: Checkpoint) -> Weights:
    """Checks what the folder holds against its configuration, before any tensor is read.

    Raises:
        CheckpointError: listing everything that is wrong.
    """
    opener = orbax_weights if checkpoint.kind == "orbax" else hf_weights
    return opener(checkpoint.folder, checkpoint.config)
