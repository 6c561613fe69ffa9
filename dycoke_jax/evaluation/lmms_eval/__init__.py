"""The model ``dycoke_jax`` of lmms-eval, which is not a dependency: only ``model`` imports it.

lmms-eval finds it by the entry point group ``lmms_eval.models`` and calls ``manifest``, whatever
model is evaluated. So nothing here loads JAX.
"""

from pathlib import Path
from typing import Any

TASKS = Path(__file__).parent / "tasks"
"""Folder of tasks that lmms-eval lacks, for its option ``--include_path``."""


def manifest() -> Any:
    """Returns the ``ModelManifest`` that tells lmms-eval the name of the model and its class."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest(
        model_id="dycoke_jax",
        simple_class_path="dycoke_jax.evaluation.lmms_eval.model.DycokeJax",
    )
