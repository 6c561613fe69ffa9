"""How many tokens a share is: exact, and known before anything runs."""

from collections.abc import Callable
from fractions import Fraction
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from dycoke_jax.checks import number


def kept_of(count: int, dropped: float) -> int:
    """Number of tokens that are left of ``count`` if a share is dropped, rounded down.

    It is exact in decimal: (1 - 0.9) * 20 is 2, where floats give 1.9999999999999996.
    """
    return int((1 - Fraction(str(dropped))) * count)


def check_budget(name: str, budget: Any) -> float:
    """Checks a budget: the share of a clip's visual tokens that go on, in (0, 1].

    Args:
        name: name of the method, for the message.
        budget: the setting.

    Returns:
        The budget as a ``float``.

    Raises:
        ConfigError: with the allowed range.
    """
    return number(f"{name}: budget", budget, 0, 1, with_low=False, with_high=True)


def share_of(count: int, budget: float) -> int:
    """Number of tokens that a budget allows of ``count``, rounded down, but at least 1 of any.

    It is exact in decimal: 0.29 * 100 is 29, where floats give 28.999999999999996.
    """
    return min(count, max(1, int(Fraction(str(budget)) * count)))


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
