"""The option ``--no-compilation-cache`` of all commands that compile."""

import functools
import inspect
from collections.abc import Callable
from typing import Annotated, Any

import typer

from dycoke_jax.cli.console import say_notes
from dycoke_jax.compilation import use_compilation_cache
from dycoke_jax.errors import OutputError

VARIABLE = "DYCOKE_JAX_NO_COMPILATION_CACHE"
"""Environment variable that stands for the option where it is 1."""

_OPTION = typer.Option(
    "--no-compilation-cache",
    envvar=VARIABLE,
    help="Compile all programs anew, and keep none of them for the next time.",
)


def compiles(command: Callable[..., None]) -> Callable[..., None]:
    """Makes a command use the compilation cache, and adds the option not to.

    Where the folder of the cache cannot be written, a note says so, and the command does without.

    Args:
        command: function for ``typer``; its parameters are passed to it by name.

    Returns:
        The function whose signature ``typer`` shall read.
    """
    name = "no_compilation_cache"
    parameter = inspect.Parameter(
        name,
        inspect.Parameter.KEYWORD_ONLY,
        default=False,
        annotation=Annotated[bool, _OPTION],
    )

    @functools.wraps(command)
    def run(**values: Any) -> None:
        if not values.pop(name):
            try:
                use_compilation_cache()
            except OutputError as error:
                say_notes([f"{error}; all programs are compiled anew"])
        command(**values)

    parameters = [*inspect.signature(command).parameters.values(), parameter]
    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {one.name: one.annotation for one in parameters}
    return run
