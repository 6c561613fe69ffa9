"""Exports a converted Orbax folder to the llava-hf layout, which transformers loads.

Usage: python convert/orbax_to_hf.py SRC DST [--dtype float16]
"""

import typer

from dycoke_jax.checkpoint import export
from dycoke_jax.errors import DycokeError


def main(src: str, dst: str, dtype: str | None = None) -> None:
    """Writes SRC (any checkpoint folder, or a hub id) to the new folder DST."""
    try:
        export(src, dst, dtype)
    except DycokeError as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(2) from None


if __name__ == "__main__":
    typer.run(main)
