"""Refuses what cannot be read safely in a checkpoint's folder: pipes, devices, endless files."""

import stat
from pathlib import Path

from dycoke_jax.errors import CheckpointError

_TEXTS = (".json", ".txt", ".jinja")
_WEIGHTS = ".safetensors"
_VOCABULARIES = ("tokenizer.json", "vocab.json", "merges.txt")
_LARGEST_VOCABULARY, _LARGEST_TEXT = 16_000_000, 4_000_000
"""Bytes; the largest file of Qwen2's tokenizer has 7 million, the index of a 72B model 0.1 million.
Parsed, a text may take 30 times its size."""


def check_files(folder: Path) -> None:
    """Checks the files of a checkpoint before any of them is opened.

    Opening a pipe may wait forever, and a device may be endless. Links may point anywhere, because
    the hub's cache consists of them, but must lead to files.

    Args:
        folder: the checkpoint's folder.

    Raises:
        CheckpointError: naming a file that is neither a regular file nor a folder, or a text file
            that is too large.
    """
    try:
        paths = [path for path in folder.iterdir() if path.suffix in (*_TEXTS, _WEIGHTS)]
    except OSError as error:
        raise CheckpointError(f"{folder} cannot be read ({error.strerror})") from error
    for path in sorted(paths):
        try:
            found = path.stat()
        except OSError:
            continue  # a link to nothing; what needs the file says so
        if not (stat.S_ISREG(found.st_mode) or stat.S_ISDIR(found.st_mode)):
            raise CheckpointError(
                f"{path} is no regular file, but a pipe, socket or device; remove it"
            )
        most = _LARGEST_VOCABULARY if path.name in _VOCABULARIES else _LARGEST_TEXT
        if path.suffix in _TEXTS and stat.S_ISREG(found.st_mode) and found.st_size > most:
            raise CheckpointError(
                f"{path} has {found.st_size / 1e6:.1f} MB, more than the {most / 1e6:.0f} MB that "
                "are read; get the file again or remove it"
            )
