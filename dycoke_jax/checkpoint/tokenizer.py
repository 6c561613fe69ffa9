"""Loads a checkpoint's tokenizer."""

from collections.abc import Iterator
from contextlib import contextmanager
from os import PathLike, fspath
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from tokenizers import AddedToken

from dycoke_jax.checkpoint.regular_files import check_files
from dycoke_jax.errors import CheckpointError, PromptError, printable
from dycoke_jax.files import copy_text, has_byte_order_mark, read_json_object
from dycoke_jax.inputs.prompts import Tokenizer, control_ids

CONTROL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<image>", "<video>")
"""ChatML's control tokens and the image and video placeholders."""


def load_tokenizer(folder: str | PathLike[str]) -> Tokenizer:
    """Loads a checkpoint's tokenizer from a local folder, without network access or remote code.

    Args:
        folder: a folder with ``tokenizer.json``, or ``vocab.json`` and ``merges.txt`` together with
            ``tokenizer_config.json``.

    Returns:
        A fast tokenizer of transformers. Those of ``CONTROL_TOKENS`` that it has are special
        tokens, which decoding can skip, also where the files do not mark them as special.

    Raises:
        CheckpointError: if the folder or the tokenizer in it does not exist or cannot be loaded,
            or if the tokenizer has no fast implementation or lacks the ChatML control tokens.
    """
    # Imported here because transformers takes seconds to import, and imports torch if installed.
    from transformers import AutoTokenizer, Qwen2Tokenizer

    files = Path(folder)
    if not files.is_dir():
        raise CheckpointError(f"{fspath(folder)}: no such folder to load a tokenizer from")
    check_files(files)
    options: dict[str, Any] = {}
    if (files / "tokenizer.json").exists():
        kind: Any = AutoTokenizer
        options = _model_class(files)
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
        with _without_byte_order_marks(files) as readable:
            tokenizer = kind.from_pretrained(
                fspath(readable), local_files_only=True, trust_remote_code=False, **options
            )
    except Exception as error:  # transformers and tokenizers raise many types, plain Exception too
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        reason = printable(reason[:300])
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
    _mark_control_tokens(tokenizer)
    return tokenizer


def _model_class(folder: Path) -> dict[str, Any]:
    """Returns the class of the model as an argument of ``AutoTokenizer``, which chooses by it.

    Without it, ``AutoTokenizer`` reads all of ``config.json`` and may fail at a field that has
    nothing to do with the tokenizer. Empty if transformers does not know the class.
    """
    from transformers import CONFIG_MAPPING, AutoConfig

    path = folder / "config.json"
    settings = read_json_object(path) if path.exists() else {}
    name = settings.get("model_type")
    if not isinstance(name, str) or name not in CONFIG_MAPPING:
        return {}
    return {"config": AutoConfig.for_model(name, tokenizer_class=settings.get("tokenizer_class"))}


@contextmanager
def _without_byte_order_marks(folder: Path) -> Iterator[Path]:
    """Yields a folder with the text files of the given one, none with a byte order mark.

    It is the given folder itself if none of its files has one. transformers and tokenizers fail at
    such a mark.
    """
    patterns = ("*.json", "*.txt", "*.jinja")
    files = [file for pattern in patterns for file in folder.glob(pattern) if file.is_file()]
    if not any(map(has_byte_order_mark, files)):
        yield folder
        return
    with TemporaryDirectory() as copies:
        for file in files:
            copy_text(file, Path(copies) / file.name)
        yield Path(copies)


def _mark_control_tokens(tokenizer: Tokenizer) -> None:
    """Makes special tokens of the control tokens that a tokenizer has; the ids stay the same."""
    backend = tokenizer.backend_tokenizer
    added = backend.get_added_tokens_decoder()
    for content in CONTROL_TOKENS:
        index = backend.token_to_id(content)
        if index is None:
            continue
        # The flags say how a text is searched for the token, which must not change.
        old = added.get(index, AddedToken(content, normalized=False))
        flags = {flag: getattr(old, flag) for flag in _SEARCH_FLAGS}
        backend.add_special_tokens([AddedToken(content, special=True, **flags)])


_SEARCH_FLAGS = ("single_word", "lstrip", "rstrip", "normalized")
