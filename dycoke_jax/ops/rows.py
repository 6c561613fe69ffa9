"""Computing the rows of a batch one after another, where that is faster."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

LONG = 512
"""Slots of a sequence from which on a CPU computes its rows one after another."""


def by_row(function: Callable[..., Any], x: jax.Array, *others: Any) -> Any:
    """Calls a function of B independent rows, on a CPU with long rows for one row after another.

    The arrays between the steps of a layer then stay in the caches of the CPU, and there are fewer
    of them at a time. The numbers are the same. Other devices compute all rows at once.

    Args:
        function: gives arrays [B, ...] for arrays [B, ...].
        x: an array [B, T, ...].
        others: further arrays [B, ...], in pytrees.
    """
    if x.shape[0] == 1 or x.shape[1] < LONG:
        return function(x, *others)

    def rows(*arrays: Any) -> Any:
        def one(row: Any) -> Any:
            with_batch = jax.tree.map(lambda x: x[None], row)
            return jax.tree.map(lambda x: jnp.squeeze(x, 0), function(*with_batch))

        return jax.lax.map(one, arrays)

    return jax.lax.platform_dependent(x, *others, cpu=rows, default=function)
