"""What the compiler makes of a program: memory, operations, bytes, collectives and time."""

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import jax
from jax._src.lib import _jax

from dycoke_jax.errors import ConfigError
from dycoke_jax.targets import hlo
from dycoke_jax.targets.chips import Chip
from dycoke_jax.targets.programs import Stage

Bound = Literal["matrix rate", "bandwidth", "interconnect"]

_CUDA = {"xla_gpu_enable_triton_gemm": False}
"""Without a device to measure on, XLA would write every product in Triton with one small tile, and
it fails at narrow ones. Calls of cuBLAS take its place."""


class DoesNotFit(ConfigError):
    """A program that needs more memory than the device has, by the compiler."""


@dataclass(frozen=True)
class Memory:
    """Bytes on a device while a program runs.

    Attributes:
        weights: weights of the whole model, those included that the program does not read.
        cache: key/value caches, and what a compression keeps of them.
        others: other arguments, and results that do not take their place.
        temporaries: what the program needs besides.
        code: the program itself.
    """

    weights: int
    cache: int
    others: int
    temporaries: int
    code: int

    @property
    def total(self) -> int:
        """All of it."""
        return self.weights + self.cache + self.others + self.temporaries + self.code


@dataclass(frozen=True)
class Limit:
    """The least time that a program can take.

    Attributes:
        seconds: the time of its dearest resource, if all are used at the same time.
        bound: that resource.
    """

    seconds: float
    bound: Bound


@dataclass(frozen=True)
class Costs:
    """What a program does on a device: one run of it, or of decoding one step.

    Attributes:
        flops: floating-point operations by the compiler; None where it does not count them.
        compiler_bytes: bytes by the compiler.
        traffic: bytes and collectives that are counted from its instructions, see ``hlo``.
    """

    flops: float | None
    compiler_bytes: float | None
    traffic: hlo.Traffic

    def limit(self, chip: Chip, least: float) -> Limit:
        """The least time of a run.

        Args:
            chip: the device.
            least: operations of the run's matrix products, from its shapes. They are taken where
                the compiler counts fewer, as it does not look into kernels.
        """
        flops = max(least, self.flops or 0.0)
        sent = sum(collective.sent for collective in self.traffic.collectives)
        seconds: dict[Bound, float] = {
            "matrix rate": flops / chip.flops,
            "bandwidth": self.traffic.bytes / chip.bandwidth,
            "interconnect": sent / chip.links,
        }
        bound = max(seconds, key=lambda name: seconds[name])
        return Limit(seconds[bound], bound)


@dataclass(frozen=True)
class Compiled:
    """A compiled program.

    Attributes:
        seconds: time of the compiler.
        memory: bytes on a device.
        costs: what a run does.
        aliased: bytes of arguments that results take the place of.
    """

    seconds: float
    memory: Memory
    costs: Costs
    aliased: int


def size_on_device(tree: Any) -> int:
    """Bytes that arrays take on a device, from their shapes and shardings."""

    def of_leaf(leaf: jax.ShapeDtypeStruct) -> int:
        shape = leaf.shape if leaf.sharding is None else leaf.sharding.shard_shape(leaf.shape)
        return math.prod(shape) * leaf.dtype.itemsize

    return sum(map(of_leaf, jax.tree.leaves(tree)))


def caches_of(stage: Stage) -> list[Any]:
    """The key/value caches that decoding is given, with what a compression keeps of them."""
    if stage.name != "decode":
        return []
    return jax.tree.leaves([(view.caches, view.memory) for view in stage.arguments[1].views])


def compile_stage(stage: Stage, chip: Chip) -> Compiled:
    """Compiles a program for the devices that its arguments lie on.

    Raises:
        DoesNotFit: if the compiler finds that it needs more memory than a device has.
    """
    options: dict[str, Any] = {} if chip.gpu is None else _CUDA
    started = time.perf_counter()
    try:
        compiled = stage.function.lower(*stage.arguments, **stage.static).compile(options)
    except jax.errors.JaxRuntimeError as error:
        reason = " ".join(str(error).split())
        if "RESOURCE_EXHAUSTED" not in reason:
            raise
        raise DoesNotFit(f"{stage.name} does not fit: {reason}") from None
    seconds = time.perf_counter() - started
    program = hlo.parse(compiled.as_text() or "")
    name = hlo.loop(program) if stage.name == "decode" else None
    whole = compiled.cost_analysis()
    if whole is None:
        # The compiler for GPUs has no such count of its own; this is XLA's general one.
        client = jax.devices("cpu")[0].client
        executable: Any = compiled.runtime_executable()
        whole = _jax.hlo_module_cost_analysis(client, executable.hlo_modules()[0])
    costs = Costs(whole.get("flops"), whole.get("bytes accessed"), hlo.traffic(program, name))
    memory = _memory(stage, compiled.memory_analysis())
    return Compiled(seconds, memory, costs, program.aliased_bytes)


def _memory(stage: Stage, of_program: Any) -> Memory:
    model = stage.arguments[0]
    cache = size_on_device(caches_of(stage))
    read = size_on_device(_read_by(stage, model.params))
    given = of_program.argument_size_in_bytes + of_program.output_size_in_bytes
    return Memory(
        weights=size_on_device(model.params),
        cache=cache,
        others=max(0, given - of_program.alias_size_in_bytes - read - cache),
        temporaries=of_program.temp_size_in_bytes,
        code=of_program.generated_code_size_in_bytes,
    )


def _read_by(stage: Stage, params: Any) -> Sequence[Any]:
    """The weights that a program reads; the others are no arguments of what is compiled."""
    tower, of_vision = ("vision_tower.", "projector."), stage.name == "vision"
    return [leaf for path, leaf in params.items() if path.startswith(tower) == of_vision]
