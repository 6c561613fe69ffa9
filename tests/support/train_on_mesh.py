"""The same training steps on one device and on meshes of eight, in a process of its own.

    python -m support.train_on_mesh FOLDER

prints one JSON object: for each case the metrics of the steps, and how far the weights are from
those of one device; the same of runs in the folder that changed their mesh half-way. Devices are
parts of the CPU that XLA simulates.
"""

import json
import os
import sys
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path

if __name__ == "__main__":
    # The schedule that needs little memory, as on accelerators, and gradients that are not held
    # until all can be summed at once: otherwise what is measured is how XLA runs on CPUs.
    flags = (
        "--xla_force_host_platform_device_count=8",
        "--xla_cpu_enable_concurrency_optimized_scheduler=false",
        "--xla_disable_hlo_passes=cpu-all-reduce-combiner",
    )
    os.environ["XLA_FLAGS"] = " ".join(flags)

import jax
import jax.numpy as jnp
import numpy as np

from dycoke_jax.checkpoint import load_params, open_folder
from dycoke_jax.config import TextConfig, VisionConfig
from dycoke_jax.model import Model
from dycoke_jax.models.llava import abstract_params
from dycoke_jax.sharding import make_mesh
from dycoke_jax.training.batches import Example, pack
from dycoke_jax.training.placement import as_weights
from dycoke_jax.training.run import Intervals, Run, train, train_and_save
from dycoke_jax.training.scoring import HeldOut, accuracy
from dycoke_jax.training.sources import StepData
from dycoke_jax.training.step import Optimisation, TrainState, optimiser, start, train_step
from dycoke_jax.training.token_dropping import TokenDropping
from support import on_mesh
from support.tokenizers import tiny_tokenizer

STEPS = 3
COLUMNS = ("ids", "part", "offset", "is_answer")
SETTINGS = Optimisation(steps=STEPS, learning_rate=1e-3, warm_up=0)
REMATERIALISED = replace(SETTINGS, rematerialise=True)
RANDOM = TokenDropping(0.7, at_random=True)
# Name: sizes of the mesh, FSDP, rows, newline layout, settings, dropping. Two rows of three frames
# are six frames, which four devices do not divide.
CASES = {
    "data": ("data=8,model=1", False, 8, "one_token", SETTINGS, None),
    "tensor": ("data=1,model=8", False, 2, "grid", SETTINGS, TokenDropping(0.7)),
    "data and tensor": ("data=2,model=4", False, 2, "one_token", SETTINGS, RANDOM),
    "FSDP": ("data=8,model=1", True, 8, "one_token", SETTINGS, None),
    "FSDP and tensor": ("data=2,model=4", True, 2, "one_token", REMATERIALISED, None),
}


def model(newline="one_token"):
    """Two layers of each kind; biases are not zero, so that rounding is small beside them."""
    config = on_mesh.config(newline)
    made = on_mesh.model_of(replace(config, text=replace(config.text, num_layers=2)))
    rng = np.random.default_rng(3)
    params = {
        path: rng.normal(0, 0.1, x.shape).astype(np.float32) if path.endswith("bias") else x
        for path, x in made.params.items()
    }
    return replace(made, params=params)


def batches(rows):
    """Batches with unequal numbers of questions; the last row of each has no clip."""
    rng = np.random.default_rng(0)
    made = []
    for _ in range(STEPS * 2):
        examples = [
            Example(
                rng.integers(0, 256, (3, on_mesh.SIDE, on_mesh.SIDE, 3), dtype=np.uint8),
                ["What is it?", "Which colour?"][: 1 + row % 2],
                [str(rng.integers(10**6)), str(rng.integers(10**3))][: 1 + row % 2],
                has_clip=row < rows - 1,
            )
            for row in range(rows)
        ]
        made.append(pack(tiny_tokenizer(), examples, 96))
    return [
        jax.tree.map(lambda *x: jnp.stack(x), *made[first : first + 2])
        for first in range(0, len(made), 2)
    ]


def trained(model, rows, settings, dropping):
    """The last state, and the loss and the norm of the gradient of each step."""
    state, seen = start(settings, model), []
    for batch in batches(rows):
        state, metrics = train_step(settings, state, batch, dropping=dropping)
        seen.append([float(metrics.loss), float(metrics.gradient)])
    return state, seen


def distances(one, other, newline="one_token"):
    """The norm of each weight's difference, and of its change in training, relative to its own."""
    first = model(newline).params
    found = {}
    for path, weight in one.items():
        weight, size = np.asarray(weight), np.linalg.norm(weight)
        apart = np.linalg.norm(weight - np.asarray(other[path]))
        changed = np.linalg.norm(weight - np.asarray(first[path]))
        found[path] = [float(apart / size), float(changed / size)]
    return found


def bytes_of(tree):
    """Bytes on each device."""
    held = dict.fromkeys((str(device) for device in jax.devices()), 0)
    for x in jax.tree.leaves(tree):
        for shard in x.addressable_shards:
            held[str(shard.device)] += shard.data.nbytes
    return sorted(held.values())


def memory(rematerialise):
    """Bytes of temporaries of a step with FSDP on each device, and of all weights.

    The model has few tokens and wide layers of both kinds; nothing is run.
    """
    config = replace(
        on_mesh.config(),
        vision=VisionConfig(128, 512, 3, 4, patch_size=14, image_size=on_mesh.SIDE),
        text=TextConfig(320, 256, 1024, 3, 8, 2, 32, tie_word_embeddings=False),
    )
    mesh, settings = make_mesh("data=8"), replace(SETTINGS, rematerialise=rematerialise)
    params = abstract_params(config)
    model = Model(params, config, mesh=mesh, fsdp=True)
    moments = jax.eval_shape(optimiser(settings).init, params)
    state = TrainState(jax.ShapeDtypeStruct((), jnp.int32), model, moments)
    places = as_weights(state, config, mesh, fsdp=True)
    state = jax.tree.map(
        lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), state, places
    )
    one = batches(8)[0]
    short = {name: getattr(one, name)[:, :, :8] for name in COLUMNS}
    batch = one._replace(frames=one.frames[:, :, :1], **short)
    compiled = train_step.lower(settings, state, batch).compile()
    whole = sum(4 * x.size for x in params.values())
    return [compiled.memory_analysis().temp_size_in_bytes, whole]


class Killed(BaseException):
    """Simulates a killed process: no code in the package catches it."""


class Source:
    """The batches of the cases with two rows; ``last`` is the first step that is not given."""

    def __init__(self, last=STEPS):
        self.last, self.batches = last, batches(2)

    def step(self, number):
        if number == self.last:
            raise Killed
        return StepData(self.batches[number])


def resumed(folder, straight):
    """Runs that are killed after two steps, and resumed on another mesh, or from one device."""
    places = {
        "one": (SETTINGS, None, False),
        "FSDP": (REMATERIALISED, make_mesh("data=2,model=4"), True),
    }
    one_row = jax.tree.map(lambda x: x[0, :1], batches(2)[0])
    held_out = HeldOut([one_row], [[["all"]]])

    def run(name, place, last=STEPS):
        settings, mesh, fsdp = places[place]

        def initial():
            one = model()
            return one if mesh is None else on_mesh.spread(one, "data=2,model=4", fsdp)

        return Run(
            folder=folder / name,
            config=model().config,
            initial=initial,
            source=Source(last),
            optimisation=settings,
            save_tokenizer=tiny_tokenizer().save_pretrained,
            described={},
            intervals=Intervals(save_every=1),
            evaluate=partial(accuracy, held_out=held_out),
            mesh=mesh,
            fsdp=fsdp,
        )

    found = {}
    for before, after in (("one", "FSDP"), ("FSDP", "one")):
        name = f"{before} to {after}"
        with suppress(Killed):
            train(run(name, before, last=2))
        trained = train_and_save(run(name, after))
        weights = load_params(open_folder(trained))
        log = [json.loads(line) for line in (folder / name / "log.jsonl").read_text().splitlines()]
        found[name] = {"weights": distances(straight, weights), "log": log}
    return found


def main(folder):
    found, alone = {}, {}
    for name, (sizes, fsdp, rows, newline, settings, dropping) in CASES.items():
        key = rows, newline, dropping
        if key not in alone:
            alone[key] = trained(model(newline), rows, SETTINGS, dropping)
        one, metrics = alone[key]
        mesh_model = on_mesh.spread(model(newline), sizes, fsdp)
        other, on_a_mesh = trained(mesh_model, rows, settings, dropping)
        found[name] = {
            "metrics": [metrics, on_a_mesh],
            "weights": distances(one.model.params, other.model.params, newline),
            "bytes": bytes_of(other.model.params),
            "bytes of moments": bytes_of([x for x in jax.tree.leaves(other.optimiser) if x.ndim]),
        }
        print(name, file=sys.stderr, flush=True)
    found["memory"] = [memory(True), memory(False)]
    print("memory", file=sys.stderr, flush=True)
    found["resumed"] = resumed(folder, alone[2, "one_token", None][0].model.params)
    print(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
