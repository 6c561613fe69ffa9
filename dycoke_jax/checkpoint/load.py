"""Loads the parameters of a model onto the device."""

from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, Sharding
from jax.typing import DTypeLike

from dycoke_jax.checkpoint.folder import Folder
from dycoke_jax.checkpoint.orbax_folder import restore_params
from dycoke_jax.checkpoint.report import warn_non_finite
from dycoke_jax.checkpoint.tensors import (
    Weights,
    check_storage,
    prepare,
    target_dtype,
    weight_dtype,
)
from dycoke_jax.config import Storage
from dycoke_jax.models.quantisation import matrix_path
from dycoke_jax.progress import BYTES, Progress
from dycoke_jax.sharding import weight_sharding


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

    The host holds one tensor, or one small group of tensors, at a time.

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

    for path, array in _arrays(folder, stored, wanted, weights, sharding):
        params[path] = array
        # Scales that are made here are no part of the stored bytes.
        done += stored.params[path].nbytes if path in stored.params else 0
        if progress:
            progress("loading weights" + BYTES, done, total)
    finite = jax.device_get({path: _all_finite(array) for path, array in params.items()})
    not_finite = [matrix_path(path) for path in params if not finite[path]]
    warn_non_finite(folder.path, not_finite)
    return params


def _arrays(
    folder: Folder,
    stored: Weights,
    dtype: np.dtype | None,
    weights: Storage | None,
    sharding: Callable[[str, tuple[int, ...]], Sharding],
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
    for path, array in stored.stream(stored.params):
        for name, ready in prepare(path, array, dtype, weights):
            yield name, jax.device_put(ready, sharding(name, ready.shape))


@jax.jit
def _all_finite(array: jax.Array) -> jax.Array:
    return jnp.isfinite(array).all()
