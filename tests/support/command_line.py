"""Runs the command line in this process."""

import contextlib
import io

from dycoke_jax import cli


def run_main(*arguments: object) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of ``dycoke-jax`` with these arguments."""
    out, err, code = io.StringIO(), io.StringIO(), 0
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            cli.main([str(argument) for argument in arguments])
    except SystemExit as exit_:
        code = int(exit_.code or 0)
    return code, out.getvalue(), err.getvalue()
