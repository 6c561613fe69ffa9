"""Finds, checks, loads, converts and exports checkpoints.

A checkpoint is a folder of one of two kinds. A Hugging Face folder has ``config.json`` and
safetensors files whose tensor names follow one of three layouts; a converted folder has the same
``config.json`` and an Orbax checkpoint under ``params/``. Both load to the same flat dictionary
from dotted path to array.
"""

from dycoke_jax.checkpoint.conversion import convert, export
from dycoke_jax.checkpoint.folder import Folder, open_folder
from dycoke_jax.checkpoint.load import load_params
from dycoke_jax.checkpoint.location import locate
from dycoke_jax.checkpoint.opening import Checkpoint, open_checkpoint
from dycoke_jax.checkpoint.report import CheckpointWarning

__all__ = [
    "Checkpoint",
    "CheckpointWarning",
    "Folder",
    "convert",
    "export",
    "load_params",
    "locate",
    "open_checkpoint",
    "open_folder",
]
