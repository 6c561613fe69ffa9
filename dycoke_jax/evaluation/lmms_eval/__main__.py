"""Runs lmms-eval: ``python -m dycoke_jax.evaluation.lmms_eval eval --model dycoke_jax ...``.

Arguments are those of ``python -m lmms_eval``, with two differences. A run that fails ends with
exit code 1, where lmms-eval prints the error and ends with 0. And the tasks that come with this
package are found; ``--include_path`` names another folder in their place.
"""

import sys

from dycoke_jax.evaluation.lmms_eval import TASKS


def main(arguments: list[str]) -> None:
    """Runs lmms-eval in this process.

    Args:
        arguments: the arguments of the command line, without the program's name.

    Raises:
        SystemExit: if lmms-eval is not installed, or if it ends the process.
        Exception: what ended the evaluation.
    """
    try:
        from lmms_eval.cli.dispatch import main as run
    except ModuleNotFoundError as error:
        if error.name != "lmms_eval":
            raise
        sys.exit("lmms-eval is not installed; docs/evaluation.md says how to install it")
    if arguments[:1] == ["eval"] and len(arguments) > 1:
        if not any(argument.startswith("--include_path") for argument in arguments):
            arguments = [*arguments, "--include_path", str(TASKS)]
        # At this level lmms-eval passes errors on instead of printing them.
        arguments = [*arguments, "--verbosity", "DEBUG"]
    sys.argv = ["lmms_eval", *arguments]
    run()


if __name__ == "__main__":
    main(sys.argv[1:])
