"""The same requests on one device and on meshes of eight, in a process of its own.

    python -m support.on_mesh

prints one JSON object: for each case how far the meshes' logits and log-likelihoods are from those
of one device, and the generated ids of both. Devices are parts of the CPU that XLA simulates.
"""

import json
import os
import sys

if __name__ == "__main__":
    os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"

from dataclasses import replace

import jax
import numpy as np

from dycoke_jax import Decoding, DyCoke
from dycoke_jax.compression.kv_pruning import MaskedCache
from dycoke_jax.compression.methods import parse_compression
from dycoke_jax.config import LlavaConfig, TextConfig, VisionConfig
from dycoke_jax.engine.batch import _lay_out, empty_batch, run_batch, score_batch
from dycoke_jax.engine.requests import Prepared
from dycoke_jax.generation.encode import encode
from dycoke_jax.generation.prefill import begin
from dycoke_jax.inputs.prompts import Prompt
from dycoke_jax.model import Model
from dycoke_jax.models.llava import random_params
from dycoke_jax.sharding import make_mesh, weight_sharding

SIDE, NEW = 56, 12
MESHES = ("data=1,model=8", "data=2,model=4", "data=4,model=2", "data=8,model=1")
METHODS = {"none": None, "dycoke": DyCoke(layer=1, threshold=0.999)}
# Each of these reads other arrays or changes their sizes inside a program.
OTHERS = {
    "unicomp": parse_compression("unicomp"),
    "fastv, dycoke-kv": parse_compression("fastv(layer=1)+dycoke-kv(layer=2)"),
    "masked cache": MaskedCache(1, 0.7, 0.99),
}


def config(newline="one_token", heads=8, kv_heads=2):
    """Eight query heads and two KV heads, of which meshes repeat the latter, unless others."""
    return LlavaConfig(
        VisionConfig(32, 48, 2, 4, patch_size=14, image_size=SIDE),
        TextConfig(320, 64, 64, 3, heads, kv_heads, 8, tie_word_embeddings=newline == "grid"),
        newline=newline,
    )


def model_of(config, kv=None):
    """Weights large enough that answers vary and attention changes from step to step."""
    params = random_params(config, 1)
    large = {path: weight * (8.0 if weight.ndim > 1 else 1.0) for path, weight in params.items()}
    return Model(large, config, kv=kv)


def spread(model, sizes, fsdp=False):
    """The model on a mesh."""
    mesh = make_mesh(sizes)
    params = {
        path: jax.device_put(
            weight, weight_sharding(path, weight.shape, model.config, mesh, fsdp=fsdp)
        )
        for path, weight in model.params.items()
    }
    return replace(model, params=params, mesh=mesh, fsdp=fsdp)


def requests(count=7):
    """Clips of unequal lengths, and questions of unequal lengths; fewer than rows."""
    rng = np.random.default_rng(5)
    made = []
    for index in range(count):
        frames = int(rng.integers(1, 7))
        still = rng.integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)
        clip = np.repeat(still[None], frames, axis=0)
        changed = rng.random((frames, SIDE, SIDE, 1)) < 0.3
        clip = np.where(changed, rng.integers(0, 256, clip.shape, dtype=np.uint8), clip)
        ids = rng.integers(0, 320, 3 + index).tolist()
        made.append(Prepared(Prompt(tuple(ids[:2]), tuple(ids[2:])), clip, Decoding(NEW - index)))
    return made


def results(model, method):
    """Logits after the prompts, generated ids with their counts, and log-likelihoods."""
    batch = requests()
    layout, text = _lay_out(model, batch, method)
    signals = () if layout.tokens is None else layout.tokens.signals
    clips = [request.frames for request in batch]
    features = encode(model, clips, layout.rows, layout.frames, signals)
    limits = empty_batch(layout)[2]
    first = jax.jit(lambda *x: begin(*x, layout)[0])(model, features, text, limits)
    *_, answers = run_batch(model, batch, method, ())
    ids = [list(answer.token_ids) for answer in answers]
    counts = [answer.tokens.attended for answer in answers]
    scored = score_batch(model, batch, [tuple(one) for one in ids], method)
    likelihoods = [value for answer in scored for value in answer.log_likelihoods]
    return np.asarray(first)[: len(batch)], ids, counts, np.asarray(likelihoods)


def compared(one, other):
    return {
        "logits": float(np.abs(one[0] - other[0]).max()),
        "likelihoods": float(np.abs(one[3] - other[3]).max()) if one[1] == other[1] else None,
        "ids": [one[1], other[1]],
        "attended": [one[2], other[2]],
        "spread": float(one[0].std()),
    }


def cases():
    """Name, model, method, sizes of the mesh and whether FSDP is used."""
    for newline in ("one_token", "grid"):
        for name, method in METHODS.items():
            for sizes in MESHES:
                yield f"{newline} {name} {sizes}", model_of(config(newline)), method, sizes, False
    plain, method = model_of(config()), METHODS["dycoke"]
    for name, other in OTHERS.items():
        yield name, plain, other, "data=2,model=4", False
    for sizes in ("data=8,model=1", "data=2,model=4"):
        yield f"fsdp {sizes}", plain, method, sizes, True
    yield "int8 KV", model_of(config(), "int8"), method, "data=2,model=4", False
    odd = model_of(config(heads=6, kv_heads=3))
    yield "heads that the mesh does not divide", odd, method, "data=2,model=4", False


def main():
    alone, found = {}, {}
    for name, model, method, sizes, fsdp in cases():
        key = model.config, model.kv, method
        if key not in alone:
            alone[key] = results(model, method)
        found[name] = compared(alone[key], results(spread(model, sizes, fsdp), method))
        print(name, file=sys.stderr, flush=True)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
