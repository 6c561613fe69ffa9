"""Loads the parameters of a model to the device."""

from collections.abc import Iterator, Mapping
from pathlib import Path

import jax
import jax.numpy as jnp
from jax.sharding import Sharding
from jax.typing import DTypeLike

from dycoke_jax.checkpoint.folder import Checkpoint, kind_of, open_weights
from dycoke_jax.checkpoint.orbax_folder import restore_params
from dycoke_jax.checkpoint.report import warn_non_finite
from dycoke_jax.checkpoint.tensors import Progress, Weights, cast, weight_dtype
from dycoke_jax.config import LlavaConfig


def load_params(
    folder: str | Path,
    config: LlavaConfig,
    dtype: DTypeLike | None = None,
    progress: Progress | None = None,
) -> dict[str, jax.Array]:
    """Loads a checkpoint of either kind to jax's default device, a tensor (or group) at a time.

    Args:
        folder: a Hugging Face folder or a converted one (``open_checkpoint`` finds it).
        config: what the folder must hold.
        dtype: float32, float16 or bfloat16; None keeps the dtype in which each tensor is stored.
        progress: told after each tensor.

    Returns:
        Dotted path to array, exactly the tree of ``abstract_params(config)``. Tensors that the
        model does not use are not loaded.

    Raises:
        CheckpointError: listing everything that is wrong with the checkpoint.

    Warns:
        CheckpointWarning: once, naming the tensors that hold NaN or infinity.
    """
    folder = Path(folder)
    wanted = weight_dtype(dtype)
    checkpoint = Checkpoint(folder.absolute(), config, kind_of(folder))
    weights = open_weights(checkpoint)
    # All on one device; a mesh would give each path a sharding of its own here.
    default = jnp.zeros(()).sharding
    targets = {
        path: jax.ShapeDtypeStruct(info.shape, wanted or info.dtype, sharding=default)
        for path, info in weights.params.items()
    }
    params: dict[str, jax.Array] = {}
    total, done = sum(info.nbytes for info in weights.params.values()), 0
    for path, array in _arrays(checkpoint, weights, targets):
        params[path] = array
        done += weights.params[path].nbytes
        if progress:
            progress(done, total, path)
    finite = jax.device_get({path: _all_finite(array) for path, array in params.items()})
    warn_non_finite(checkpoint.folder, [path for path in params if not finite[path]])
    return params


def _arrays(
    checkpoint: Checkpoint, weights: Weights, targets: Mapping[str, jax.ShapeDtypeStruct]
) -> Iterator[tuple[str, jax.Array]]:
    if checkpoint.kind == "orbax":
        yield from restore_params(checkpoint.folder, weights.params, targets)
        return
    for path, array in weights.stream(targets):
        target = targets[path]
        assert isinstance(target.sharding, Sharding)
        yield path, jax.device_put(cast(array, target.dtype), target.sharding)


@jax.jit
def _all_finite(array: jax.Array) -> jax.Array:
    return jnp.isfinite(array).all()
