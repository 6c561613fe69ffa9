"""Meshes of devices, and what of a model lies where on them.

A mesh has two axes. Rows of a batch are spread over ``data``; heads, the inner width of MLPs and
the vocabulary over ``model`` (tensor parallelism: Shoeybi et al. 2019, Megatron-LM). Frames are
spread over all devices, since each of them holds the whole vision tower. Weights may be spread over
``data`` besides, and are then gathered where they are used (fully sharded data parallelism, FSDP:
Zhao et al. 2023).

This file has the only table of what is spread how. Inside programs the compiler derives all else
from it (GSPMD: Xu et al. 2021), helped by constraints at few places.
"""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import jax
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float

from dycoke_jax.config import LlavaConfig, TextConfig
from dycoke_jax.errors import ConfigError

DATA, MODEL = "data", "model"
Params = Mapping[str, Array]
AnyMesh = Mesh | AbstractMesh
"""A mesh, of devices or of sizes alone."""
Tree = TypeVar("Tree")

_HEADS, _KV_HEADS, _INNER, _VOCABULARY = "heads", "KV heads", "inner", "vocabulary"
_LANGUAGE = r"language_model\.layers\.\d+\."
# What each axis of a weight is of; None: of nothing that is spread. Axes at the end are left out,
# and so are weights without any.
_TABLE: tuple[tuple[str, tuple[str | None, ...]], ...] = (
    (_LANGUAGE + r"self_attn\.q_proj\.(weight|bias)", (_HEADS,)),
    (_LANGUAGE + r"self_attn\.[kv]_proj\.(weight|bias)", (_KV_HEADS,)),
    (_LANGUAGE + r"self_attn\.o_proj\.weight", (None, _HEADS)),
    (_LANGUAGE + r"mlp\.(gate|up)_proj\.weight", (_INNER,)),
    (_LANGUAGE + r"mlp\.down_proj\.weight", (None, _INNER)),
    (r"language_model\.embed_tokens\.weight|lm_head\.weight", (_VOCABULARY,)),
)


@dataclass(frozen=True)
class Spread:
    """How the arrays of attention lie on a mesh.

    Attributes:
        mesh: the mesh.
        batch: the axes of the mesh over which rows, or frames, are spread.
        heads: the axis over which heads are spread; None: every device has all.
    """

    mesh: Mesh
    batch: tuple[str, ...]
    heads: str | None


def parse_mesh(text: str) -> dict[str, int]:
    """Reads the sizes of a mesh, such as ``data=2,model=4``; an axis that is left out has size 1.

    Raises:
        ConfigError: if it is written otherwise.
    """
    sizes: dict[str, int] = {}
    for part in text.split(","):
        name, _, size = (piece.strip() for piece in part.partition("="))
        if name not in (DATA, MODEL) or name in sizes or not re.fullmatch("[1-9][0-9]*", size):
            raise ConfigError(f"mesh {text!r}: write the size of each axis, as in data=2,model=4")
        sizes[name] = int(size)
    return {DATA: sizes.get(DATA, 1), MODEL: sizes.get(MODEL, 1)}


def make_mesh(sizes: str | Mapping[str, int], devices: list[jax.Device] | None = None) -> Mesh:
    """Makes a mesh of all devices; those of a process have rows of their own along ``data``.

    Args:
        sizes: sizes of the axes ``data`` and ``model``, as text or by name.
        devices: the devices; None: all of JAX's default backend, those of other hosts included.

    Raises:
        ConfigError: if the sizes do not take all devices.
    """
    if isinstance(sizes, str):
        sizes = parse_mesh(sizes)
    else:
        sizes = parse_mesh(",".join(f"{name}={size}" for name, size in sizes.items()))
    devices = jax.devices() if devices is None else devices
    if math.prod(sizes.values()) != len(devices):
        raise ConfigError(
            f"a mesh of data={sizes[DATA]}, model={sizes[MODEL]} needs "
            f"{math.prod(sizes.values())} devices, and there are {len(devices)}; choose sizes "
            f"whose product is {len(devices)}"
        )
    kinds = (AxisType.Auto, AxisType.Auto)
    processes = len({device.process_index for device in devices})
    if processes > 1 and sizes[DATA] % processes == 0:
        # Each process gets rows of its own, and only ``model`` needs the fastest links.
        grid = mesh_utils.create_hybrid_device_mesh(
            (sizes[DATA] // processes, sizes[MODEL]),
            (processes, 1),
            devices,
            process_is_granule=True,
            allow_split_physical_axes=True,
        )
        return Mesh(grid, (DATA, MODEL), kinds)
    return jax.make_mesh((sizes[DATA], sizes[MODEL]), (DATA, MODEL), kinds, devices=devices)


def check_mesh(config: LlavaConfig, mesh: AnyMesh) -> None:
    """Refuses a mesh with other axes, or whose axis ``model`` cannot divide the language model.

    Heads or a vocabulary that it does not divide are kept whole on each device instead.

    Raises:
        ConfigError: saying which sizes work.
    """
    if tuple(mesh.axis_names) != (DATA, MODEL):
        raise ConfigError(f"the mesh has the axes {mesh.axis_names}; it must have data and model")
    inner, size = config.text.intermediate_size, mesh.shape[MODEL]
    if inner % size:
        sizes = ", ".join(str(n) for n in range(1, 65) if inner % n == 0)
        raise ConfigError(
            f"a mesh with model={size} does not divide the inner width {inner} of this language "
            f"model; sizes that do: {sizes}"
        )


def data_size(mesh: AnyMesh | None) -> int:
    """Over how many shards the rows of a batch are spread; 1 without a mesh."""
    return 1 if mesh is None else mesh.shape[DATA]


def model_size(mesh: AnyMesh | None) -> int:
    """Over how many shards the language model is spread; 1 without a mesh."""
    return 1 if mesh is None else mesh.shape[MODEL]


def heads_are_spread(text: TextConfig, mesh: AnyMesh | None) -> bool:
    """Whether attention is spread over ``model``, rather than whole on each device."""
    return text.num_heads % model_size(mesh) == 0


def kv_heads_on(text: TextConfig, mesh: AnyMesh | None) -> int:
    """How many KV heads the caches have, of which each device has an equal share.

    If there are fewer than devices along ``model``, or the devices do not divide them, each is
    repeated as often as it takes, so that every device finds the KV heads of its query heads.
    """
    if not heads_are_spread(text, mesh):
        return text.num_kv_heads
    return math.lcm(text.num_kv_heads, model_size(mesh))


def weight_spec(
    path: str, shape: tuple[int, ...], config: LlavaConfig, mesh: AnyMesh, *, fsdp: bool = False
) -> P:
    """How a weight is spread.

    Args:
        path: its dotted path; that of the scales of an int8 matrix too.
        shape: its shape.
        config: the model.
        mesh: the mesh.
        fsdp: spread it over ``data`` besides, along the first axis that allows it.
    """
    text, size = config.text, mesh.shape[MODEL]
    spread = {
        _HEADS: heads_are_spread(text, mesh),
        _KV_HEADS: heads_are_spread(text, mesh) and text.num_kv_heads % size == 0,
        _INNER: text.intermediate_size % size == 0,
        _VOCABULARY: text.vocab_size % size == 0,
    }
    found = next((of for pattern, of in _TABLE if re.fullmatch(f"({pattern})(_scale)?", path)), ())
    axes: list[str | None] = [None] * len(shape)
    for number, what in enumerate(found[: len(shape)]):
        if what is not None and spread[what]:
            axes[number] = MODEL
    if fsdp:
        for number, width in enumerate(shape):
            if axes[number] is None and width % mesh.shape[DATA] == 0:
                axes[number] = DATA
                break
    while axes and axes[-1] is None:
        axes.pop()
    return P(*axes)


def weight_sharding(
    path: str, shape: tuple[int, ...], config: LlavaConfig, mesh: Mesh, *, fsdp: bool = False
) -> NamedSharding:
    """The sharding of a weight; see ``weight_spec``."""
    return NamedSharding(mesh, weight_spec(path, shape, config, mesh, fsdp=fsdp))


def gathered(weight: Tree, spread: NamedSharding, whole: NamedSharding) -> Tree:
    """Gathers, inside a program, a weight that is spread over ``data``.

    Its gradient is spread again, so that the compiler may sum it in parts (reduce-scatter).

    Args:
        weight: a weight, or a pytree of a matrix and the scales of its rows.
        spread: the sharding of the weight.
        whole: its sharding once it is gathered.
    """

    def of(places: NamedSharding, x: Array) -> NamedSharding:
        return NamedSharding(places.mesh, P(*places.spec[: x.ndim]))

    return jax.tree.map(lambda x: _gathered(x, of(spread, x), of(whole, x)), weight)


@partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _gathered(x: Array, spread: NamedSharding, whole: NamedSharding) -> Array:
    # Without the first the compiler may gather earlier, such as what is kept for the gradient.
    # Without the barrier it takes the second for what other uses of the weight want as well.
    x = jax.lax.optimization_barrier(jax.lax.with_sharding_constraint(x, spread))
    return jax.lax.with_sharding_constraint(x, whole)


_gathered.defvjp(
    lambda x, spread, whole: (_gathered(x, spread, whole), None),
    lambda spread, _whole, _, gradient: (jax.lax.with_sharding_constraint(gradient, spread),),
)


def constrain(x: Array, mesh: Mesh | None, *axes: str | tuple[str, ...] | None) -> Array:
    """Tells the compiler how an array inside a program is spread.

    Without a mesh, and for an array in the memory of the host, it does nothing.

    Args:
        x: the array.
        mesh: the mesh.
        axes: the axes of the mesh for each axis of the array; those at the end may be left out.
    """
    if mesh is None or jax.typeof(x).memory_space == jax.memory.Space.Host:
        return x
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, P(*axes)))


def constrain_rows(tree: Tree, mesh: Mesh | None) -> Tree:
    """Spreads the first axis of arrays over ``data``; those without an axis are on all devices."""

    def place(x: Array) -> Array:
        return constrain(x, mesh, *([DATA] if x.ndim else []))

    return jax.tree.map(place, tree)


def of_rows(mesh: Mesh | None, text: TextConfig) -> Spread | None:
    """How the language model's attention is spread: rows over ``data``, heads over ``model``."""
    if mesh is None:
        return None
    return Spread(mesh, (DATA,), MODEL if heads_are_spread(text, mesh) else None)


def of_frames(mesh: Mesh | None) -> Spread | None:
    """How the vision tower's attention is spread: frames over all devices."""
    return None if mesh is None else Spread(mesh, (DATA, MODEL), None)


def constrain_heads(
    x: Float[Array, "B heads T E"], spread: Spread | None
) -> Float[Array, "B heads T E"]:
    """Spreads queries, keys or values."""
    return x if spread is None else constrain(x, spread.mesh, spread.batch, spread.heads)


def mapped(
    function: Callable[..., Array],
    spread: Spread | None,
    of_heads: Sequence[Array],
    of_rows: Sequence[Array | None] = (),
    *,
    out_has_heads: bool = True,
) -> Array:
    """Runs attention on each device with its own rows and heads.

    Kernels cannot be divided by the compiler, and loops over rows or heads should not be.

    Args:
        function: called with all arrays.
        spread: how they are spread; None: the function is called as it is.
        of_heads: arrays [B, heads, ...].
        of_rows: arrays [B, ...] after them, or None.
        out_has_heads: whether the result is [B, heads, ...] or [B, ...].
    """
    if spread is None:
        return function(*of_heads, *of_rows)
    heads, rows = P(spread.batch, spread.heads), P(spread.batch)
    specs = (*(heads for _ in of_heads), *(None if x is None else rows for x in of_rows))
    run = jax.shard_map(
        function,
        mesh=spread.mesh,
        in_specs=specs,
        out_specs=heads if out_has_heads else rows,
        check_vma=False,
    )
    return run(*of_heads, *of_rows)
