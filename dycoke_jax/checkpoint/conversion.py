"""Converts checkpoints to Orbax, and exports them to the llava-hf layout."""

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
from jax.typing import DTypeLike

from dycoke_jax.checkpoint.end_ids import copy_end_ids
from dycoke_jax.checkpoint.folder import CONFIG, open_folder
from dycoke_jax.checkpoint.hf_config import llava_hf_config
from dycoke_jax.checkpoint.names import POST_NORM, llava_hf_name
from dycoke_jax.checkpoint.orbax_folder import write_orbax
from dycoke_jax.checkpoint.report import warn_non_finite
from dycoke_jax.checkpoint.safetensors_writer import write_safetensors
from dycoke_jax.checkpoint.tensors import (
    INT8,
    Weights,
    check_storage,
    is_finite,
    prepare,
    weight_dtype,
)
from dycoke_jax.config import Storage
from dycoke_jax.errors import CheckpointError
from dycoke_jax.files import absent, copy_text, read_json_object, staged_folder
from dycoke_jax.models.quantisation import scale_path
from dycoke_jax.progress import BYTES, Progress

_COMPANIONS = (
    "tokenizer*.json",
    "vocab.json",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.*",
    "preprocessor_config.json",
    "processor_config.json",
    "video_preprocessor_config.json",
    "generation_config.json",
)
"""Files copied along with the weights: tokenizer, processors, generation settings."""


def convert(
    src: str | Path,
    dst: str | Path,
    dtype: DTypeLike | None = None,
    progress: Progress | None = None,
    weights: Storage | None = None,
) -> tuple[str, ...]:
    """Converts a checkpoint to a folder with an Orbax checkpoint.

    The tensors are bit-identical to the source's unless ``dtype`` casts them or ``weights``
    quantises them. ``dst`` receives the
    source's ``config.json`` unchanged, the tokenizer and processor files, and ``params/``. Host
    memory holds a few tensors at a time, whatever the size of the model.

    Args:
        src: folder or hub id of a checkpoint, in any layout.
        dst: a folder that does not exist yet; it is created once everything is written.
        dtype: float32, float16 or bfloat16; None leaves the dtype of each tensor unchanged.
            Matrices that are int8 in the source stay int8.
        progress: called after each tensor; counts bytes as stored in the source.
        weights: ``int8`` quantises the matrices of the language model; None leaves them as stored.

    Returns:
        The notes on ``src`` (see ``Folder.notes``).

    Raises:
        CheckpointError: if ``dst`` exists or cannot be written, or with a list of all problems of
            ``src``.
        ConfigError: if the model is not supported.

    Warns:
        CheckpointWarning: once, naming the tensors that hold NaN or infinity.
    """
    destination, wanted = absent(dst), weight_dtype(dtype)
    check_storage("weights", weights)
    source = open_folder(src)
    stored = source.weights()
    not_finite: list[str] = []
    with staged_folder(destination) as target:
        copy_companions(source.path, target)
        copy_text(source.path / CONFIG, target / CONFIG)
        paths = [*stored.params, *stored.carried]
        tensors = _prepared(stored, paths, wanted, progress, not_finite, weights)
        write_orbax(target, tensors, {*stored.params, *map(scale_path, stored.params)})
    warn_non_finite(source.path, not_finite)
    return source.notes


def export(
    src: str | Path,
    dst: str | Path,
    dtype: DTypeLike | None = None,
    max_shard_bytes: int = 5_000_000_000,
    progress: Progress | None = None,
) -> tuple[str, ...]:
    """Writes a checkpoint in the llava-hf layout, as transformers saves it.

    The tensors are bit-identical to the source's unless ``dtype`` casts them. Two things are
    generated where the source lacks them: the vision tower's final layer norm, with scale 1 and
    shift 0 (transformers requires the weights but does not use the norm's output), and a llava-hf
    ``config.json`` where the source's is in the lmms-lab format.

    Args:
        src: folder or hub id of a checkpoint, in any layout, or a converted folder.
        dst: a folder that does not exist yet; it is created once everything is written.
        dtype: float32, float16 or bfloat16; None leaves the dtype of each tensor unchanged.
        max_shard_bytes: largest tensor data of a file, in bytes; beyond it the tensors are split
            into shards with an index.
        progress: called after each tensor; counts bytes as stored in the source.

    Returns:
        The notes on ``src`` (see ``Folder.notes``).

    Raises:
        CheckpointError: if ``dst`` exists or cannot be written, or with a list of all problems of
            ``src``, or if its weights are int8.
        ConfigError: if the model is not supported.

    Warns:
        CheckpointWarning: once, naming the tensors that hold NaN or infinity.
    """
    destination, wanted = absent(dst), weight_dtype(dtype)
    source = open_folder(src)
    source_config = read_json_object(source.path / CONFIG)
    is_llava_hf = source_config["model_type"] == "llava_onevision"
    weights = with_post_norm(source.weights())
    if any(info.dtype == INT8 for info in weights.params.values()):
        raise CheckpointError(
            f"{source.path} has int8 weights, which the llava-hf layout cannot hold; export the "
            "checkpoint that it was converted from"
        )
    if not is_llava_hf:
        # The generated configuration describes neither the pooling head nor the blocks not run.
        weights = replace(weights, carried={path: weights.carried[path] for path in POST_NORM})
    infos = {
        path: replace(info, dtype=wanted or info.dtype)
        for path, info in {**weights.params, **weights.carried}.items()
    }
    paths = sorted(infos, key=lambda path: -infos[path].dtype.itemsize)
    main_dtype = infos["language_model.embed_tokens.weight"].dtype
    not_finite: list[str] = []
    with staged_folder(destination) as target:
        copy_companions(source.path, target)
        if is_llava_hf:
            _copy_config(source.path, target, source_config, main_dtype)
        else:
            write_config(target, {**llava_hf_config(source.config), "dtype": main_dtype.name})
            copy_end_ids(source.path, target, source.config.text.vocab_size)
        tensors = _prepared(weights, paths, wanted, progress, not_finite)
        write_safetensors(
            target,
            {llava_hf_name(path): infos[path] for path in paths},
            (array for _, array in tensors),
            max_shard_bytes,
        )
    warn_non_finite(source.path, not_finite)
    return source.notes


def _prepared(
    weights: Weights,
    paths: list[str],
    dtype: np.dtype | None,
    progress: Progress | None,
    not_finite: list[str],
    storage: Storage | None = None,
) -> Iterator[tuple[str, np.ndarray]]:
    """Yields tensors ready to be written, and their paths (see ``tensors.prepare``).

    Appends the paths of tensors with NaN or infinity to ``not_finite``.

    ``progress`` is called for a tensor once the consumer asks for the next one.
    """
    infos = {**weights.params, **weights.carried}
    total, done = sum(infos[path].nbytes for path in paths), 0
    for path, array in weights.stream(paths):
        for name, ready in prepare(path, array, dtype, storage):
            if not is_finite(ready):
                not_finite.append(path)
            yield name, ready
        del array, ready  # Free it before the next is read: it may be the largest of the model.
        done += infos[path].nbytes
        if progress:
            progress("converting" + BYTES, done, total)


def with_post_norm(weights: Weights) -> Weights:
    """Adds an identity final layer norm of the vision tower where the source has none.

    Its scale is 1 and its shift 0, with the shape and dtype of the first block's norm.
    """
    like = weights.params["vision_tower.layers.0.layer_norm1.weight"]
    made = {path: like for path in POST_NORM if path not in weights.carried}

    def stream(paths: Iterable[str]) -> Iterator[tuple[str, np.ndarray]]:
        for is_made, group in groupby(paths, made.__contains__):
            if is_made:
                for path in group:
                    yield path, np.full(like.shape, path.endswith("weight"), like.dtype)
            else:
                yield from weights.stream(list(group))

    return Weights(weights.params, {**weights.carried, **made}, stream)


def _copy_config(source: Path, target: Path, config: Mapping[str, Any], dtype: np.dtype) -> None:
    """Copies ``config.json``, rewritten only if its dtype differs from that of the weights."""
    if all(config.get(key, dtype.name) == dtype.name for key in _DTYPE_KEYS):
        copy_text(source / CONFIG, target / CONFIG)
    else:
        write_config(target, _with_dtype(config, dtype.name))


# transformers casts the weights that it loads to this dtype; version 4 writes the first key,
# version 5 the second.
_DTYPE_KEYS = ("torch_dtype", "dtype")


def _with_dtype(config: Mapping[str, Any], name: str) -> dict[str, Any]:
    def change(key: str, value: Any) -> Any:
        if key in ("text_config", "vision_config") and isinstance(value, Mapping):
            return _with_dtype(value, name)
        return name if key in _DTYPE_KEYS else value

    return {key: change(key, value) for key, value in config.items()}


def write_config(folder: Path, config: Mapping[str, Any]) -> None:
    """Writes ``config.json`` into a folder."""
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def copy_companions(source: Path, target: Path) -> None:
    """Copies the tokenizer, processor, chat template and generation settings files."""
    for pattern in _COMPANIONS:
        for file in source.glob(pattern):
            if file.is_file():
                copy_text(file, target / file.name)
