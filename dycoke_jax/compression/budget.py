"""How many tokens a share is: exact, and known before anything runs."""

from collections.abc import Callable
from fractions import Fraction

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int


def kept_of(count: int, dropped: float) -> int:
    """Number of tokens that are left of ``count`` if a share is dropped, rounded down.

    It is exact in decimal: (1 - 0.9) * 20 is 2, where floats give 1.9999999999999996.
    """
    return int((1 - Fraction(str(dropped))) * count)


def lookup(budget: Callable[[int], int], most: int, counts: Int[Array, "B"]) -> Int[Array, "B"]:
    """Applies a budget to counts that are known only at run time.

    Args:
        budget: number of tokens that go on, of a number of tokens or frames.
        most: the largest count.
        counts: a count in 0..most for each row.

    Returns:
        The budget of each row, int32.
    """
    table = np.array([budget(count) for count in range(most + 1)], np.int32)
    return jnp.asarray(table)[counts]
