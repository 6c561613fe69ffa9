"""Writes safetensors files tensor by tensor; the format's own library wants a whole file at once.

A file is the length of the header (8 bytes, little endian), the header (JSON: name -> dtype, shape,
offsets in the data), and the data without gaps.
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
    """Writes ``model.safetensors``, or shards and their index when it would exceed the limit.

    Args:
        folder: an existing folder.
        infos: name, shape and dtype of every tensor, 32-bit ones first, so that each starts at a
            multiple of its element's size.
        arrays: their data, in the same order; held one at a time.
        max_shard_bytes: limit of the tensor data of a file. A tensor larger than that gets a file
            of its own.
    """
    shards = _shards(infos, max_shard_bytes)
    files = [f"model-{i:05}-of-{len(shards):05}.safetensors" for i in range(1, len(shards) + 1)]
    if len(shards) == 1:
        files = [SINGLE]
    for file, shard in zip(files, shards, strict=True):
        _write_file(folder / file, shard, arrays)
    assert next(arrays, None) is None  # and so the stream's own end is reached
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
    # transformers refuses files without this entry.
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
