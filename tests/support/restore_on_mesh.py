"""Restores checkpoints onto eight devices, in a process of its own.

    python -m support.restore_on_mesh FOLDER

reads ``FOLDER/hf`` (llava-hf layout) and ``FOLDER/orbax`` (converted), and prints one JSON object:
for each case the bytes on each device, those read of safetensors files, and what is not as in the
files. ``FOLDER`` gets a training state as well, saved on one mesh and read on another. Devices are
parts of the CPU that XLA simulates.
"""

import json
import os
import sys
from pathlib import Path

if __name__ == "__main__":
    os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"

import jax.numpy as jnp
import numpy as np
from orbax.checkpoint import v1 as ocp

from dycoke_jax.checkpoint import hf_folder, load_params, open_folder
from dycoke_jax.checkpoint.names import llava_hf_name
from dycoke_jax.model import Model
from dycoke_jax.sharding import make_mesh, weight_sharding
from dycoke_jax.training.run import Run, SavedState, train
from dycoke_jax.training.step import Optimisation, start
from support.checkpoints import read_tensors
from support.train_on_mesh import bytes_of

# Name: kind, sizes of the mesh, FSDP, dtype, storage of the weights.
CASES = {
    f"{kind} {name}": (kind, *case)
    for kind in ("hf", "orbax")
    for name, case in {
        "tensor": ("data=1,model=8", False, None, None),
        "data": ("data=8,model=1", False, None, None),
        "FSDP and tensor": ("data=2,model=4", True, None, None),
        "float32": ("data=2,model=4", True, "float32", None),
        "int8": ("data=2,model=4", True, None, "int8"),
    }.items()
}


class Counted:
    """Counts the bytes that are read of safetensors files."""

    def __init__(self, read):
        self.read, self.bytes = read, 0

    def __call__(self, *arguments):
        array = self.read(*arguments)
        self.bytes += array.nbytes
        return array


def unlike(params, tensors, dtype):
    """The paths whose values are not those of the file, cast."""
    return [
        path
        for path, x in params.items()
        if not np.array_equal(
            np.asarray(x), tensors[llava_hf_name(path)].astype(dtype or jnp.bfloat16)
        )
    ]


def restored(folder, kind, sizes, fsdp, dtype, weights):
    counted = Counted(hf_folder.read_tensor)
    hf_folder.read_tensor = counted
    mesh = make_mesh(sizes)
    params = load_params(open_folder(folder / kind), dtype, None, weights, mesh, fsdp=fsdp)
    hf_folder.read_tensor = counted.read
    return params, counted.bytes


class NoData:
    """The source of a run that is finished."""

    def step(self, _number):
        return None


def another_mesh(folder):
    """Writes a training state on one mesh, and reads it on another; what differs."""
    source = open_folder(folder / "hf")
    settings = Optimisation(steps=1)
    places = {"saved": ("data=2,model=4", True), "read": ("data=4,model=2", False)}
    (mesh, fsdp), (other, spread) = ((make_mesh(sizes), fsdp) for sizes, fsdp in places.values())
    params = load_params(source, "float32", None, None, mesh, fsdp=fsdp)
    state = start(settings, Model(params, source.config, mesh=mesh, fsdp=fsdp))
    with ocp.training.Checkpointer(folder / "run" / "state") as saved:
        saved.save(1, SavedState(jnp.int32(1), state.model.params, state.optimiser))
    (folder / "run" / "run.json").write_text("{}\n")
    run = Run(
        folder=folder / "run",
        config=source.config,
        initial=None,
        source=NoData(),
        optimisation=settings,
        save_tokenizer=None,
        described={},
        mesh=other,
        fsdp=spread,
    )
    model = train(run)
    tensors = read_tensors(folder / "hf")
    places = {
        path: weight_sharding(path, x.shape, source.config, other, fsdp=spread)
        for path, x in model.params.items()
    }
    moved = [p for p, x in model.params.items() if x.sharding.is_equivalent_to(places[p], x.ndim)]
    return {
        "unlike": unlike(model.params, tensors, "float32"),
        "bytes": bytes_of(model.params),
        "placed": len(moved) == len(model.params) and model.mesh == other,
    }


def main(folder):
    found, tensors = {}, read_tensors(folder / "hf")
    whole = load_params(open_folder(folder / "orbax"), weights="int8")
    for name, case in CASES.items():
        params, read = restored(folder, *case)
        if case[-1] == "int8":
            wrong = [p for p, x in params.items() if not np.array_equal(x, whole[p])]
        else:
            wrong = unlike(params, tensors, case[3])
        found[name] = {
            "bytes": bytes_of(params),
            "read": read,
            "unlike": wrong,
            "dtypes": sorted({x.dtype.name for x in params.values()}),
        }
        print(name, file=sys.stderr, flush=True)
    found["another mesh"] = another_mesh(folder)
    print(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
