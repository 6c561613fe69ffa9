"""The options that choose the compression, shared by several commands."""

import dataclasses
from typing import Annotated

import typer

from dycoke_jax.cli.options import option
from dycoke_jax.compression.dycoke import DyCoke
from dycoke_jax.compression.methods import METHODS, PLAIN, parse_compression
from dycoke_jax.compression.protocol import Compressor
from dycoke_jax.errors import ConfigError

FORM = (
    "A method is a name, with settings in brackets where they differ from the defaults: "
    "`random(k=0.5)`. Methods: "
    + ", ".join(f"`{name}`" for name in (PLAIN, *METHODS))
    + ". Those for different stages are joined by `+`."
)
"""What the option is given, as the end of its help."""

_PANEL = "Compression"

Compress = Annotated[
    str | None,
    typer.Option(
        help=f"Method of token compression in place of DyCoke with the options above. {FORM}",
        rich_help_panel=_PANEL,
    ),
]
NoDycoke = Annotated[
    bool,
    typer.Option("--no-dycoke", help="Run the model without DyCoke.", rich_help_panel=_PANEL),
]


def chosen(
    given: frozenset[str], compress: str | None, otherwise: Compressor | None
) -> Compressor | None:
    """The compression that a command runs.

    Args:
        given: names of those parameters of the command whose options are on the command line.
        compress: text of ``--compress``, see ``compression.methods``; None if it is not given.
        otherwise: the compression without that option: DyCoke with the settings of its options.

    Raises:
        ConfigError: if options of DyCoke are given as well, or as ``parse_compression`` does.
    """
    if compress is None:
        return otherwise
    for name in ("no_dycoke", *(field.name for field in dataclasses.fields(DyCoke))):
        if name in given:
            raise ConfigError(
                f"--compress and {option(name)} both choose the compression; give one of them"
            )
    return parse_compression(compress)
