"""The options that say how a model is stored and where it lies while it runs."""

from typing import Annotated

import jax
import typer

from dycoke_jax.cli.app import Dtype
from dycoke_jax.config import PoolMode, Storage
from dycoke_jax.hosts import Hosts, initialise
from dycoke_jax.sharding import DATA, parse_mesh

_PANEL = "Prompt and model"

Pooling = Annotated[
    PoolMode | None,
    typer.Option(
        help="Pooling of visual tokens. Default: that of the checkpoint's configuration.",
        rich_help_panel=_PANEL,
    ),
]
ComputedIn = Annotated[
    Dtype | None,
    typer.Option(
        help="Dtype of weights and computation. Default: as stored.", rich_help_panel=_PANEL
    ),
]
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


def connect(hosts: Hosts, mesh: str | None) -> dict[str, int] | None:
    """Connects the processes of a run, and reads the sizes of its mesh.

    Args:
        hosts: how they find each other.
        mesh: text of ``--mesh``; None spreads rows over the devices of several processes.

    Returns:
        The sizes; None for a single device.

    Raises:
        ConfigError: if the sizes cannot be read, or the processes cannot be connected.
    """
    sizes = None if mesh is None else parse_mesh(mesh)
    initialise(hosts)
    if hosts.several and sizes is None:
        return {DATA: jax.device_count()}
    return sizes
