"""The model as one value: its weights, with what is static about them."""

from dataclasses import dataclass, field, replace
from typing import TypeVar

import jax
from flax import nnx
from jax.sharding import Mesh

from dycoke_jax.config import LlavaConfig, Storage
from dycoke_jax.models.llava import Llava, Params, dotted, split
from dycoke_jax.models.quantisation import stored_weight
from dycoke_jax.sharding import weight_sharding

Tree = TypeVar("Tree")

_STATIC = {"static": True}


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Model:
    """A model that jitted functions take whole.

    Only ``params`` is traced: programs are compiled for the other fields.

    Attributes:
        params: weights by dotted path, in any float dtypes, or int8 with scales (see
            ``models.quantisation``); further ones are ignored.
        config: sizes and layout.
        dtype: name of the dtype of the computation; norms, softmax and logits are in float32.
        mesh: the devices that the weights are spread over; None for a single device.
        fsdp: whether the weights are spread over the mesh's ``data`` too, and are gathered where
            they are used.
        kv: ``int8`` keeps the key/value caches as int8, with a scale for each head and slot; None
            keeps them in the dtype of the computation.
    """

    params: Params
    config: LlavaConfig = field(metadata=_STATIC)
    dtype: str = field(default="float32", metadata=_STATIC)
    mesh: Mesh | None = field(default=None, metadata=_STATIC)
    fsdp: bool = field(default=False, metadata=_STATIC, kw_only=True)
    kv: Storage | None = field(default=None, metadata=_STATIC)

    def bind(self) -> Llava:
        """Returns the network with these weights.

        It is cheap and meant to be called inside jitted functions. There, weights that are spread
        over ``data`` are gathered each time that a layer reads them.
        """
        graphdef, leaves = split(self.config, self.dtype, self.mesh)
        state = []
        for keys, leaf in leaves:
            path, places = dotted(keys), None
            if self.mesh is not None and self.fsdp:
                places = tuple(
                    weight_sharding(path, leaf.shape, self.config, self.mesh, fsdp=fsdp)
                    for fsdp in (True, False)
                )
            state.append((keys, leaf.replace(stored_weight(self.params, path), places=places)))
        return nnx.merge(graphdef, nnx.from_flat_state(state))

    def in_step(self, changing: Tree) -> tuple["Model", Tree]:
        """Returns the same model, and the same arrays, for use in the body of a loop.

        What weights are gathered to is the same in every step of a loop, so the compiler would
        gather all of them before the loop and hold them. It cannot where they seem to depend on
        something that is not.

        Args:
            changing: arrays that change from step to step. The step must use those that are
                returned, or the compiler sees that nothing depends on them.
        """
        if not self.fsdp:
            return self, changing
        params, changing = jax.lax.optimization_barrier((self.params, changing))
        return replace(self, params=params), changing
