"""Loads the parameters of a model onto the device."""

from collections.abc import Iterator, Mapping

import jax
import jax.numpy as jnp
from jax.sharding import Sharding
from jax.typing import DTypeLike

from dycoke_jax.checkpoint.folder import Folder
from dycoke_jax.checkpoint.orbax_folder import restore_params
from dycoke_jax.checkpoint.report import warn_non_finite
from dycoke_jax.checkpoint.tensors import Weights, cast, weight_dtype
from dycoke_jax.progress import BYTES, Progress


def load_params(
    folder: Folder,
    dtype: DTypeLike | None = None,
    progress: Progress | None = None,
) -> dict[str, jax.Array]:
    """Loads a checkpoint's parameters onto JAX's default device.

    The host holds one tensor, or one small group of tensors, at a time.

    Args:
        folder: the opened folder of the checkpoint, of either kind.
        dtype: float32, float16 or bfloat16; None leaves each tensor in its stored dtype.
        progress: called after each tensor; counts bytes as stored.

    Returns:
        A dictionary from dotted path to array with exactly the paths of
        ``abstract_params(folder.config)``. Tensors that the model does not use are not loaded.

    Raises:
        CheckpointError: with a list of all problems of the checkpoint.

    Warns:
        CheckpointWarning: once, naming the tensors that hold NaN or infinity.
    """
    wanted = weight_dtype(dtype)
    weights = folder.weights()
    # Everything goes to one device; with a mesh, each path would get its own sharding here.
    default = jnp.zeros(()).sharding
    targets = {
        path: jax.ShapeDtypeStruct(info.shape, wanted or info.dtype, sharding=default)
        for path, info in weights.params.items()
    }
    params: dict[str, jax.Array] = {}
    total, done = sum(info.nbytes for info in weights.params.values()), 0
    for path, array in _arrays(folder, weights, targets):
        params[path] = array
        done += weights.params[path].nbytes
        if progress:
            progress("loading weights" + BYTES, done, total)
    finite = jax.device_get({path: _all_finite(array) for path, array in params.items()})
    warn_non_finite(folder.path, [path for path in params if not finite[path]])
    return params


def _arrays(
    folder: Folder, weights: Weights, targets: Mapping[str, jax.ShapeDtypeStruct]
) -> Iterator[tuple[str, jax.Array]]:
    if folder.kind == "orbax":
        yield from restore_params(folder.path, weights.params, targets)
        return
    for path, array in weights.stream(targets):
        target = targets[path]
        assert isinstance(target.sharding, Sharding)
        yield path, jax.device_put(cast(array, target.dtype), target.sharding)


@jax.jit
def _all_finite(array: jax.Array) -> jax.Array:
    return jnp.isfinite(array).all()
