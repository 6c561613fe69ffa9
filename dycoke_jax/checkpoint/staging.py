"""Folders that appear at their place complete or not at all."""

import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from dycoke_jax.errors import CheckpointError


def absent(destination: str | Path) -> Path:
    """The absolute path of a folder to be made.

    Raises:
        CheckpointError: when something is there already.
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
        CheckpointError: when the disk does not let it, or the destination has appeared meanwhile.
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
