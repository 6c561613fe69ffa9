"""What the machine can do at best, measured: its matrix rate and its memory bandwidth."""

import os
import platform
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from dycoke_jax.bench.costs import Cost
from dycoke_jax.bench.measure import Run, Watch
from dycoke_jax.ops.matmul import matmul


@dataclass(frozen=True)
class Sizes:
    """Sizes of what is measured; the defaults are for a CPU.

    Attributes:
        side: rows and columns of the matrices that are multiplied.
        rows: rows of the float32 array that is read, 32 KiB each; together far more than the caches
            of the processor hold.
    """

    side: int = 2048
    rows: int = 1 << 13


_WIDTH = 8192
ACCELERATOR = Sizes(8192, 1 << 16)
"""Large enough that starting the program takes no visible part of the time."""


@dataclass(frozen=True)
class Rates:
    """What was measured of the machine.

    Attributes:
        flops: floating-point operations a second of a large matrix product.
        bytes: bytes a second that are read from memory.
    """

    flops: float
    bytes: float


@dataclass(frozen=True)
class Limit:
    """The least time that a stage can take on a machine.

    Attributes:
        seconds: the time.
        bound: what takes it: ``matrix rate`` or ``bandwidth``.
    """

    seconds: float
    bound: str


def limit(cost: Cost, rates: Rates) -> Limit:
    """The least time for a stage, if operations and transfers overlap fully."""
    computing, moving = cost.flops / rates.flops, cost.bytes / rates.bytes
    if computing > moving:
        return Limit(computing, "matrix rate")
    return Limit(moving, "bandwidth")


def sizes_for(device: jax.Device) -> Sizes:
    """Sizes that fit a kind of device."""
    return Sizes() if device.platform == "cpu" else ACCELERATOR


def machine_run(dtype: str, sizes: Sizes) -> Run:
    """A case with the stages ``matrix rate`` and ``bandwidth``; its times give ``rates``.

    The product is computed by the function that multiplies by the model's weights, in its dtype and
    precision. The array is read by sums over its rows, whose results take next to no memory.

    Args:
        dtype: name of the dtype of the computation.
        sizes: how large both are.
    """
    product, read = jax.jit(matmul), jax.jit(lambda x: x.sum(1))

    def run(watch: Watch) -> None:
        # Made in each run, so that they take no memory while the model is measured.
        matrix = jnp.full((sizes.side, sizes.side), 0.5, dtype)
        array = jnp.ones((sizes.rows, _WIDTH), jnp.float32)
        jax.block_until_ready((matrix, array))
        with watch.time("matrix rate"):
            product(matrix, matrix).block_until_ready()
        with watch.time("bandwidth"):
            read(array).block_until_ready()

    return run


def cost_of_run(sizes: Sizes) -> Cost:
    """The operations of the stage ``matrix rate``, and the bytes of the stage ``bandwidth``."""
    return Cost(2 * sizes.side**3, sizes.rows * _WIDTH * 4)


def cores() -> int:
    """Number of CPU cores that this process may use."""
    # Both are read by XLA: the variable first.
    given = os.environ.get("NPROC", "")
    if given.isdecimal() and int(given):
        return int(given)
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def described(dtype: str) -> dict[str, str | int]:
    """Where and with what something was measured, as values for JSON."""
    device = jax.devices()[0]
    return {
        "device": device.device_kind,
        "platform": device.platform,
        "processor": _processor(),
        "cores": cores(),
        "dtype": dtype,
        "jax": jax.__version__,
    }


def _processor() -> str:
    """The name of the CPU, where the system tells it."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            names = [line.partition(":")[2].strip() for line in file if "model name" in line]
    except OSError:
        names = []
    return names[0] if names else platform.machine()
