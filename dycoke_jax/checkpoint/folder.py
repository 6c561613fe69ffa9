"""Opens the folder of a checkpoint: its kind, its configuration and its weights."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from dycoke_jax.checkpoint.hf_config import read_config
from dycoke_jax.checkpoint.hf_folder import hf_weights
from dycoke_jax.checkpoint.location import locate
from dycoke_jax.checkpoint.orbax_folder import PARAMS, orbax_weights
from dycoke_jax.checkpoint.regular_files import check_files
from dycoke_jax.checkpoint.safetensors_reader import left_aside, safetensors_names
from dycoke_jax.checkpoint.tensors import Weights
from dycoke_jax.config import LlavaConfig
from dycoke_jax.files import read_json_object

CONFIG = "config.json"


@dataclass(frozen=True)
class Folder:
    """A folder that holds the weights of a model.

    Attributes:
        path: absolute path of the folder.
        config: the model's configuration.
        kind: "hf" for safetensors files in any layout, "orbax" for a converted folder.
        notes: remarks for the user, one sentence each, such as on files that are not read.
    """

    path: Path
    config: LlavaConfig
    kind: Literal["hf", "orbax"]
    notes: tuple[str, ...] = ()

    def weights(self) -> Weights:
        """Checks the stored tensors against the configuration, without reading their data.

        The one exception are the output head and the embedding of a model that ties them: where
        both are stored, they are compared.

        Raises:
            CheckpointError: with a list of all problems.
        """
        opener = orbax_weights if self.kind == "orbax" else hf_weights
        return opener(self.path, self.config)


def open_folder(name_or_path: str | Path) -> Folder:
    """Finds the folder of a checkpoint and reads its configuration.

    Args:
        name_or_path: a folder, or a hub id ``org/name``, which is downloaded if not cached.

    Raises:
        CheckpointError: if the checkpoint cannot be found, or ``config.json`` or the index of the
            weights cannot be read.
        ConfigError: if ``config.json`` describes a model that is not supported.
    """
    path = locate(name_or_path)
    check_files(path)
    config = read_config(read_json_object(path / CONFIG))
    if (path / PARAMS).is_dir():
        return Folder(path, config, "orbax", _notes(safetensors_names(path)))
    return Folder(path, config, "hf", _notes(left_aside(path)))


def _notes(unread: list[str]) -> tuple[str, ...]:
    if unread:
        return (f"these files beside the weights are not read: {', '.join(unread)}",)
    return ()
