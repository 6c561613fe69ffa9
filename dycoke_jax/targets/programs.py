"""The programs of a model as shapes, spread over devices that need not be there."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding

from dycoke_jax.compression.protocol import Compressor
from dycoke_jax.config import LlavaConfig, Storage
from dycoke_jax.engine.batch import empty_batch, layout_of, rows_for
from dycoke_jax.engine.requests import Decoding, Prepared
from dycoke_jax.generation.decode import decode
from dycoke_jax.generation.encode import Features, chunks_of, empty_features, encode_chunk
from dycoke_jax.generation.layout import Layout
from dycoke_jax.generation.prefill import prefill
from dycoke_jax.generation.state import DecodeState, spread_on
from dycoke_jax.inputs.prompts import Prompt
from dycoke_jax.model import Model
from dycoke_jax.models.llava import abstract_params
from dycoke_jax.models.quantisation import can_be_int8, scale_path
from dycoke_jax.sharding import (
    DATA,
    MODEL,
    check_mesh,
    data_size,
    make_mesh,
    weight_sharding,
)

PREFIX = 14
"""Tokens of the text before the clip."""
STAGES = ("vision", "prefill", "decode")


@dataclass(frozen=True)
class Workload:
    """What is compiled.

    Attributes:
        config: the model.
        batch: number of requests that run together.
        frames: frames of each clip.
        compression: the compression; None for the plain model.
        prompt_tokens: tokens of the text around the clip.
        new_tokens: number of tokens that each request generates.
        dtype: name of the dtype of weights and computation.
        weights: ``int8`` for the matrices of the language model as int8; None: in ``dtype``.
        kv: ``int8`` for key/value caches as int8; None: in ``dtype``.
        fsdp: whether weights are spread over the mesh's ``data`` besides.
    """

    config: LlavaConfig
    batch: int
    frames: int
    compression: Compressor | None = None
    prompt_tokens: int = 34
    new_tokens: int = 64
    dtype: str = "bfloat16"
    weights: Storage | None = None
    kv: Storage | None = None
    fsdp: bool = False


@dataclass(frozen=True)
class Stage:
    """A program, and what it is given.

    Attributes:
        name: one of ``STAGES``.
        function: the jitted function.
        arguments: its traced arguments, as shapes on devices.
        static: its static arguments.
        runs: how often it runs for a batch; that of decoding is a step of its loop.
    """

    name: str
    function: jax.stages.Wrapped
    arguments: tuple[Any, ...]
    static: dict[str, Any]
    runs: int


@dataclass(frozen=True)
class Programs:
    """The programs of a workload.

    Attributes:
        model: the model as shapes on devices.
        layout: the layout of the batch.
        stages: the programs in their order.
    """

    model: Model
    layout: Layout
    stages: tuple[Stage, ...]

    @property
    def state(self) -> DecodeState:
        """The state of decoding, as shapes on devices."""
        return self.stages[-1].arguments[1]


def sizes_of_mesh(config: LlavaConfig, devices: int) -> dict[str, int]:
    """The sizes of a mesh that divides heads, KV heads and the inner width without a rest.

    The axis ``model`` is as long as that allows, and as the KV heads go, because more of it would
    keep the same keys and values on several devices. The rest is ``data``.

    Args:
        config: the model.
        devices: number of devices.
    """
    text = config.text
    sizes = (text.num_heads, text.num_kv_heads, text.intermediate_size, devices)
    model = max(n for n in range(1, devices + 1) if all(size % n == 0 for size in sizes))
    return {DATA: devices // model, MODEL: model}


def mesh_of(devices: list[jax.Device], config: LlavaConfig, sizes: dict[str, int]) -> Mesh | None:
    """A mesh of these devices, or None for a single one.

    Raises:
        ConfigError: if the sizes fit neither the devices nor the model.
    """
    mesh = make_mesh(sizes, devices)
    check_mesh(config, mesh)
    return mesh if len(devices) > 1 else None


def model_of(work: Workload, device: jax.Device, mesh: Mesh | None) -> Model:
    """The model of a workload as shapes, on a mesh or on a device."""
    params: dict[str, Any] = {}
    for path, leaf in abstract_params(work.config).items():
        shapes: dict[str, tuple[tuple[int, ...], Any]] = {path: (leaf.shape, work.dtype)}
        if work.weights == "int8" and can_be_int8(path):
            shapes = {
                path: (leaf.shape, jnp.int8),
                scale_path(path): (leaf.shape[:1], jnp.float32),
            }
        for name, (shape, dtype) in shapes.items():
            sharding = (
                SingleDeviceSharding(device)
                if mesh is None
                else weight_sharding(name, shape, work.config, mesh, fsdp=work.fsdp)
            )
            params[name] = jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)
    return Model(params, work.config, work.dtype, mesh, work.kv, fsdp=work.fsdp)


def programs(work: Workload, device: jax.Device, mesh: Mesh | None) -> Programs:
    """The programs that answer a batch of requests.

    Args:
        work: what is asked.
        device: the device, if there is no mesh.
        mesh: the mesh, or None.

    Raises:
        ConfigError: if the compression cannot work on this model or clip length.
        RequestError: if the request does not fit into the model's positions.
    """
    config, model = work.config, model_of(work, device, mesh)
    question = max(1, work.prompt_tokens - PREFIX)
    text_ids = Prompt((0,) * (work.prompt_tokens - question), (0,) * question)
    clip = np.zeros((work.frames, config.vision.image_size, config.vision.image_size, 3), np.uint8)
    request = Prepared(text_ids, clip, Decoding(work.new_tokens))
    layout = layout_of(config, [request], rows_for(work.batch, mesh), work.compression)
    rows = layout.rows
    signals = () if layout.tokens is None else layout.tokens.signals

    def on_rows(tree: Any, *axes: str) -> Any:
        sharding = (
            SingleDeviceSharding(device)
            if mesh is None
            else NamedSharding(mesh, PartitionSpec(DATA, *axes))
        )
        return jax.tree.map(lambda x: shape(x.shape, x.dtype, sharding=sharding), tree)

    # What has no sharding comes from the host.
    shards, shape = data_size(mesh), jax.ShapeDtypeStruct
    chunk, most = chunks_of(rows // shards * layout.frames, mesh)
    arrays = on_rows(jax.eval_shape(lambda: empty_features(model, shards, most, signals)))
    frames = on_rows(shape((shards, chunk, *clip.shape[1:]), jnp.uint8), MODEL)
    number: Any = shape((), jnp.int32)
    numbers: Any = shape((rows,), jnp.int32)
    tokens, *others = on_rows(
        [shape((rows, layout.frames, *array.shape[2:]), array.dtype) for array in arrays]
    )
    text, sampling, limits = jax.eval_shape(lambda: empty_batch(layout))
    given = model, Features(tokens, numbers, tuple(others)), text, sampling, limits
    static = {"layout": layout}
    state = jax.eval_shape(lambda *x: prefill(*x, **static), *given)
    if mesh is None:
        state = on_rows(state)
    else:
        # The compiler says how a state lies that is constrained as prefill does it. It lies alike
        # for one row a replica, for which there is always room.
        few = jax.tree.map(
            lambda x: shape((shards, *x.shape[1:]) if x.shape[:1] == (rows,) else x.shape, x.dtype),
            state,
        )
        spread = jax.jit(lambda state: spread_on(state, mesh)).lower(few).compile()
        state = jax.tree.map(
            lambda x, sharding: shape(x.shape, x.dtype, sharding=sharding),
            state,
            spread.output_shardings,
        )
    vision = (model, arrays, frames, number)
    stages = (
        Stage("vision", encode_chunk, vision, {"signals": signals}, most // chunk),
        Stage("prefill", prefill, given, static, 1),
        Stage("decode", decode, (model, state, sampling, limits, number), static, 1),
    )
    return Programs(model, layout, stages)
