"""A checkpoint of the widths of a 7B model, with random bfloat16 weights, in several shards.

    python -m support.large_checkpoint make FOLDER LAYERS
    python -m support.large_checkpoint convert FOLDER DESTINATION

The first writes ``FOLDER`` with this many of the 28 layers of the language model; all of them take
16 GB. The second converts it and prints one JSON object: seconds, and the peak of resident memory
in bytes before and after.
"""

import json
import sys
import time
from dataclasses import replace
from math import prod
from pathlib import Path

import ml_dtypes
import numpy as np

from dycoke_jax.checkpoint import convert
from dycoke_jax.checkpoint.save import save_llava_hf
from dycoke_jax.config import PRESETS
from dycoke_jax.models.llava import abstract_params
from support.tokenizers import tiny_tokenizer

SHARD = 4_000_000_000


def make(folder, layers):
    """Random bits, with exponents that make them finite."""
    preset = PRESETS["onevision-7b"]
    config = replace(preset, text=replace(preset.text, num_layers=layers))
    shapes, rng = abstract_params(config), np.random.default_rng(0)

    def tensors(paths):
        for path in paths:
            shape = shapes[path].shape
            words = rng.integers(0, 2**64, -(-prod(shape) // 4), dtype=np.uint64)
            bits = words.view(np.uint16)[: prod(shape)]
            bits &= np.uint16(0x80FF)
            bits |= np.uint16(0x3C00)
            yield path, bits.view(ml_dtypes.bfloat16).reshape(shape)

    total = 2 * sum(prod(leaf.shape) for leaf in shapes.values())
    save_llava_hf(
        folder,
        config,
        tensors,
        tiny_tokenizer().save_pretrained,
        dtype="bfloat16",
        max_shard_bytes=min(SHARD, total // 4),
    )


def peak():
    """Largest resident memory of this process so far, in bytes.

    ``getrusage`` would begin with that of the process which started this one.
    """
    status = Path("/proc/self/status").read_text().splitlines()
    (line,) = [line for line in status if line.startswith("VmHWM:")]
    return int(line.split()[1]) * 1024


def main(action, folder, other):
    if action == "make":
        make(Path(folder), int(other))
        return
    before, began = peak(), time.perf_counter()
    convert(folder, other)
    print(json.dumps({"seconds": time.perf_counter() - began, "peak": peak(), "before": before}))


if __name__ == "__main__":
    main(*sys.argv[1:])
