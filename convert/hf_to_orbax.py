"""Converts a Hugging Face checkpoint (lmms-lab or llava-hf layout) to an Orbax folder.

Usage: python convert/hf_to_orbax.py SRC DST [--dtype bfloat16]
"""

import sys

from dycoke_jax.cli import main

if __name__ == "__main__":
    main(["convert", "--to", "orbax", *sys.argv[1:]])
