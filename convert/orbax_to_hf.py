"""Converts an Orbax folder (or any checkpoint) to the llava-hf layout, for transformers.

Usage: python convert/orbax_to_hf.py SRC DST [--dtype bfloat16]
"""

import sys

from dycoke_jax.cli import main

if __name__ == "__main__":
    main(["convert", "--to", "llava-hf", *sys.argv[1:]])
