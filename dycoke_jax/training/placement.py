"""Where the weights, gradients and moments of a training run lie on a mesh.

Gradients and moments lie where their weights lie. With weights that are spread over ``data`` too
(FSDP), so are they, and each device updates its own part (ZeRO: Rajbhandari et al. 2020).
"""

from typing import Any, TypeVar

import jax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from dycoke_jax.config import LlavaConfig
from dycoke_jax.errors import ConfigError
from dycoke_jax.models.llava import abstract_params
from dycoke_jax.sharding import DATA, AnyMesh, constrain, data_size, weight_sharding

Tree = TypeVar("Tree")


def check_rows(rows: int, mesh: AnyMesh | None) -> None:
    """Checks that the rows of a training batch can be spread over a mesh.

    Raises:
        ConfigError: if not, naming what they must be a multiple of.
    """
    size = data_size(mesh)
    if rows % size:
        raise ConfigError(
            f"rows is {rows}; the mesh spreads them over data={size}, so it must be a multiple of "
            f"{size}"
        )


def as_weights(tree: Any, config: LlavaConfig, mesh: Mesh, *, fsdp: bool) -> Any:
    """The shardings of weights, or of what an optimiser has for each of them.

    Args:
        tree: a pytree in which the arrays of each weight lie under its dotted path, and have its
            shape. All other arrays are on every device.
        config: the model.
        mesh: the mesh.
        fsdp: spread weights over ``data`` too.

    Returns:
        A pytree of the same structure.
    """
    paths = abstract_params(config).keys()

    def place(keys: tuple, x: Any) -> NamedSharding:
        for key in keys:
            if getattr(key, "key", None) in paths:
                return weight_sharding(key.key, x.shape, config, mesh, fsdp=fsdp)
        return NamedSharding(mesh, P())

    return jax.tree_util.tree_map_with_path(place, tree)


def constrain_as_weights(tree: Tree, config: LlavaConfig, mesh: Mesh | None, *, fsdp: bool) -> Tree:
    """Spreads, inside a program, arrays as ``as_weights`` says; without a mesh it does nothing."""
    if mesh is None:
        return tree
    return jax.lax.with_sharding_constraint(tree, as_weights(tree, config, mesh, fsdp=fsdp))


def constrain_steps(tree: Tree, mesh: Mesh | None) -> Tree:
    """Spreads arrays [accumulation, rows, ...] over ``data``, inside a program."""
    return jax.tree.map(lambda x: constrain(x, mesh, None, DATA), tree)
