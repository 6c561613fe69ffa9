"""The Orbax checkpoint of a converted folder: ``{"params": {path: array}, "carried": {...}}``."""

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from orbax.checkpoint import v1 as ocp

from dycoke_jax.checkpoint import names
from dycoke_jax.checkpoint.report import Report
from dycoke_jax.checkpoint.tensors import DTYPES, INT8, TensorInfo, Weights, check_tree
from dycoke_jax.config import LlavaConfig
from dycoke_jax.errors import CheckpointError
from dycoke_jax.models.llava import abstract_params
from dycoke_jax.models.quantisation import can_be_int8, scale_path

PARAMS = "params"
"""Name of the folder of the Orbax checkpoint, and of the subtree with the model's parameters."""
_CARRIED = "carried"

# Tensors are read in groups of at most this size (a larger tensor is a group of its own), and
# written in groups as soon as they reach it: large enough to keep Orbax's threads busy, small
# enough that the host never holds the whole model. Writing uses larger groups because Orbax
# combines them at the end, at a cost for each; reading uses smaller ones because every group that
# is freed leaves holes in the heap.
_WRITE_BYTES = 256 * 2**20
_READ_BYTES = 64 * 2**20
# Arrays are stored in chunks of at most this size: a device that restores its shard of an array
# reads only the chunks that overlap it. Smaller ones would fit such shards better, but memory below
# 32 MB is not given back to the system when it is freed.
_CHUNK_BYTES = 64 * 2**20


def write_orbax(folder: Path, tensors: Iterable[tuple[str, np.ndarray]], used: set[str]) -> None:
    """Writes ``folder/params`` from a stream of tensors, in bounded host memory.

    Args:
        folder: an existing folder.
        tensors: path and array of every tensor.
        used: paths of the model's parameters; all other tensors go to the ``carried`` subtree.

    Raises:
        CheckpointError: if the checkpoint cannot be written.
    """
    target = folder / PARAMS
    group: dict[str, np.ndarray] = {}
    for path, array in tensors:
        group[path] = array
        del array
        if sum(one.nbytes for one in group.values()) >= _WRITE_BYTES:
            # Before the next tensor is read: both may be the largest of the model.
            _write_group(target, group, used)
            group = {}
    if group:
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
    """Opens the Orbax checkpoint of a converted folder and checks it, without reading data.

    Args:
        folder: a converted folder.
        config: the configuration that the weights must fit.

    Raises:
        CheckpointError: if the checkpoint is damaged, or with a list of all tensors that are
            missing, unknown, or of a wrong shape or dtype.
    """
    tree = _tree(folder / PARAMS)
    expected = {path: leaf.shape for path, leaf in abstract_params(config).items()}
    params, carried = tree.get(PARAMS, {}), tree.get(_CARRIED, {})
    int8 = [path for path, info in params.items() if info.dtype == INT8 and can_be_int8(path)]
    scales = {scale_path(path): expected[path][:1] for path in int8 if path in expected}
    expected |= scales
    report = Report()
    for path in params:
        if path not in expected:
            report.add("unknown", path)
    for path in carried:
        if not names.is_carried(path, config.vision.num_layers):
            report.add("unknown", f"{path} (among the carried tensors)")
    for path, info in (params | carried).items():
        allowed = [DTYPES["F32"]] if path in scales else DTYPES.values()
        if info.dtype not in allowed and path not in int8:
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
    """Yields parameters restored onto devices; each device reads only its shard.

    Args:
        folder: a converted folder.
        infos: shape and dtype of each stored parameter, from ``orbax_weights``.
        targets: shape, dtype and sharding to restore each path to; a parameter whose stored dtype
            differs is cast.

    Raises:
        CheckpointError: if the checkpoint cannot be read.
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
    """Reads the leaves at the paths of ``wanted``, in that order.

    Its values are numpy arrays to read into, or ShapeDtypeStructs to restore device arrays.
    """
    tree: dict[str, dict[str, Any]] = {}
    for path, leaf in wanted.items():
        tree.setdefault(PARAMS if path in used else _CARRIED, {})[path] = leaf
    with _context():
        read = _guarded(folder, "read", ocp.load, folder, tree)
    # Orbax does not preserve the order of the paths.
    return {path: read[PARAMS if path in used else _CARRIED][path] for path in wanted}


def _context() -> ocp.Context:
    context = ocp.Context()
    context.pytree.loading.partial_load = True
    # The arrays are not modified while they are saved, so Orbax needs no copies of them.
    context.memory.deepcopy_host_arrays = False
    context.array.saving.storage_options.chunk_byte_size = _CHUNK_BYTES
    # Weights compress poorly: files would be a fifth smaller, but take twice as long to write and
    # to read.
    context.array.saving.use_compression = False
    return context


def _guarded(folder: Path, verb: str, function: Any, *arguments: Any) -> Any:
    try:
        return function(*arguments)
    # Orbax and TensorStore raise ValueError, OSError, their own types and plain Exception for the
    # same causes: damaged files, a full disk, missing permissions.
    except Exception as error:
        # The innermost error names the cause; the ones that wrap it add pages of specifications.
        inner: BaseException = error
        while inner.__cause__ is not None:
            inner = inner.__cause__
        line = " ".join(str(inner).split())[:300]
        raise CheckpointError(f"cannot {verb} the Orbax checkpoint {folder}: {line}") from error
