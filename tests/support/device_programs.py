"""The programs of a 7B model, compiled for a TPU v6e or an H100 that need not be there.

    python -m support.device_programs tpu|cuda

prints one line of JSON for each program, and fails if a program has not the attention kernels that
it should have or copies its caches, or if a token stage calls the host. The widths are those of the
released models, with few layers. It needs the device's compiler: libtpu, or jax-cuda12-plugin and
nvidia-cuda-nvcc-cu12. Nothing is run. cuDNN's own checks are not made either: its kernels are calls
in the program.
"""

import json
import re
import sys
import time
from itertools import chain

if __name__ == "__main__":
    from dycoke_jax.targets.environment import without_devices

    without_devices()

import jax
import jax.numpy as jnp
from jax.sharding import SingleDeviceSharding

from dycoke_jax import DyCoke
from dycoke_jax.compression.methods import METHODS as REGISTERED
from dycoke_jax.config import LlavaConfig, TextConfig, VisionConfig
from dycoke_jax.generation.assemble import TextIds
from dycoke_jax.generation.decode import decode
from dycoke_jax.generation.encode import Features
from dycoke_jax.generation.layout import plan
from dycoke_jax.generation.prefill import prefill
from dycoke_jax.generation.sampling import Sampling
from dycoke_jax.generation.state import Limits
from dycoke_jax.model import Model
from dycoke_jax.models.llava import abstract_params
from dycoke_jax.targets.topology import as_if_cudnn_were_there, devices_of, parse_target

VISION_LAYERS, TEXT_LAYERS = 1, 2
ROWS, FRAMES, PREFIX, QUESTION, GENERATED = 2, 32, 14, 40, 64
NEWLINES = ("one_token", "grid")
METHODS = {"plain": None, "dycoke": DyCoke(layer=1)}
NAMES = ["encode"] + [
    f"{stage} {newline} {method}"
    for newline in NEWLINES
    for method in METHODS
    for stage in ("prefill", "decode")
]
KERNELS = {"encode": VISION_LAYERS, "prefill": TEXT_LAYERS, "decode": 0, "select": 0}
"""Calls of the attention kernel in the programs of each stage."""

TARGETS = {"tpu": "v6e:2x4", "cuda": "h100:1"}


def model(newline):
    """The model in bfloat16, as shapes."""
    vision = VisionConfig(num_layers=VISION_LAYERS)
    text = TextConfig(152064, 3584, 18944, TEXT_LAYERS, 28, 4, 128, tie_word_embeddings=False)
    config = LlavaConfig(vision, text, newline=newline)
    shapes = abstract_params(config)
    params = {path: jax.ShapeDtypeStruct(x.shape, jnp.bfloat16) for path, x in shapes.items()}
    return Model(params, config, "bfloat16")


def programs():
    """Each program: its name, the function, its arguments as shapes, and the static ones."""
    shape = jax.ShapeDtypeStruct
    tower, config = model("grid"), model("grid").config
    frames = shape((8, config.vision.image_size, config.vision.image_size, 3), jnp.uint8)
    yield "encode", jax.jit(lambda model, x: model.bind().encode(x)), (tower, frames), {}
    ints, floats = (shape((ROWS,), dtype) for dtype in (jnp.int32, jnp.float32))
    for newline in NEWLINES:
        for name, method in METHODS.items():
            whole, config = model(newline), model(newline).config
            layout = plan(config, ROWS, FRAMES, PREFIX, QUESTION, GENERATED, method)
            tokens = (ROWS, FRAMES, config.tokens_per_frame, config.text.hidden_size)
            features = Features(shape(tokens, jnp.bfloat16), ints, ())
            prefix, question = (
                shape((ROWS, count), jnp.int32)
                for count in (layout.slots.prefix, layout.slots.question)
            )
            text = TextIds(prefix, ints, question, ints)
            sampling = Sampling(floats, ints, floats, ints)
            limits = Limits(ints, shape((ROWS, 2), jnp.int32))
            arguments = (whole, features, text, sampling, limits)
            static = {"layout": layout}
            yield f"prefill {newline} {name}", prefill, arguments, static
            state = jax.eval_shape(lambda *x, s=static: prefill(*x, **s), *arguments)
            until = shape((), jnp.int32)
            arguments = (whole, state, sampling, limits, until)
            yield f"decode {newline} {name}", decode, arguments, static


def token_stages():
    """The token stage of each method with its defaults, as ``programs`` gives the others."""
    shape = jax.ShapeDtypeStruct
    tower = model("one_token")
    side = tower.config.vision.image_size
    frames = shape((1, side, side, 3), jnp.uint8)
    for name, method in REGISTERED.items():
        stage = method().stages.tokens
        if stage is None:
            continue

        def encode(tower, frames, signals=stage.signals):
            return tower.bind().encode_with_signals(frames, signals)

        features, signals = jax.tree.map(
            lambda x: shape((ROWS, FRAMES, *x.shape[1:]), x.dtype),
            jax.eval_shape(encode, tower, frames),
        )
        arguments = (features, shape((ROWS,), jnp.int32), signals)
        yield f"select {name}", jax.jit(stage.select), arguments, {}


def report(name, compiled, arguments, seconds):
    """What the compiler made of a program."""
    text, memory = compiled.as_text(), compiled.memory_analysis()
    caches, copied = 0, 0
    if name.startswith("decode"):
        # What a stage keeps from step to step may hold keys and values too.
        arrays = jax.tree.leaves([(view.caches, view.memory) for view in arguments[1].views])
        caches = sum(x.size * x.dtype.itemsize for x in arrays)
        shapes = {",".join(map(str, x.shape)) for x in arrays if x.ndim == 4}
        copied = len(re.findall(rf"= bf16\[({'|'.join(shapes)})\]\S* copy\(", text))
    return {
        "program": name,
        "splash": len(re.findall(r'custom_call_target="tpu_custom_call"', text)),
        "cudnn": len(re.findall(r'custom_call_target="__cudnn\$fmhaSoftmax"', text)),
        "host": re.findall(r"\b(?:send|recv|infeed|outfeed)\(|\S*callback\S*", text),
        "caches": caches,
        "copied": copied,
        "aliased": memory.alias_size_in_bytes,
        "temporaries": memory.temp_size_in_bytes,
        "seconds": round(seconds, 1),
    }


def main(platform):
    # Without a device to measure on, XLA writes every matrix product in Triton with one default
    # tile, and fails at the narrow ones of pooling. Calls of cuBLAS in their place change nothing
    # that is looked at here.
    options = {"xla_gpu_enable_triton_gemm": False} if platform == "cuda" else {}
    place, names = SingleDeviceSharding(devices_of(parse_target(TARGETS[platform]))[0]), []
    for name, function, arguments, static in chain(programs(), token_stages()):
        start = time.perf_counter()
        placed = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), arguments
        )
        compiled = function.lower(*placed, **static).compile(options)
        seconds = time.perf_counter() - start
        made = report(name, compiled, arguments, seconds)
        print(json.dumps(made), flush=True)
        assert made["splash" if platform == "tpu" else "cudnn"] == KERNELS[name.split()[0]], name
        # Only decoding has caches that it is given, and it updates them in place.
        assert made["aliased"] >= made["caches"], name
        # The compiler for TPUs brings caches as small as these to the chip and back.
        assert platform == "tpu" or made["copied"] == 0, name
        assert (made["caches"] > 0) == name.startswith("decode"), name
        if name.startswith("select"):
            assert not made["host"], name
        else:
            names.append(name)
    assert names == NAMES


if __name__ == "__main__":
    with as_if_cudnn_were_there():
        main(sys.argv[1])
