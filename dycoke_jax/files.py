"""Files and folders that appear complete or not at all, and JSON files read with a clear error."""

import json
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from dycoke_jax.errors import CheckpointError, DycokeError, OutputError


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


def check_writable(path: Path) -> None:
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


def absent(destination: str | Path) -> Path:
    """The absolute path of a folder that is to be made.

    Raises:
        CheckpointError: if something is there already.
    """
    path = Path(destination).expanduser().absolute()
    if path.exists() or path.is_symlink():
        raise CheckpointError(f"{path} exists already; choose another destination or remove it")
    return path


@contextmanager
def staged_folder(destination: Path) -> Iterator[Path]:
    """A new hidden folder beside the destination, renamed to it when the block ends well.

    The folder is removed when the block raises anything, an interrupt included. A process that is
    killed outright leaves it behind under its hidden name, never at the destination.

    Raises:
        CheckpointError: if the disk does not let it, or the destination has appeared meanwhile.
    """
    temporary = destination.parent / f".{destination.name}.tmp-{secrets.token_hex(4)}"
    try:
        destination.parent.mkdir(parents=True, exist_ok=True)
        temporary.mkdir()
        yield temporary
        temporary.rename(absent(destination))
    except OSError as error:
        raise CheckpointError(f"cannot write {destination}: {error}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def read_json_object(path: Path, error: type[DycokeError] = CheckpointError) -> dict[str, Any]:
    """The object that a JSON file holds.

    Args:
        path: the file.
        error: class of the exception to raise.

    Raises:
        DycokeError: of the class ``error``, if the file is absent, not JSON or not an object.
    """
    try:
        content = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise error(f"{path.parent} has no {path.name}") from None
    except (ValueError, OSError) as cause:
        raise error(f"{path} is not readable as JSON ({cause})") from cause
    if not isinstance(content, dict):
        raise error(f"{path} must hold an object, not {type(content).__name__}")
    return content
