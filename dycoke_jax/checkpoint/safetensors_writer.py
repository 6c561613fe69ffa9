"""Writes safetensors files one tensor at a time, which the format's own library cannot do.

A file consists of the length of the header (8 bytes, little endian), the header (JSON that maps
each name to dtype, shape and offsets in the data), and the data without gaps.
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np

from dycoke_jax.checkpoint.safetensors_reader import INDEX, SINGLE
from dycoke_jax.checkpoint.tensors import DTYPES, TensorInfo

_CODES = {dtype: code for code, dtype in DTYPES.items()}


def write_safetensors(
    folder: Path,
    infos: Mapping[str, TensorInfo],
    arrays: Iterator[np.ndarray],
    max_shard_bytes: int,
) -> None:
    """Writes ``model.safetensors``, or shards and an index if that file would exceed the limit.

    Args:
        folder: an existing folder.
        infos: shape and dtype of every tensor by its name in the file. 32-bit tensors come first,
            so that each tensor starts at a multiple of its element size.
        arrays: the tensors' data in the same order; one is held at a time.
        max_shard_bytes: largest tensor data of a file, in bytes. A tensor larger than that gets a
            file of its own.
    """
    shards = _shards(infos, max_shard_bytes)
    files = [f"model-{i:05}-of-{len(shards):05}.safetensors" for i in range(1, len(shards) + 1)]
    if len(shards) == 1:
        files = [SINGLE]
    for file, shard in zip(files, shards, strict=True):
        _write_file(folder / file, shard, arrays)
    # Besides checking the count, this runs the generator behind the arrays to its end.
    assert next(arrays, None) is None
    if len(shards) > 1:
        where = {name: file for file, shard in zip(files, shards, strict=True) for name in shard}
        sizes = [info.nbytes for info in infos.values()]
        counts = [info.nbytes // info.dtype.itemsize for info in infos.values()]
        index = {
            "metadata": {"total_parameters": sum(counts), "total_size": sum(sizes)},
            "weight_map": dict(sorted(where.items())),
        }
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _shards(infos: Mapping[str, TensorInfo], limit: int) -> list[dict[str, TensorInfo]]:
    shards: list[dict[str, TensorInfo]] = [{}]
    size = 0
    for name, info in infos.items():
        if shards[-1] and size + info.nbytes > limit:
            shards.append({})
            size = 0
        shards[-1][name] = info
        size += info.nbytes
    return shards


def _write_file(path: Path, infos: Mapping[str, TensorInfo], arrays: Iterator[np.ndarray]) -> None:
    # transformers rejects files without this entry.
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, info in infos.items():
        end = offset + info.nbytes
        header[name] = {
            "dtype": _CODES[info.dtype],
            "shape": list(info.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little"))
        file.write(text)
        for info in infos.values():
            array = next(arrays)
            assert (array.shape, array.dtype) == (info.shape, info.dtype)
            file.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
