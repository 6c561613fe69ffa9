"""Converts a Hugging Face checkpoint (lmms-lab or llava-hf layout) to an Orbax folder.

Usage: python convert/hf_to_orbax.py SRC DST [--dtype bfloat16]
"""

import typer

from dycoke_jax.checkpoint import convert
from dycoke_jax.errors import DycokeError


def main(src: str, dst: str, dtype: str | None = None) -> None:
    """Converts SRC (a folder or a hub id) to the new folder DST."""
    try:
        convert(src, dst, dtype)
    except DycokeError as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(2) from None


if __name__ == "__main__":
    typer.run(main)
