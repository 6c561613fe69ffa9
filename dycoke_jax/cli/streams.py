"""Standard output and standard error: characters they cannot encode, and writes that fail."""

import io
import os
import sys
from contextlib import suppress
from typing import TextIO


def replace_unencodable() -> None:
    r"""Makes characters that the encoding lacks print as ``?`` (stderr: as ``\x..`` escapes).

    Among them are lone surrogates, by which Python stands for the bytes of file names that are not
    in the encoding of the file system.
    """
    for stream, errors in ((sys.stdout, "replace"), (sys.stderr, "backslashreplace")):
        # Other classes of stream, such as io.StringIO, hold text and encode nothing. Another error
        # handler is one that the user has chosen (PYTHONIOENCODING).
        if isinstance(stream, io.TextIOWrapper) and stream.errors in ("strict", "surrogateescape"):
            stream.reconfigure(errors=errors)


def flush(stream: TextIO | io.TextIOBase | None) -> OSError | None:
    """Writes out what a stream holds back; if that fails, discards it, see ``discard``.

    Args:
        stream: ``sys.stdout`` or ``sys.stderr``; None if the process was started without it.

    Returns:
        The error if it failed, otherwise None.
    """
    if stream is None:
        return None
    try:
        stream.flush()
    except OSError as error:
        discard(stream)
        return error
    return None


def discard(stream: TextIO | io.TextIOBase) -> None:
    """Discards what a stream that cannot be written holds back, and all that is written later.

    Python would otherwise try once more at its exit, and print a message of its own.
    """
    with suppress(OSError):  # a stream without a file descriptor
        devnull = os.open(os.devnull, os.O_WRONLY)
        os.dup2(devnull, stream.fileno())
        os.close(devnull)
