"""The token ids that end an answer, in the settings of a checkpoint."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dycoke_jax.checks import shown
from dycoke_jax.errors import CheckpointError
from dycoke_jax.files import read_json_object

_GENERATION, _MODEL, _KEY = "generation_config.json", "config.json", "eos_token_id"


def read_end_ids(folder: Path, vocab_size: int) -> tuple[tuple[int, ...], tuple[str, ...]]:
    """Reads ``eos_token_id`` where transformers finds it.

    ``generation_config.json`` alone counts if the folder has that file. Otherwise the entry of
    ``config.json`` counts, or if that is absent or null, the one of its ``text_config``.

    Args:
        folder: the checkpoint's folder, with ``config.json``.
        vocab_size: size of the model's vocabulary.

    Returns:
        The ids in the order of the file, without those outside the vocabulary; and a note on each
        set of ids that was left out.

    Raises:
        CheckpointError: if the entry is neither an id nor a list of ids, or the file cannot be
            read.
    """
    file = _GENERATION if (folder / _GENERATION).exists() else _MODEL
    settings = read_json_object(folder / file)
    entry = settings.get(_KEY)
    text = settings.get("text_config")
    if entry is None and file == _MODEL and isinstance(text, Mapping):
        entry = text.get(_KEY)
    ids = _ids(entry, folder / file)
    outside = [token for token in ids if not 0 <= token < vocab_size]
    notes: tuple[str, ...] = ()
    if outside:
        listed = ", ".join(map(shown, outside[:10])) + (", ..." if outside[10:] else "")
        notes = (
            f"{_KEY} of {file} holds ids outside the vocabulary of {vocab_size} tokens, which are "
            f"left out: {listed}",
        )
    return tuple(token for token in ids if 0 <= token < vocab_size), notes


def copy_end_ids(source: Path, target: Path, vocab_size: int) -> None:
    """Gives the ids of ``config.json`` to a folder whose own ``config.json`` is not a copy of it.

    They are written as ``generation_config.json``. A source that has such a file has the ids there,
    and nothing is written.

    Args:
        source: a checkpoint's folder, with ``config.json``.
        target: an existing folder.
        vocab_size: size of the model's vocabulary.

    Raises:
        CheckpointError: as ``read_end_ids`` does.
    """
    if (source / _GENERATION).exists():
        return
    ids, _ = read_end_ids(source, vocab_size)
    if ids:
        text = json.dumps({_KEY: ids}, indent=2) + "\n"
        (target / _GENERATION).write_text(text, encoding="utf-8")


def _ids(entry: Any, file: Path) -> list[int]:
    ids = [] if entry is None else entry if isinstance(entry, list) else [entry]
    if not all(isinstance(token, int) and not isinstance(token, bool) for token in ids):
        raise CheckpointError(
            f"{file}: {_KEY} is {shown(entry)}; it must be a token id or a list of token ids"
        )
    return ids
