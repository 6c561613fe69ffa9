"""Devices of TPU slices and GPU machines that are not there, to compile for."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from math import prod

import jax
from jax._src.cudnn import fused_attention_stablehlo
from jax.experimental import topologies

from dycoke_jax.checks import shown
from dycoke_jax.errors import ConfigError
from dycoke_jax.targets.chips import CHIPS, Chip

_GPUS_OF_A_MACHINE = 8
_FORM = "write a chip and its number or shape, as in v6e:2x4, v5p:2x2x2 or h100:8"


@dataclass(frozen=True)
class Target:
    """What is compiled for.

    Attributes:
        name: as ``parse_target`` read it.
        chip: the device.
        shape: chips along each axis of a TPU slice; the number of GPUs.
    """

    name: str
    chip: Chip
    shape: tuple[int, ...]


def parse_target(text: str) -> Target:
    """Reads a target: ``v6e:2x4``, ``v5p:2x2x2``, ``h100:8``, ``a100:1``.

    Raises:
        ConfigError: if there is no such chip, or the text has another form.
    """
    name, _, sizes = text.strip().lower().partition(":")
    if name not in CHIPS:
        raise ConfigError(f"no chip {shown(name)}; there are {', '.join(CHIPS)}; {_FORM}")
    if not re.fullmatch(r"[1-9][0-9]*(x[1-9][0-9]*)*", sizes):
        raise ConfigError(f"target {shown(text)}: {_FORM}")
    chip, shape = CHIPS[name], tuple(int(size) for size in sizes.split("x"))
    if chip.gpu is not None and len(shape) > 1:
        raise ConfigError(f"target {shown(text)}: of GPUs give the number, as in {name}:8")
    if chip.gpu is not None and shape[0] > _GPUS_OF_A_MACHINE and shape[0] % _GPUS_OF_A_MACHINE:
        raise ConfigError(
            f"target {shown(text)}: machines have {_GPUS_OF_A_MACHINE} GPUs; give a multiple of it"
        )
    return Target(f"{name}:{sizes}", chip, shape)


def devices_of(target: Target) -> list[jax.Device]:
    """The devices of a target; nothing can be run on them.

    Raises:
        ConfigError: if the compiler is not installed, or does not know the target.
    """
    needs = ("libtpu",) if target.chip.gpu is None else ("jax_cuda12_plugin", "jax_cuda13_plugin")
    if not any(find_spec(name) for name in needs):
        extra = "tpu" if target.chip.gpu is None else "compile-cuda12"
        raise ConfigError(
            f"compiling for {target.name} needs its compiler, which is not installed: "
            f"pip install 'dycoke_jax[{extra}]'"
        )
    try:
        if target.chip.gpu is None:
            name = f"{target.chip.name}:{'x'.join(map(str, target.shape))}"
            cores = {} if target.chip.cores is None else {"chip_config_name": target.chip.cores}
            topology = topologies.get_topology_desc(platform="tpu", topology_name=name, **cores)
        else:
            machines = max(1, target.shape[0] // _GPUS_OF_A_MACHINE)
            topology = topologies.get_topology_desc(
                platform="cuda",
                topology=f"1x{machines}x{prod(target.shape) // machines}",
                target_config=target.chip.gpu,
            )
    except (jax.errors.JaxRuntimeError, RuntimeError, ValueError, NotImplementedError) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(f"the compiler has no target {target.name}: {reason}") from None
    return list(topology.devices)


@contextmanager
def as_if_cudnn_were_there() -> Iterator[None]:
    """Lets jax write calls of cuDNN's attention, as on a machine with a GPU.

    jax asks cuDNN for its version when it traces such a call, and keeps what it traced: everything
    that traces belongs inside. XLA's compiler does not need cuDNN.
    """
    check = fused_attention_stablehlo.check_cudnn_version
    fused_attention_stablehlo.check_cudnn_version = lambda: 91000
    try:
        yield
    finally:
        fused_attention_stablehlo.check_cudnn_version = check
