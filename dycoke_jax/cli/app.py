"""The Typer application in which the commands are registered."""

from typing import Annotated, Literal

import typer

from dycoke_jax import __version__

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    help="Video language models in JAX, made fast by DyCoke: LLaVA-OneVision and LLaVA-Video.",
    epilog="Exit codes: 0 after success; 2 for bad input or usage, or output that cannot be "
    "written; 130 after an interrupt; 141 if the reader of the output has closed it.",
)


Dtype = Literal["float32", "bfloat16", "float16"]
"""Dtypes that weights can be stored in."""


def _print_version(wanted: bool | None) -> None:
    if wanted:
        typer.echo(f"dycoke-jax {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool | None,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print the version and exit."
        ),
    ] = None,
) -> None:
    pass
