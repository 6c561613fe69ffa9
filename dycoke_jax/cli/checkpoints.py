"""Commands about checkpoints: convert, init."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from dycoke_jax.cli.app import Dtype, app
from dycoke_jax.cli.console import progress_bars, say
from dycoke_jax.config import PRESETS
from dycoke_jax.errors import ConfigError


@app.command(
    epilog="Example: `dycoke-jax convert lmms-lab/llava-onevision-qwen2-0.5b-ov ov-0.5b "
    "--dtype bfloat16`"
)
def convert(
    source: Annotated[
        str, typer.Argument(help="Folder (lmms-lab, llava-hf, converted) or hub id.")
    ],
    destination: Annotated[Path, typer.Argument(help="Folder to make; it must not exist yet.")],
    to: Annotated[
        Literal["orbax", "llava-hf"],
        typer.Option(help="orbax: for this library. llava-hf: for transformers."),
    ] = "orbax",
    dtype: Annotated[Dtype | None, typer.Option(help="Change the dtype of all weights.")] = None,
) -> None:
    """Convert a checkpoint, bit for bit unless --dtype is given."""
    from dycoke_jax import checkpoint

    write = checkpoint.convert if to == "orbax" else checkpoint.export
    with progress_bars() as progress:
        write(source, destination, dtype=dtype, progress=progress)
    say(f"wrote {destination}")


@app.command(epilog="Example: `dycoke-jax init tiny-random --preset tiny`")
def init(
    destination: Annotated[Path, typer.Argument(help="Folder to make; it must not exist yet.")],
    preset: Annotated[str, typer.Option(help=f"Sizes: {', '.join(PRESETS)}.")] = "tiny",
    dtype: Annotated[Dtype, typer.Option(help="Dtype of the weights.")] = "float32",
    seed: Annotated[int, typer.Option(help="Of the random weights.")] = 0,
) -> None:
    """Make an untrained checkpoint (llava-hf layout): the real shapes, answers of pure noise."""
    from dycoke_jax.checkpoint.untrained import write_untrained

    if preset not in PRESETS:
        raise ConfigError(f"no preset {preset!r}; there are {', '.join(PRESETS)}")
    with progress_bars() as progress:
        write_untrained(destination, PRESETS[preset], dtype, seed, progress)
    say(f"wrote {destination}: random weights, its answers mean nothing")
