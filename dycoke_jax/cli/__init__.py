"""The command line ``dycoke-jax``. Answers go to stdout, everything else to stderr."""

import errno
import os
import sys
import warnings
from collections.abc import Sequence

from dycoke_jax.cli.app import app
from dycoke_jax.cli.console import say
from dycoke_jax.cli.streams import flush, replace_unencodable
from dycoke_jax.errors import DycokeError

USER_ERROR = 2
"""Exit code of a run that ends with a DycokeError, or with an error of the operating system."""

CLOSED_PIPE = 141
"""Exit code if the reader of stdout has gone: that of a process that SIGPIPE ends (128 + 13)."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command line, and exits.

    The exit code is 0 after success; 2 for bad input, bad usage and output that cannot be written,
    which is said in one line on stderr; 3 if requests of a batch job have failed; 130 after an
    interrupt from the keyboard; and 141, without a message, if the reader of stdout has closed it.

    Args:
        arguments: the command-line arguments without the program's name. None: those of
            ``sys.argv``.
    """
    # transformers would print advice to install PyTorch, which nothing here needs.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    warnings.formatwarning = lambda message, *_, **__: f"warning: {message}\n"
    replace_unencodable()
    stdout, stderr = sys.stdout, sys.stderr
    failure: OSError | None = None
    code = USER_ERROR
    try:
        app(arguments)
    except DycokeError as error:
        say(f"error: {error}", style="red")
    except OSError as error:
        failure = error
    except SystemExit as end:
        # Typer and rich end the process with 1 when they find the pipe closed.
        code = CLOSED_PIPE if isinstance(end.__context__, BrokenPipeError) else int(end.code or 0)
    except KeyboardInterrupt:
        code = 130
    finally:
        # Typer puts other objects there when it finds the pipe closed.
        sys.stdout, sys.stderr = stdout, stderr
    failure = flush(stdout) or failure
    if isinstance(failure, BrokenPipeError):
        code = CLOSED_PIPE
    elif failure is not None:
        say(f"error: {_in_one_line(failure)}", style="red")
        code = USER_ERROR
    flush(stderr)
    sys.exit(code)


def _in_one_line(error: OSError) -> str:
    """What the operating system refused, such as a file name that is too long."""
    reason = error.strerror or " ".join(str(error).split())
    if error.filename is not None:
        return f"cannot use {str(error.filename)!r}: {reason}"
    # Files are written by functions that name them; streams have no name.
    full = error.errno in (errno.ENOSPC, errno.EDQUOT)
    return f"cannot write to standard output: {reason}" if full else reason
