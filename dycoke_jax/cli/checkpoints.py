"""The commands that write checkpoints: convert, init."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from dycoke_jax.cli.app import Dtype, new_app
from dycoke_jax.cli.console import progress_bars, say, say_notes
from dycoke_jax.config import PRESETS, Storage
from dycoke_jax.errors import ConfigError

app = new_app()


@app.command(
    epilog="Example: `dycoke-jax convert lmms-lab/llava-onevision-qwen2-0.5b-ov ov-0.5b "
    "--dtype bfloat16`"
)
def convert(
    source: Annotated[
        str,
        typer.Argument(
            help="Checkpoint to convert: folder (lmms-lab, llava-hf or Orbax layout) or hub id."
        ),
    ],
    destination: Annotated[Path, typer.Argument(help="Folder to write; it must not exist yet.")],
    to: Annotated[
        Literal["orbax", "llava-hf"],
        typer.Option(help="Layout to write: orbax for this library, llava-hf for transformers."),
    ] = "orbax",
    dtype: Annotated[
        Dtype | None, typer.Option(help="Dtype of the written weights. Default: as stored.")
    ] = None,
    weights: Annotated[
        Storage | None,
        typer.Option(
            help="int8: write the matrices of the language model as int8, with a scale for each "
            "output channel (--to orbax only). Default: as stored."
        ),
    ] = None,
) -> None:
    """Convert a checkpoint to another layout.

    The weights stay the same bit for bit unless --dtype or --weights is given.
    """
    from dycoke_jax import checkpoint

    if to == "llava-hf" and weights is not None:
        raise ConfigError("the layout llava-hf has no int8 weights; use --to orbax")
    with progress_bars() as progress:
        if to == "orbax":
            notes = checkpoint.convert(
                source, destination, dtype=dtype, weights=weights, progress=progress
            )
        else:
            notes = checkpoint.export(source, destination, dtype=dtype, progress=progress)
    say_notes(notes)
    say(f"wrote {destination}")


@app.command(epilog="Example: `dycoke-jax init tiny-random --preset tiny`")
def init(
    destination: Annotated[Path, typer.Argument(help="Folder to write; it must not exist yet.")],
    preset: Annotated[
        str, typer.Option(help=f"Model whose shapes to use: {', '.join(PRESETS)}.")
    ] = "tiny",
    dtype: Annotated[Dtype, typer.Option(help="Dtype of the weights.")] = "float32",
    seed: Annotated[int, typer.Option(help="Seed of the random weights, 0 or more.")] = 0,
) -> None:
    """Write a checkpoint with random weights, in the llava-hf layout.

    It has the shapes of a real model, but its answers are noise.
    """
    from dycoke_jax.checkpoint.untrained import write_untrained

    if preset not in PRESETS:
        raise ConfigError(f"no preset {preset!r}; there are {', '.join(PRESETS)}")
    with progress_bars() as progress:
        write_untrained(destination, PRESETS[preset], dtype, seed, progress)
    say(f"wrote {destination}: the weights are random, so its answers are noise")
