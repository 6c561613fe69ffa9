"""Opens the weights of a Hugging Face folder and checks them against a configuration."""

from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from dycoke_jax.checkpoint import names
from dycoke_jax.checkpoint.report import Report
from dycoke_jax.checkpoint.safetensors_reader import (
    SafetensorsSet,
    StoredTensor,
    open_safetensors,
    read_tensor,
    same_data,
)
from dycoke_jax.checkpoint.tensors import DTYPES, TensorInfo, Weights, check_tree
from dycoke_jax.config import LlavaConfig
from dycoke_jax.models.llava import abstract_params

_HEAD, _EMBEDDING = "lm_head.weight", "language_model.embed_tokens.weight"


def hf_weights(folder: Path, config: LlavaConfig) -> Weights:
    """Opens the safetensors files of a folder and checks them, reading only their headers.

    Tensor data is read in one case: if the configuration ties the output head to the embedding but
    the files hold both, the two are compared and the head is left out.

    Args:
        folder: folder with safetensors files, in any layout.
        config: the configuration that the weights must fit.

    Raises:
        CheckpointError: with a list of all files that cannot be read and all tensors that are
            missing, unknown, duplicate, or of a wrong shape or dtype.
    """
    report = Report()
    expected = {path: leaf.shape for path, leaf in abstract_params(config).items()}
    files = open_safetensors(folder, report)
    layout = names.detect_layout(files.tensors) if files.tensors else None
    if layout is None:
        if files.tensors:
            first = next(iter(files.tensors))
            known = ", ".join(names.LAYOUTS)
            report.add(
                "unknown", f"no tensor name ({first}, ...) belongs to a supported layout ({known})"
            )
        report.raise_if_any(folder)
        raise AssertionError("no tensors and no problem")
    if config.text.tie_word_embeddings:
        expected[_HEAD] = expected[_EMBEDDING]
    stored = _by_path(files, layout, config.vision.num_layers, expected, report)
    infos = _infos(stored, report)
    lost = {names.path_of(name, layout) or name for name in files.lost}
    if config.text.tie_word_embeddings and _HEAD not in stored:
        del expected[_HEAD]
    check_tree(infos, expected, lost if files.complete else expected, report)
    report.raise_if_any(folder)

    if config.text.tie_word_embeddings and _HEAD in stored:
        if not same_data(stored[_HEAD], stored[_EMBEDDING]):
            report.add(
                "tied head",
                f"{stored[_HEAD].name} differs from {stored[_EMBEDDING].name}, and the "
                "configuration ties them; to use both, set tie_word_embeddings to false in "
                "config.json",
            )
        report.raise_if_any(folder)
        del stored[_HEAD], infos[_HEAD], expected[_HEAD]

    def stream(paths: Iterable[str]) -> Iterator[tuple[str, np.ndarray]]:
        for path in paths:
            yield path, read_tensor(stored[path])

    return Weights(
        params={path: info for path, info in infos.items() if path in expected},
        carried={path: info for path, info in infos.items() if path not in expected},
        stream=stream,
        part=lambda path, index: read_tensor(stored[path], index),
    )


def _by_path(
    files: SafetensorsSet,
    layout: str,
    vision_layers: int,
    expected: Iterable[str],
    report: Report,
) -> dict[str, StoredTensor]:
    """Maps paths to the tensors that are parameters or carried.

    Unknown and duplicate names are reported.
    """
    expected = frozenset(expected)
    found: dict[str, list[StoredTensor]] = defaultdict(list)
    for name, tensor in files.tensors.items():
        path = names.path_of(name, layout)
        if path is not None and (path in expected or names.is_carried(path, vision_layers)):
            found[path].append(tensor)
        elif not names.is_dropped(name):
            report.add("unknown", f"{name} ({tensor.dtype} {list(tensor.shape)})")
    for path, tensors in found.items():
        if len(tensors) > 1:
            report.add("duplicate", f"{' and '.join(t.name for t in tensors)} are both {path}")
    return {path: tensors[0] for path, tensors in found.items()}


def _infos(stored: dict[str, StoredTensor], report: Report) -> dict[str, TensorInfo]:
    """Returns shapes and dtypes; tensors not in float32, float16 or bfloat16 are reported."""
    infos = {}
    for path, tensor in stored.items():
        if tensor.dtype not in DTYPES:
            report.add(
                "wrong dtype", f"{tensor.name} is {tensor.dtype}; supported are {', '.join(DTYPES)}"
            )
        infos[path] = TensorInfo(tensor.shape, DTYPES.get(tensor.dtype, DTYPES["F32"]))
    return infos
