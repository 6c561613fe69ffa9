"""The command line ``dycoke-jax``. Answers go to stdout, everything else to stderr."""

import os
import sys
import warnings
from collections.abc import Sequence

from dycoke_jax.cli import asking, checkpoints, learning  # noqa: F401 (registers their commands)
from dycoke_jax.cli.app import app
from dycoke_jax.cli.console import say
from dycoke_jax.errors import DycokeError

# Heavy imports (jax, flax, PyAV) happen inside the commands, so that --help answers at once.

USER_ERROR = 2
"""Exit code of a run that ends with a DycokeError."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command line. A DycokeError is printed as one line, and the exit code is 2.

    Args:
        arguments: the command-line arguments without the program's name. None: those of
            ``sys.argv``.
    """
    # transformers would print advice to install PyTorch, which nothing here needs.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    warnings.formatwarning = lambda message, *_, **__: f"warning: {message}\n"
    try:
        app(arguments)
    except DycokeError as error:
        say(f"error: {error}", style="red")
        sys.exit(USER_ERROR)
    except KeyboardInterrupt:
        sys.exit(130)
