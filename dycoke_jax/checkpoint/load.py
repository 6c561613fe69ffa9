"""Loads the parameters of a model onto the device."""

from collections.abc import Callable, Iterator
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, Sharding
from jax.sharding import PartitionSpec as P
from jax.typing import DTypeLike
from jaxtyping import Bool

from dycoke_jax.checkpoint.folder import Folder
from dycoke_jax.checkpoint.orbax_folder import restore_params
from dycoke_jax.checkpoint.report import warn_non_finite
from dycoke_jax.checkpoint.tensors import (
    TensorInfo,
    Weights,
    check_storage,
    prepare,
    target_dtype,
    weight_dtype,
)
from dycoke_jax.config import Storage
from dycoke_jax.models.quantisation import can_be_int8, matrix_path, scale_path
from dycoke_jax.progress import BYTES, Progress
from dycoke_jax.sharding import DATA, MODEL, constrain, weight_sharding


def load_params(
    folder: Folder,
    dtype: DTypeLike | None = None,
    progress: Progress | None = None,
    weights: Storage | None = None,
    mesh: Mesh | None = None,
    *,
    fsdp: bool = False,
) -> dict[str, jax.Array]:
    """Loads a checkpoint's parameters onto JAX's default device, or onto those of a mesh.

    The host holds one tensor, or one small group of tensors, at a time; on a mesh only the parts of
    it that lie on devices of this process, and these are all that is read.

    Args:
        folder: the opened folder of the checkpoint, of either kind.
        dtype: float32, float16 or bfloat16; None leaves each tensor in its stored dtype. Matrices
            that are stored as int8, and their scales, stay what they are.
        progress: called after each tensor; counts bytes as stored.
        weights: ``int8`` quantises the matrices of the language model; None leaves them as stored.
        mesh: the devices, of which each gets its part of the weights (``sharding.weight_spec``);
            None for a single one.
        fsdp: spread the weights over the mesh's ``data`` too.

    Returns:
        A dictionary from dotted path to array with exactly the paths of
        ``abstract_params(folder.config)``, and those of the scales of int8 matrices. Tensors that
        the model does not use are not loaded.

    Raises:
        CheckpointError: with a list of all problems of the checkpoint.

    Warns:
        CheckpointWarning: once, naming the tensors that hold NaN or infinity.
    """
    wanted = weight_dtype(dtype)
    check_storage("weights", weights)
    stored = folder.weights()
    params: dict[str, jax.Array] = {}
    total, done = sum(info.nbytes for info in stored.params.values()), 0

    def sharding(path: str, shape: tuple[int, ...]) -> Sharding:
        if mesh is None:
            return jnp.zeros(()).sharding
        return weight_sharding(path, shape, folder.config, mesh, fsdp=fsdp)

    for path, array in _arrays(
        folder, stored, wanted, weights, sharding, by_parts=mesh is not None
    ):
        params[path] = array
        # Scales that are made here are no part of the stored bytes.
        done += stored.params[path].nbytes if path in stored.params else 0
        if progress:
            progress("loading weights" + BYTES, done, total)
    if mesh is None:
        finite = jax.device_get([_is_finite(array) for array in params.values()])
    else:
        flags = [_each_finite(array, array.sharding) for array in params.values()]
        finite = jax.device_get(_all_finite(flags, mesh))
    not_finite = [matrix_path(path) for path, fine in zip(params, finite, strict=True) if not fine]
    warn_non_finite(folder.path, not_finite)
    return params


def _arrays(
    folder: Folder,
    stored: Weights,
    dtype: np.dtype | None,
    weights: Storage | None,
    sharding: Callable[[str, tuple[int, ...]], Sharding],
    *,
    by_parts: bool,
) -> Iterator[tuple[str, jax.Array]]:
    if folder.kind == "orbax" and weights is None:
        targets = {
            path: jax.ShapeDtypeStruct(
                info.shape,
                target_dtype(path, info.dtype, dtype),
                sharding=sharding(path, info.shape),
            )
            for path, info in stored.params.items()
        }
        yield from restore_params(folder.path, stored.params, targets)
        return
    if by_parts and stored.part is not None:
        for path, info in stored.params.items():
            yield from _by_parts(path, info, stored.part, dtype, weights, sharding)
        return
    for path, array in stored.stream(stored.params):
        for name, ready in prepare(path, array, dtype, weights):
            places = sharding(name, ready.shape)
            if by_parts:
                yield name, jax.make_array_from_callback(ready.shape, places, ready.__getitem__)
            else:
                yield name, jax.device_put(ready, places)


def _by_parts(
    path: str,
    info: TensorInfo,
    read: Callable[[str, tuple[slice, ...]], np.ndarray],
    dtype: np.dtype | None,
    weights: Storage | None,
    sharding: Callable[[str, tuple[int, ...]], Sharding],
) -> Iterator[tuple[str, jax.Array]]:
    """Reads, of a tensor, what lies on devices of this process, each part once.

    A matrix that is quantised is read in whole rows, which have a scale each.
    """
    shapes, by_rows = {path: info.shape}, weights == "int8" and can_be_int8(path)
    if by_rows:
        shapes[scale_path(path)] = info.shape[:1]

    @cache
    def part(*ends: tuple[int, int]) -> dict[str, np.ndarray]:
        array = read(path, tuple(slice(*of_axis) for of_axis in ends))
        return dict(prepare(path, array, dtype, weights))

    def of_device(name: str, index: tuple[slice, ...] | None) -> np.ndarray:
        assert index is not None
        ends = [one.indices(size)[:2] for one, size in zip(index, info.shape, strict=False)]
        if by_rows:
            return part(ends[0])[name][(slice(None), *index[1:])]
        return part(*ends)[name]

    for name, shape in shapes.items():
        places = sharding(name, shape)
        yield name, jax.make_array_from_callback(shape, places, partial(of_device, name))


@jax.jit
def _is_finite(array: jax.Array) -> jax.Array:
    return jnp.isfinite(array).all()


# Devices look at their own parts first, and exchange all of that once: an exchange for each weight
# would cost more than the look, and hundreds of them in flight can block simulated devices.
@jax.jit(static_argnames="sharding")
def _each_finite(array: jax.Array, sharding: NamedSharding) -> Bool[jax.Array, "data model"]:
    return jax.shard_map(
        lambda part: _is_finite(part)[None, None],
        mesh=sharding.mesh,
        in_specs=sharding.spec,
        out_specs=P(DATA, MODEL),
    )(array)


@jax.jit(static_argnames="mesh")
def _all_finite(flags: list[jax.Array], mesh: Mesh) -> Bool[jax.Array, "weights"]:
    return constrain(jnp.stack(flags).all((1, 2)), mesh)
