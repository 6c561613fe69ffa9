"""The options about clips that several commands have."""

from typing import Annotated

import typer

AllowDamaged = Annotated[
    bool,
    typer.Option(
        "--allow-damaged",
        help="Use the frames of a damaged clip that can be decoded, instead of refusing it.",
        rich_help_panel="Clip",
    ),
]
