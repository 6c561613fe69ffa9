"""The weights of a Hugging Face folder, in any layout, checked against a configuration."""

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
    """Opens and checks the safetensors files of a folder; reads headers only.

    One exception to that: where the configuration ties the head to the embedding and the files hold
    a head all the same, the two are compared, and the copy is left out.

    Raises:
        CheckpointError: listing every file that cannot be read and every tensor that is missing,
            unknown, there twice, or of a wrong shape or dtype.
    """
    report = Report()
    expected = {path: leaf.shape for path, leaf in abstract_params(config).items()}
    files = open_safetensors(folder, report)
    layout = names.detect_layout(files.tensors) if files.tensors else None
    if layout is None:
        if files.tensors:
            first = next(iter(files.tensors))
            known = ", ".join(names.LAYOUTS)
            report.add("unknown", f"none of the names ({first}, ...) is of a layout read ({known})")
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
                "configuration says that they are one; if both are wanted, set "
                "tie_word_embeddings to false in config.json",
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
    )


def _by_path(
    files: SafetensorsSet,
    layout: str,
    vision_layers: int,
    expected: Iterable[str],
    report: Report,
) -> dict[str, StoredTensor]:
    """The tensors that are parameters or carried, by path; reports unknown and duplicate names."""
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
    """Shapes and dtypes; reports tensors that are not float32, float16 or bfloat16."""
    infos = {}
    for path, tensor in stored.items():
        if tensor.dtype not in DTYPES:
            report.add(
                "wrong dtype", f"{tensor.name} is {tensor.dtype}; read are {', '.join(DTYPES)}"
            )
        infos[path] = TensorInfo(tensor.shape, DTYPES.get(tensor.dtype, DTYPES["F32"]))
    return infos
