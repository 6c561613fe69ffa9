"""The Orbax checkpoint of a converted folder: ``{"params": {path: array}, "carried": {...}}``."""

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from orbax.checkpoint import v1 as ocp

from dycoke_jax.checkpoint import names
from dycoke_jax.checkpoint.report import Report
from dycoke_jax.checkpoint.tensors import DTYPES, TensorInfo, Weights, check_tree
from dycoke_jax.config import LlavaConfig
from dycoke_jax.errors import CheckpointError
from dycoke_jax.models.llava import abstract_params

PARAMS = "params"
"""Name of the Orbax checkpoint's folder, and of the tree in it that the model uses."""
_CARRIED = "carried"

# Tensors are written and read in groups of about these sizes (a larger one is a group of its own):
# large enough to keep Orbax's threads busy, small enough that the host never holds a model.
# Each group written costs a merge at the end; groups read leave holes in the heap, so are smaller.
_WRITE_BYTES = 256 * 2**20
_READ_BYTES = 64 * 2**20
# A device that restores its part of an array reads the chunks that hold it.
_CHUNK_BYTES = 64 * 2**20


def write_orbax(folder: Path, tensors: Iterable[tuple[str, np.ndarray]], used: set[str]) -> None:
    """Writes ``folder/params`` from a stream of tensors, in bounded host memory.

    Args:
        folder: an existing folder.
        tensors: path and array of every tensor.
        used: the paths that the model uses; the others go to the tree of carried tensors.
    """
    target = folder / PARAMS
    group: dict[str, np.ndarray] = {}
    for path, array in tensors:
        if group and _size(group) + array.nbytes > _WRITE_BYTES:
            _write_group(target, group, used)
            group = {}
        group[path] = array
    _write_group(target, group, used)
    with _context():
        _guarded(target, "write", ocp.partial.finalize, target)


def _write_group(target: Path, group: Mapping[str, np.ndarray], used: set[str]) -> None:
    tree: dict[str, dict[str, np.ndarray]] = {}
    for path, array in group.items():
        tree.setdefault(PARAMS if path in used else _CARRIED, {})[path] = array
    with _context():
        _guarded(target, "write", ocp.partial.save, target, tree)


def orbax_weights(folder: Path, config: LlavaConfig) -> Weights:
    """Opens and checks the Orbax checkpoint of a converted folder; reads no tensor data.

    Raises:
        CheckpointError: when it is damaged, or listing every parameter that is missing, unknown or
            of a wrong shape.
    """
    tree = _tree(folder / PARAMS)
    expected = {path: leaf.shape for path, leaf in abstract_params(config).items()}
    params, carried = tree.get(PARAMS, {}), tree.get(_CARRIED, {})
    report = Report()
    for path in params:
        if path not in expected:
            report.add("unknown", path)
    for path in carried:
        if not names.is_carried(path, config.vision.num_layers):
            report.add("unknown", f"{path} (among the carried tensors)")
    for path, info in (params | carried).items():
        if info.dtype not in DTYPES.values():
            report.add("wrong dtype", f"{path} is {info.dtype}")
    check_tree(params, expected, (), report)
    report.raise_if_any(folder)

    def stream(paths: Iterable[str]) -> Iterator[tuple[str, np.ndarray]]:
        infos = params | carried
        for group in _groups(paths, infos):
            wanted = {path: np.empty(infos[path].shape, infos[path].dtype) for path in group}
            yield from _read_group(folder / PARAMS, wanted, params.keys()).items()

    return Weights(params, carried, stream)


def restore_params(
    folder: Path, infos: Mapping[str, TensorInfo], targets: Mapping[str, jax.ShapeDtypeStruct]
) -> Iterator[tuple[str, jax.Array]]:
    """Reads parameters from disk to where they are wanted, each device its own part only.

    Args:
        folder: a converted folder.
        infos: what is stored, as ``orbax_weights`` says.
        targets: shape, dtype and sharding wanted, by path; other dtypes than the stored are cast.
    """
    for group in _groups(targets, infos):
        wanted = {path: targets[path] for path in group}
        yield from _read_group(folder / PARAMS, wanted, targets.keys()).items()


def _tree(folder: Path) -> dict[str, dict[str, TensorInfo]]:
    with _context():
        tree = _guarded(folder, "read", lambda: ocp.metadata(folder).metadata)
    try:
        return {
            section: {
                path: TensorInfo(tuple(leaf.shape), np.dtype(leaf.dtype))
                for path, leaf in leaves.items()
            }
            for section, leaves in tree.items()
        }
    except (AttributeError, TypeError) as error:
        raise CheckpointError(
            f"{folder} is not an Orbax checkpoint that this package wrote, or is damaged; convert "
            "the source again"
        ) from error


def _groups(paths: Iterable[str], infos: Mapping[str, TensorInfo]) -> Iterator[list[str]]:
    group: list[str] = []
    size = 0
    for path in paths:
        if group and size + infos[path].nbytes > _READ_BYTES:
            yield group
            group, size = [], 0
        group.append(path)
        size += infos[path].nbytes
    if group:
        yield group


def _read_group(folder: Path, wanted: Mapping[str, Any], used: Iterable[str]) -> dict[str, Any]:
    """Reads some leaves; ``wanted`` holds numpy arrays or ShapeDtypeStructs to say what they be."""
    tree: dict[str, dict[str, Any]] = {}
    for path, leaf in wanted.items():
        tree.setdefault(PARAMS if path in used else _CARRIED, {})[path] = leaf
    with _context():
        read = _guarded(folder, "read", ocp.load, folder, tree)
    # In the order asked for, which Orbax does not keep.
    return {path: read[PARAMS if path in used else _CARRIED][path] for path in wanted}


def _context() -> ocp.Context:
    context = ocp.Context()
    context.pytree.loading.partial_load = True
    # Nobody writes to the arrays while they are saved, so Orbax needs no copies of them.
    context.memory.deepcopy_host_arrays = False
    context.array.saving.storage_options.chunk_byte_size = _CHUNK_BYTES
    # Weights are noise to a compressor: a fifth smaller, for twice the time to write and to read.
    context.array.saving.use_compression = False
    return context


def _guarded(folder: Path, verb: str, function: Any, *arguments: Any) -> Any:
    try:
        return function(*arguments)
    # Orbax and TensorStore raise ValueError, OSError, their own types and plain Exception for the
    # same causes: damaged files, a full disk, missing rights.
    except Exception as error:
        # The innermost error tells the cause; those around it add pages of specifications.
        inner: BaseException = error
        while inner.__cause__ is not None:
            inner = inner.__cause__
        line = " ".join(str(inner).split())[:300]
        raise CheckpointError(f"cannot {verb} the Orbax checkpoint {folder}: {line}") from error


def _size(group: Mapping[str, np.ndarray]) -> int:
    return sum(array.nbytes for array in group.values())
