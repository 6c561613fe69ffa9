"""Shapes and dtypes of stored tensors, casting them, and checking them."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from math import prod
from typing import get_args

import ml_dtypes
import numpy as np
from jax.typing import DTypeLike

from dycoke_jax.checkpoint.report import Report
from dycoke_jax.checks import shown
from dycoke_jax.config import Storage
from dycoke_jax.errors import CheckpointError
from dycoke_jax.models.quantisation import can_be_int8, matrix_path, quantised

INT8 = np.dtype(np.int8)

DTYPES = {
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
"""The dtypes that weights may have, by their names in safetensors headers."""


@dataclass(frozen=True)
class TensorInfo:
    """Shape and dtype of a tensor in a file."""

    shape: tuple[int, ...]
    dtype: np.dtype

    @property
    def nbytes(self) -> int:
        """Size of the data in bytes."""
        return prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class Weights:
    """The checked tensors of a checkpoint, without their data.

    Attributes:
        params: shape and dtype of the model's parameters, by path; exactly those of the
            configuration, and the scales of those that are int8.
        carried: shape and dtype of stored tensors that the model does not run but the llava-hf
            layout has, by path (see ``names.is_carried``).
        stream: yields path and data of the tensors at the given paths, in the given order, with
            one tensor or one small group in memory at a time. The caller may modify the arrays.
        part: reads the part of a tensor, by its path, that slices of its axes say; None where
            tensors can only be streamed.
    """

    params: Mapping[str, TensorInfo]
    carried: Mapping[str, TensorInfo]
    stream: Callable[[Iterable[str]], Iterator[tuple[str, np.ndarray]]]
    part: Callable[[str, tuple[slice, ...]], np.ndarray] | None = None


def weight_dtype(dtype: DTypeLike | None) -> np.dtype | None:
    """Returns the numpy dtype of a requested weight dtype; None, for "as stored", stays None.

    Raises:
        CheckpointError: if it is not float32, float16 or bfloat16.
    """
    if dtype is None:
        return None
    name = str(dtype)
    try:
        wanted = np.dtype(dtype)
        if wanted in DTYPES.values():
            return wanted
        name = wanted.name
    except (TypeError, ValueError, SyntaxError):
        pass  # not the name of any dtype
    raise CheckpointError(f"weights cannot be {name}; dtype must be float32, float16 or bfloat16")


def check_storage(name: str, value: Storage | None) -> None:
    """Checks how something is to be stored; None leaves it as it is.

    Raises:
        CheckpointError: if it is neither int8 nor None.
    """
    if value is not None and not (isinstance(value, str) and value in get_args(Storage)):
        raise CheckpointError(f"{name} is {shown(value)}; it must be int8 or None")


def cast(array: np.ndarray, dtype: np.dtype | None) -> np.ndarray:
    """Casts an array, rounding to nearest even.

    The array itself is returned if ``dtype`` is None or already its dtype.
    """
    # A value too large for float16 becomes infinity; the callers warn of such tensors by name.
    with np.errstate(over="ignore", invalid="ignore"):
        return array if dtype is None else array.astype(dtype, copy=False)


def target_dtype(path: str, stored: np.dtype, dtype: np.dtype | None) -> np.dtype:
    """The dtype that a stored tensor gets where ``dtype`` is asked for.

    Matrices that are stored as int8, and the scales of such, stay what they are.
    """
    fixed = stored == INT8 or path != matrix_path(path)
    return stored if fixed or dtype is None else dtype


def prepare(
    path: str, array: np.ndarray, dtype: np.dtype | None, weights: Storage | None
) -> Iterator[tuple[str, np.ndarray]]:
    """Yields a tensor as it is to be stored: cast, or quantised and followed by its scales.

    Args:
        path: path of the tensor.
        array: the tensor as it was stored.
        dtype: float dtype to cast it to; None: that of ``array``.
        weights: ``int8`` to quantise it if it is a matrix of the language model.
    """
    if weights == "int8" and can_be_int8(path):
        # Quantised as stored: casting first would round twice.
        yield from quantised([(path, array)])
    else:
        yield path, cast(array, target_dtype(path, array.dtype, dtype))


_EXPONENT: dict[np.dtype, np.unsignedinteger] = {
    DTYPES["F32"]: np.uint32(0x7F800000),
    DTYPES["F16"]: np.uint16(0x7C00),
    DTYPES["BF16"]: np.uint16(0x7F80),
}
_CHUNK = 2**20


def is_finite(array: np.ndarray) -> bool:
    """Whether no element is NaN or infinite."""
    # NaN and infinity have every exponent bit set. Testing the bits in chunks that fit into the
    # processor's cache is ten times as fast as np.isfinite for 16-bit floats, and needs no
    # temporary array of the tensor's size.
    if array.dtype == INT8:
        return True
    mask = _EXPONENT[array.dtype]
    bits = np.ascontiguousarray(array).reshape(-1).view(mask.dtype)
    return not any(
        (bits[start : start + _CHUNK] & mask).max() == mask for start in range(0, bits.size, _CHUNK)
    )


def check_tree(
    found: Mapping[str, TensorInfo],
    expected: Mapping[str, tuple[int, ...]],
    lost: Iterable[str],
    report: Report,
) -> None:
    """Reports parameters that are missing or whose shape differs from the configuration's.

    Args:
        found: shape and dtype of the checkpoint's tensors, by path.
        expected: shape of each of the configuration's parameters, by path.
        lost: paths whose absence is already reported, such as those in a file that cannot be read.
        report: receives the problems.
    """
    accounted = found.keys() | set(lost)
    for path, shape in expected.items():
        if path not in accounted:
            report.add("missing", f"{path} (expected float {list(shape)})")
    for path, info in found.items():
        if path in expected and info.shape != expected[path]:
            report.add("wrong shape", f"{path} is {list(info.shape)}, not {list(expected[path])}")
