"""Files that appear complete or not at all."""

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
