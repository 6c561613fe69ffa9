"""Files that appear complete or not at all."""

import os
import secrets
from pathlib import Path

from dycoke_jax.errors import OutputError


def write_file(path: Path, content: bytes) -> None:
    """Writes a file, or leaves what was there before.

    Raises:
        OutputError: if the folder is missing or does not let it.
    """
    temporary = path.parent / f".{path.name}.tmp-{secrets.token_hex(4)}"
    try:
        temporary.write_bytes(content)
        temporary.replace(path)
    except OSError as error:
        raise OutputError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        temporary.unlink(missing_ok=True)


def check_place(path: Path) -> None:
    """Refuses, before long work, a path where ``write_file`` is bound to fail.

    Raises:
        OutputError: if the folder is missing or not writable, or the path is a folder.
    """
    folder = path.parent
    if not folder.is_dir():
        raise OutputError(f"cannot write {path}: there is no folder {folder}")
    if path.is_dir():
        raise OutputError(f"cannot write {path}: it is a folder")
    if not os.access(folder, os.W_OK):
        raise OutputError(f"cannot write {path}: {folder} is not writable")
