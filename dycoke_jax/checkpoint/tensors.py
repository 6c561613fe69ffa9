"""What is known of a stored tensor before it is read, and what is done to it after."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from math import prod

import ml_dtypes
import numpy as np
from jax.typing import DTypeLike

from dycoke_jax.checkpoint.report import Report
from dycoke_jax.errors import CheckpointError

DTYPES = {
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
"""Weights may be stored in these; the keys are the names that safetensors headers use."""


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
    """The checked contents of a checkpoint; no data is held, ``stream`` reads it.

    Attributes:
        params: what the model uses: exactly the tree of its configuration.
        carried: what the model does not use and the llava-hf layout has.
        stream: reads the tensors of the given paths in the given order, one (or a small group) in
            memory at a time. The arrays are the receiver's own.
    """

    params: Mapping[str, TensorInfo]
    carried: Mapping[str, TensorInfo]
    stream: Callable[[Iterable[str]], Iterator[tuple[str, np.ndarray]]]


def weight_dtype(dtype: DTypeLike | None) -> np.dtype | None:
    """The numpy dtype asked for; None stands for "as stored".

    Raises:
        CheckpointError: when it is not float32, float16 or bfloat16.
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


def cast(array: np.ndarray, dtype: np.dtype | None) -> np.ndarray:
    """The array in ``dtype``, rounded to nearest even; itself when nothing is to be done."""
    # A value too large for float16 becomes infinity, which is reported by name afterwards.
    with np.errstate(over="ignore", invalid="ignore"):
        return array if dtype is None else array.astype(dtype, copy=False)


_EXPONENT: dict[np.dtype, np.unsignedinteger] = {
    DTYPES["F32"]: np.uint32(0x7F800000),
    DTYPES["F16"]: np.uint16(0x7C00),
    DTYPES["BF16"]: np.uint16(0x7F80),
}
_CHUNK = 2**20


def is_finite(array: np.ndarray) -> bool:
    """Whether no element is NaN or infinite."""
    # Such an element has every bit of its exponent set. Looking at the bits in pieces that stay in
    # the processor's cache is ten times as fast for 16-bit floats as np.isfinite, and needs no
    # temporary array of the tensor's size.
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
    """Reports the parameters that are absent or of another shape than the configuration says.

    Args:
        found: the parameters of the checkpoint.
        expected: the shape of every parameter of the configuration.
        lost: paths already reported in another way (in a file that cannot be read).
        report: takes the problems.
    """
    told = found.keys() | set(lost)
    for path, shape in expected.items():
        if path not in told:
            report.add("missing", f"{path} (expected float {list(shape)})")
    for path, info in found.items():
        if path in expected and info.shape != expected[path]:
            report.add("wrong shape", f"{path} is {list(info.shape)}, not {list(expected[path])}")
