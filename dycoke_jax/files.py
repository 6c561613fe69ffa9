"""Atomic writing of files and folders, and reading of JSON files with a clear error.

Text is UTF-8. Files that begin with a byte order mark, as some editors write them, are read too.
"""

import codecs
import json
import os
import secrets
import shutil
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import filelock

from dycoke_jax.checks import shown
from dycoke_jax.errors import CheckpointError, DycokeError, OutputError


def write_file(path: Path, content: bytes) -> None:
    """Writes a file atomically; if that fails, a file that was there before is unchanged.

    Raises:
        OutputError: if the folder is missing or the file cannot be written.
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
    """Checks, before a long task starts, that ``write_file`` can write to a path.

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
    """Returns the absolute path of a folder to be created, after checking that it is unused.

    Raises:
        CheckpointError: if the path exists already.
    """
    path = Path(destination).expanduser().absolute()
    if path.exists() or path.is_symlink():
        raise CheckpointError(f"{path} exists already; choose another destination or remove it")
    return path


@contextmanager
def staged_folder(destination: Path) -> Iterator[Path]:
    """Creates a hidden temporary folder, renamed to the destination when the block succeeds.

    The temporary folder has the same parent as the destination. It is removed if the block raises,
    including on KeyboardInterrupt. A process that is killed leaves it behind under its hidden name,
    never at the destination; the next one with the same destination removes it.

    Raises:
        CheckpointError: if the folder cannot be written, another process is writing to the same
            destination, or the destination has been created in the meantime.
    """
    hidden = f".{destination.name}.tmp-"
    temporary = destination.parent / f"{hidden}{secrets.token_hex(4)}"
    try:
        destination.parent.mkdir(parents=True, exist_ok=True)
        with _sole_writer(destination):
            for left_behind in destination.parent.iterdir():
                if left_behind.name.startswith(hidden):
                    shutil.rmtree(left_behind, ignore_errors=True)
            try:
                temporary.mkdir()
                yield temporary
                temporary.rename(absent(destination))
            finally:
                shutil.rmtree(temporary, ignore_errors=True)
    except OSError as error:
        raise CheckpointError(f"cannot write {destination}: {error}") from error


@contextmanager
def _sole_writer(destination: Path) -> Iterator[None]:
    """Holds a lock by a hidden file beside the destination; it ends with the process at the latest.

    Raises:
        CheckpointError: if another process holds it.
        OSError: if it cannot be written.
    """
    path = destination.with_name(f".{destination.name}.lock")
    lock = filelock.FileLock(path, timeout=0)
    try:
        lock.acquire()
    except filelock.Timeout:
        raise CheckpointError(
            f"another process is writing {destination}; wait for it or choose another destination"
        ) from None
    try:
        yield
    finally:
        # Removed while it is held: afterwards it may be another's. Not all systems can do that.
        with suppress(OSError):
            path.unlink()
        lock.release()


def read_json_object(path: Path, error: type[DycokeError] = CheckpointError) -> dict[str, Any]:
    """Reads a JSON file whose content is an object.

    Args:
        path: the file.
        error: the class of exception to raise.

    Raises:
        DycokeError: of class ``error``, if the file is missing, not JSON or not an object.
    """
    try:
        # Of bytes, the parser finds the encoding by itself, with or without a byte order mark.
        content = parse_json(path.read_bytes())
    except FileNotFoundError:
        raise error(f"{path.parent} has no {path.name}") from None
    except (ValueError, OSError, RecursionError) as cause:
        raise error(f"{path} is not readable as JSON ({cause})") from cause
    if not isinstance(content, dict):
        raise error(f"{path} must hold an object, not {type(content).__name__}")
    return content


def parse_json(content: bytes) -> Any:
    """Parses JSON in which no object has a key twice; others would read it in their own way.

    Raises:
        ValueError: if it is not JSON, or has a key twice.
        RecursionError: if it is nested too deeply.
    """
    return json.loads(content, object_pairs_hook=_without_duplicates)


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) < len(pairs):
        counts = Counter(key for key, _ in pairs)
        raise ValueError(f"the key {shown(counts.most_common(1)[0][0])} is there twice")
    return content


def has_byte_order_mark(path: Path) -> bool:
    """Whether a text file begins with the byte order mark of UTF-8, UTF-16 or UTF-32.

    Raises:
        OSError: if the file cannot be read.
    """
    with path.open("rb") as file:
        return file.read(4).startswith(_BYTE_ORDER_MARKS)


def copy_text(source: Path, target: Path) -> None:
    """Copies a text file: bit for bit, or as UTF-8 without its byte order mark if it has one.

    Raises:
        OSError: if a file cannot be read or written.
    """
    content = source.read_bytes()
    if content.startswith(_BYTE_ORDER_MARKS):
        # What is not text in spite of the mark is copied as it is; its reader says so.
        with suppress(UnicodeDecodeError):
            content = content.decode(json.detect_encoding(content)).encode()
    target.write_bytes(content)


_BYTE_ORDER_MARKS = (
    codecs.BOM_UTF8,
    codecs.BOM_UTF16_LE,
    codecs.BOM_UTF16_BE,
    codecs.BOM_UTF32_BE,  # that of little-endian UTF-32 begins as that of UTF-16
)
