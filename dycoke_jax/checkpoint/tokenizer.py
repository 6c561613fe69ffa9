"""Loads a checkpoint's tokenizer."""

from os import PathLike, fspath
from pathlib import Path
from typing import Any

from dycoke_jax.errors import CheckpointError, PromptError
from dycoke_jax.inputs.prompts import Tokenizer, control_ids


def load_tokenizer(folder: str | PathLike[str]) -> Tokenizer:
    """Loads a checkpoint's tokenizer from a local folder, without network access or remote code.

    Args:
        folder: a folder with ``tokenizer.json``, or ``vocab.json`` and ``merges.txt`` together with
            ``tokenizer_config.json``.

    Returns:
        A fast tokenizer of transformers.

    Raises:
        CheckpointError: if the folder or the tokenizer in it does not exist or cannot be loaded,
            or if the tokenizer has no fast implementation or lacks the ChatML control tokens.
    """
    # Imported here because transformers takes seconds to import, and imports torch if installed.
    from transformers import AutoTokenizer, Qwen2Tokenizer

    files = Path(folder)
    if not files.is_dir():
        raise CheckpointError(f"{fspath(folder)}: no such folder to load a tokenizer from")
    if (files / "tokenizer.json").exists():
        kind: Any = AutoTokenizer
    elif (files / "vocab.json").exists() and (files / "merges.txt").exists():
        # AutoTokenizer would choose by the model type in config.json, which in the lmms-lab layout
        # is "llava" and stands for another tokenizer.
        kind = Qwen2Tokenizer
    else:
        raise CheckpointError(
            f"{fspath(folder)}: no tokenizer in this folder; copy tokenizer.json and "
            "tokenizer_config.json of the checkpoint into it"
        )
    try:
        tokenizer = kind.from_pretrained(
            fspath(folder), local_files_only=True, trust_remote_code=False
        )
    except Exception as error:  # transformers and tokenizers raise many types, plain Exception too
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise CheckpointError(
            f"{fspath(folder)}: its tokenizer cannot be loaded ({reason}); copy tokenizer.json and "
            "tokenizer_config.json of the checkpoint again"
        ) from error
    if not isinstance(tokenizer, Tokenizer):
        raise CheckpointError(
            f"{fspath(folder)}: {type(tokenizer).__name__} has no fast implementation; "
            "save it again with a tokenizer.json"
        )
    try:
        control_ids(tokenizer)
    except PromptError as error:
        raise CheckpointError(f"{fspath(folder)}: {error}") from None
    return tokenizer
