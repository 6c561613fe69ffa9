"""Weights on disk: found, checked, loaded, converted and exported.

Two kinds of folder hold a model. A Hugging Face folder has ``config.json`` and safetensors files in
any of three layouts of names; a converted folder has the same ``config.json`` and an Orbax
checkpoint under ``params/``. Both load to the same flat dictionary, dotted path to array.
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
