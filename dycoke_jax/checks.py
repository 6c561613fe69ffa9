"""Checks of single arguments and settings: their type first, then their range.

Each function returns the value in the plain Python type that it stands for, so that a NumPy integer
or a fraction is stored, hashed and written as JSON like any other number. What is refused raises
the given error with one line that names the argument, its value and what is allowed.
"""

import operator
import reprlib
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from numbers import Real
from os import PathLike
from typing import Any, TypeVar

import numpy as np

from dycoke_jax.errors import ConfigError, DycokeError

T = TypeVar("T")
Choice = TypeVar("Choice", bound=str)
Error = type[DycokeError]


def whole_number(
    name: str,
    value: Any,
    low: int,
    high: int = sys.maxsize,
    *,
    allowed: str | None = None,
    error: Error = ConfigError,
) -> int:
    """Checks a count, an index or a seed.

    Args:
        name: name of the argument in the message.
        value: an ``int``, a NumPy integer or another integer type; not a ``bool``, and not a float,
            even one without a fraction.
        low: smallest value that is allowed.
        high: largest value that is allowed; the default is the largest size of anything in Python.
        allowed: words for the range in the message; None: words made from ``low`` and ``high``.
        error: class of exception to raise.

    Raises:
        DycokeError: of class ``error``.
    """
    if allowed is None:
        allowed = f"be at least {low}" if high == sys.maxsize else f"lie in {low}..{high}"
    try:
        if isinstance(value, bool | np.bool_):
            raise TypeError
        number = operator.index(value)
    except TypeError:
        raise error(f"{name} is {shown(value)}, not a whole number; it must {allowed}") from None
    if number > sys.maxsize:
        allowed = f"be at most {high}"
    if not low <= number <= high:
        raise error(f"{name} is {shown(number)}; it must {allowed}")
    return number


def number(
    name: str,
    value: Any,
    low: float,
    high: float = float("inf"),
    *,
    with_low: bool = True,
    with_high: bool = False,
    error: Error = ConfigError,
) -> float:
    """Checks a finite number in an interval, by default the half-open one ``[low, high)``.

    Args:
        name: name of the argument in the message.
        value: a number of Python or NumPy; not a ``bool``.
        low: lower end of the interval.
        high: upper end of the interval.
        with_low: whether ``low`` itself is allowed.
        with_high: whether ``high`` itself is allowed.
        error: class of exception to raise.

    Raises:
        DycokeError: of class ``error``.
    """
    if high == float("inf"):
        allowed = f"be {low} or more" if with_low else f"be above {low}"
    else:
        allowed = f"lie in {'[' if with_low else '('}{low}, {high}{']' if with_high else ')'}"
    if isinstance(value, bool) or not isinstance(value, Real):
        raise error(f"{name} is {shown(value)}, not a number; it must {allowed}")
    try:
        # By way of its digits, a float32 of 0.3 is 0.3 and not 0.30000001192092896.
        plain = float(str(value)) if isinstance(value, np.floating) else float(value)
    except OverflowError:
        plain = float("inf")
    above = plain >= low if with_low else plain > low
    below = plain <= high if with_high else plain < high
    if not (above and below):  # NaN is neither
        given = value if abs(plain) < 1e9 else plain  # an integer may have thousands of digits
        raise error(f"{name} is {given}; it must {allowed}")
    return plain


def choice(
    name: str, value: Any, choices: Sequence[Choice], *, error: Error = ConfigError
) -> Choice:
    """Checks that a text is one of several.

    Raises:
        DycokeError: of class ``error``.
    """
    for allowed in choices:
        if isinstance(value, str) and value == allowed:
            return allowed
    listed = f"{', '.join(choices[:-1])} or {choices[-1]}"
    raise error(f"{name} is {shown(value)}; it must be {listed}")


def flag(name: str, value: Any, *, error: Error = ConfigError) -> bool:
    """Checks that a value is True or False, of Python or NumPy.

    Raises:
        DycokeError: of class ``error``.
    """
    if not isinstance(value, bool | np.bool_):
        raise error(f"{name} is {shown(value)}; it must be True or False")
    return bool(value)


def text(name: str, value: Any, *, error: Error = ConfigError) -> str:
    """Checks that a value is a text (``str``).

    Raises:
        DycokeError: of class ``error``.
    """
    if not isinstance(value, str):
        raise error(f"{name} is {shown(value)}; it must be a text")
    return value


def sequence(name: str, value: Any, must: str, *, error: Error = ConfigError) -> Sequence[Any]:
    """Checks that a value is a list, a tuple or another sequence, but not a text or bytes.

    Args:
        name: name of the argument in the message.
        value: the value. An array with one axis is returned as a list.
        must: what the message says that the value must be.
        error: class of exception to raise.

    Raises:
        DycokeError: of class ``error``.
    """
    if isinstance(value, np.ndarray) and value.ndim == 1:
        return value.tolist()
    if not isinstance(value, Sequence) or isinstance(value, str | bytes | bytearray | memoryview):
        raise error(f"{name} is {shown(value)}; {must}")
    return value


def instance(name: str, value: Any, kind: type[T], *, error: Error = ConfigError) -> T:
    """Checks that a value is an instance of a class.

    Raises:
        DycokeError: of class ``error``.
    """
    if not isinstance(value, kind):
        raise error(f"{name} is {shown(value)}; it must be a {kind.__name__}")
    return value


def path(name: str, value: Any, *, error: Error = ConfigError) -> str | PathLike[str]:
    """Checks that a value is a path: a text or an ``os.PathLike``.

    Raises:
        DycokeError: of class ``error``.
    """
    if not isinstance(value, str | PathLike):
        raise error(f"{name} is {shown(value)}; it must be a path, as a text or pathlib.Path")
    return value


def function(
    name: str, value: Callable[..., Any] | None, *, error: Error = ConfigError
) -> Callable[..., Any] | None:
    """Checks that a value can be called, or is None.

    Raises:
        DycokeError: of class ``error``.
    """
    if value is not None and not callable(value):
        raise error(f"{name} is {shown(value)}; it must be a function or None")
    return value


def shown(value: object) -> str:
    """Returns one short line that shows a value in a message, however large the value is."""
    if isinstance(value, Mapping | Sequence | PathLike | int | float | None):
        with suppress(ValueError):  # an integer of more digits than Python writes
            return " ".join(reprlib.repr(value).split())
    # The representation of an array or of an unknown object may be long, or take long to make.
    return f"of type {type(value).__name__}"
