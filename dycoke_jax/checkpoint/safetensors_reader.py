"""Reads a safetensors file, or the shards that an index lists, one tensor at a time."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import ml_dtypes  # noqa: F401  (registers bfloat16 with numpy, so that safetensors can read it)
import numpy as np
from safetensors import SafetensorError, safe_open

from dycoke_jax.checkpoint.report import Report
from dycoke_jax.errors import CheckpointError
from dycoke_jax.files import parse_json, read_json_object

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
_ADAPTER = "adapter_config.json"
_PICKLES = (".bin", ".pth", ".pt", ".ckpt")
_MOST_SHARDS = 10_000
_LARGEST_HEADER = 5_000_000
"""Bytes; a tensor takes about 120 of them, and a model of 72 billion weights has 1,500 tensors."""


@dataclass(frozen=True)
class StoredTensor:
    """Location, shape and dtype of a stored tensor; ``dtype`` is a safetensors code (BF16)."""

    file: Path
    name: str
    shape: tuple[int, ...]
    dtype: str


@dataclass(frozen=True)
class SafetensorsSet:
    """The headers of a checkpoint's files.

    Attributes:
        tensors: the readable tensors by name, in the order of the files and of the data in them.
        lost: names in the index whose tensors cannot be read; they are already reported.
        complete: False if a file cannot be read and no index lists its tensors, so that the
            missing ones are unknown.
    """

    tensors: Mapping[str, StoredTensor]
    lost: frozenset[str] = frozenset()
    complete: bool = True


@dataclass(frozen=True)
class _Files:
    """The files to read.

    Attributes:
        promised: for each file name, the tensor names that the index lists for it; empty sets
            without an index.
        indexed: whether there is an index.
        refused: tensor names for which the index gives a file outside the folder.
    """

    promised: dict[str, set[str]]
    indexed: bool = False
    refused: frozenset[str] = frozenset()


def open_safetensors(folder: Path, report: Report) -> SafetensorsSet:
    """Reads the headers of the safetensors files of a checkpoint, and no tensor data.

    As in transformers, these are the shards that the index names, or ``model.safetensors`` if there
    is no index.

    Args:
        folder: folder with one safetensors file, or with shards.
        report: receives a problem for each file or tensor that cannot be read.

    Raises:
        CheckpointError: if the folder has neither file, or its index cannot be read.
    """
    files = _files(folder, report)
    tensors: dict[str, StoredTensor] = {}
    lost = set(files.refused)
    complete = True
    for file, promised in files.promised.items():
        try:
            header = _header(folder / file)
        except FileNotFoundError:
            what = "is a link to a file that does not exist"
            if files.indexed:
                what = f"is missing; the index puts {len(promised)} tensors there"
            report.add("file", f"{file} {what}")
            lost |= promised
            continue
        except (SafetensorError, OSError, ValueError) as error:
            report.add("file", f"{file} is truncated or damaged ({error})")
            lost |= promised
            complete &= files.indexed
            continue
        for name in sorted(promised - header.keys()):
            report.add("index", f"{INDEX} puts {name} in {file}, which lacks it")
        lost |= promised - header.keys()
        for name, tensor in header.items():
            if name in tensors:
                report.add("duplicate", f"{name} is in {tensors[name].file.name} and in {file}")
            else:
                tensors[name] = tensor
    return SafetensorsSet(tensors, frozenset(lost - tensors.keys()), complete)


def read_tensor(tensor: StoredTensor, part: tuple[slice, ...] | None = None) -> np.ndarray:
    """Reads a tensor's data into a new array.

    Args:
        tensor: the tensor.
        part: a slice of each axis, of which alone the data is read; None for all.

    Raises:
        CheckpointError: if the file cannot be read or no longer holds the tensor.
    """
    try:
        # The file is mapped anew for each tensor: pages that were read count as memory in use until
        # the mapping is closed, and would add up to the whole file.
        with safe_open(tensor.file, framework="numpy") as file:
            if part is None:
                return file.get_tensor(tensor.name)
            return file.get_slice(tensor.name)[part]
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{tensor.file}: cannot read {tensor.name} ({error})") from error


def same_data(a: StoredTensor, b: StoredTensor, rows: int = 4096) -> bool:
    """Whether two stored tensors are bit-identical.

    Args:
        a: one tensor, of at least one dimension.
        b: the other tensor.
        rows: number of rows of each that are read at a time, to bound memory.

    Raises:
        CheckpointError: if a file cannot be read.
    """
    if (a.shape, a.dtype) != (b.shape, b.dtype):
        return False
    try:
        with safe_open(a.file, framework="numpy") as first, safe_open(b.file, "numpy") as second:
            one, other = first.get_slice(a.name), second.get_slice(b.name)
            pieces = [slice(i, min(i + rows, a.shape[0])) for i in range(0, a.shape[0], rows)]
            return all(one[piece].tobytes() == other[piece].tobytes() for piece in pieces)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"cannot read {a.name} and {b.name} ({error})") from error


def _header(path: Path) -> dict[str, StoredTensor]:
    """Reads the header of a file.

    Raises:
        OSError: if it is missing or cannot be read.
        SafetensorError: if it does not fit the file.
        ValueError: if the path is no file's, or if the header is too large or names a tensor twice.
    """
    if path.exists() and not path.is_file():  # opening a pipe may wait forever
        raise ValueError("it is no regular file")
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        if size > _LARGEST_HEADER:
            raise ValueError(f"its header has {size} bytes, and at most {_LARGEST_HEADER} are read")
        header = file.read(size)
    with safe_open(path, framework="numpy") as file:
        slices = {name: file.get_slice(name) for name in file.offset_keys()}
        found = {
            name: StoredTensor(path, name, tuple(piece.get_shape()), piece.get_dtype())
            for name, piece in slices.items()
        }
    parse_json(header)  # safetensors takes the last of several tensors of one name
    return found


def left_aside(folder: Path) -> list[str]:
    """Returns the names of a folder's safetensors files that are not read, in order.

    Such files are adapters, states of an optimizer, half-precision variants and copies.

    Raises:
        CheckpointError: if the index cannot be read.
    """
    read = {SINGLE}
    if (folder / INDEX).exists():
        read |= _read_index(folder, Report()).promised.keys()
    return [name for name in safetensors_names(folder) if name not in read]


def safetensors_names(folder: Path) -> list[str]:
    """Returns the names of a folder's safetensors files, read or not, in order."""
    return sorted(
        path.name
        for path in folder.glob("*.safetensors")
        if not path.name.startswith(".") and not path.is_dir()
    )


def _files(folder: Path, report: Report) -> _Files:
    names = safetensors_names(folder)
    if (folder / INDEX).exists():
        files = _read_index(folder, report)
        # transformers would read the single file, and draw at random what it lacks.
        if SINGLE in names and SINGLE not in files.promised:
            report.add("file", f"both {SINGLE} and {INDEX} are here; remove the one that is stale")
        return files
    if SINGLE not in names:
        raise CheckpointError(_no_weights(folder, names))
    return _Files({SINGLE: set()})


def _read_index(folder: Path, report: Report) -> _Files:
    weight_map = read_json_object(folder / INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{folder / INDEX} has no weight_map from tensor to file")
    shards = {file for file in weight_map.values() if isinstance(file, str)}
    if len(shards) > _MOST_SHARDS:
        raise CheckpointError(
            f"{folder / INDEX} names {len(shards)} files; at most {_MOST_SHARDS} are read"
        )
    promised: dict[str, set[str]] = {}
    refused: set[str] = set()
    for name, file in weight_map.items():
        # A file that an index names must lie in the folder, so that a downloaded index cannot make
        # this package open other files. Links in the folder may point anywhere, because the hub's
        # cache consists of them.
        path = Path(file) if isinstance(file, str) else Path()
        if path.name and not path.is_absolute() and ".." not in path.parts:
            promised.setdefault(path.as_posix(), set()).add(name)
        else:
            report.add("index", f"{INDEX} puts {name} in {file!r}, which is not in this folder")
            refused.add(name)
    return _Files(promised, indexed=True, refused=frozenset(refused))


def _no_weights(folder: Path, names: list[str]) -> str:
    if names and (folder / _ADAPTER).exists():
        return (
            f"{folder} holds an adapter ({names[0]}) without its model; merge the two (in peft: "
            "merge_and_unload, then save_pretrained) and give the folder of the result"
        )
    if names:
        return (
            f"{folder} has neither {SINGLE} nor {INDEX}, and other files ({names[0]}) are not read "
            f"as its weights; rename the file to {SINGLE} if it is the whole model, or add the "
            "index of the shards"
        )
    pickles = sorted(p.name for p in folder.iterdir() if p.suffix in _PICKLES)
    if pickles:
        return (
            f"{folder} holds its weights as pickles ({pickles[0]}), which can run code and are not "
            "read; convert each with safetensors.torch.save_file(torch.load(file, "
            "weights_only=True), 'model.safetensors') where torch is installed"
        )
    return f"{folder} holds no *.safetensors files (and no converted params/ folder)"
