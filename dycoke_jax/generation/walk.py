"""The one loop over the decoder layers; what a pass does in each layer is a function."""

from collections.abc import Callable
from typing import TypeVar

import jax
from jaxtyping import Array, Bool, Float, Int

from dycoke_jax.cache import KV
from dycoke_jax.models.qwen2 import Qwen2, Qwen2Layer

Result = TypeVar("Result")

Visit = Callable[[int, Qwen2Layer, Float[Array, "B T D"]], tuple[Float[Array, "B T D"], Result]]
"""Called as ``visit(number, layer, x)`` with the input of a layer; returns output and result."""


def walk(
    language: Qwen2,
    x: Float[Array, "B T D"],
    visit: Visit[Result],
    first: int = 0,
    stop: int | None = None,
) -> tuple[Float[Array, "B T D"], list[Result]]:
    """Passes states through a group of layers.

    Args:
        language: the language model.
        x: input of the first layer of the group.
        visit: what is done in each layer.
        first: number of the first layer, from 0.
        stop: number of the layer behind the last; None: all layers that follow.

    Returns:
        The output of the last layer, before the final norm, and the result of each layer.
    """
    results = []
    for number in range(first, len(language.layers) if stop is None else stop):
        with jax.named_scope(f"layer_{number}"):
            x, result = visit(number, language.layers[number], x)
        results.append(result)
    return x, results


def walk_prompt(
    language: Qwen2,
    x: Float[Array, "B T D"],
    positions: Int[Array, "B T"],
    valid: Bool[Array, "B T"],
    first: int = 0,
    stop: int | None = None,
) -> tuple[Float[Array, "B T D"], list[KV], list[Float[Array, "B T D"]]]:
    """Passes whole prompts through a group of layers.

    Args:
        language: the language model.
        x: states of the tokens in causal order; before layer 0 their embeddings.
        positions: rotary position of each slot.
        valid: slots that hold a token; the others are never attended to.
        first: as in ``walk``.
        stop: as in ``walk``.

    Returns:
        The output of the last layer, before the final norm, the keys and values of each layer, and
        the input of each layer (the compiler drops inputs that nothing reads).
    """
    rope = language.rope(positions)

    def visit(
        number: int, layer: Qwen2Layer, x: Float[Array, "B T D"]
    ) -> tuple[Float[Array, "B T D"], tuple[KV, Float[Array, "B T D"]]]:
        out, cache = layer.prefill(x, rope, valid)
        return out, (cache, x)

    x, results = walk(language, x, visit, first, stop)
    return x, [cache for cache, _ in results], [into for _, into in results]
