"""The options that say how a model is stored and where it lies while it runs."""

from typing import Annotated

import typer

from dycoke_jax.config import Storage

_PANEL = "Prompt and model"

Weights = Annotated[
    Storage | None,
    typer.Option(
        help="int8: one byte for each weight in the language model's matrices. Default: as stored.",
        rich_help_panel=_PANEL,
    ),
]
KeysValues = Annotated[
    Storage | None,
    typer.Option(
        help="int8: one byte for each number in the key/value caches. Default: that of the "
        "computation.",
        rich_help_panel=_PANEL,
    ),
]
MeshSizes = Annotated[
    str | None,
    typer.Option(
        "--mesh",
        metavar="SIZES",
        help="Spread the model over all devices: rows of a batch over `data`, and heads, MLPs and "
        "vocabulary over `model`, as in `data=2,model=4`. Default: one device.",
        rich_help_panel=_PANEL,
    ),
]
Fsdp = Annotated[
    bool,
    typer.Option(
        "--fsdp",
        help="Spread the weights over the mesh's `data` too, and gather them layer by layer.",
        rich_help_panel=_PANEL,
    ),
]
