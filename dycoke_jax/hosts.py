"""Several processes that answer together: one on each host of a TPU slice or of a GPU cluster.

Every process runs the same program on the same requests (SPMD), over one mesh of the devices of
all. The rows of a batch that lie on its own devices are of the requests whose clips it has read;
everything else that programs are given, and all that they return, is known to every process.
"""

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, TypeVar

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from dycoke_jax import checks
from dycoke_jax.errors import ConfigError, HostError, printable
from dycoke_jax.sharding import DATA

Tree = TypeVar("Tree")

_WEEK = 7 * 24 * 3600 * 1000
"""Milliseconds. How long to wait for what another process has to say while that process lives."""


@dataclass(frozen=True)
class Hosts:
    """How the processes of a run find each other.

    On a Cloud TPU slice, in GKE (XPK, JobSet), under SLURM and under Open MPI, ``distributed`` is
    enough. Elsewhere ``coordinator``, ``processes`` and ``process_id`` are given.

    Attributes:
        distributed: run together with the processes on other hosts, which are found by what the
            TPU slice, Kubernetes, SLURM or Open MPI says about them.
        coordinator: address of the first process, ``host:port``, at which the others find it.
        processes: number of processes.
        process_id: number of this process, from 0.
        process_timeout: seconds after which all processes end if one of them does not respond or
            has ended before the others.

    Raises:
        ConfigError: naming the setting and its range.
    """

    distributed: bool = False
    coordinator: str | None = None
    processes: int | None = None
    process_id: int | None = None
    process_timeout: int = 60

    def __post_init__(self) -> None:
        """Checks that the settings go together."""
        checks.whole_number("process_timeout", self.process_timeout, 2)
        given = (self.coordinator, self.processes, self.process_id)
        if given == (None, None, None):
            return
        if self.coordinator is None or self.processes is None or self.process_id is None:
            raise ConfigError("coordinator, processes and process_id go together: give all three")
        if not self.coordinator.rpartition(":")[2].isdigit():
            raise ConfigError(f"coordinator is {self.coordinator!r}; it must be host:port")
        checks.whole_number("processes", self.processes, 1)
        checks.whole_number("process_id", self.process_id, 0, self.processes - 1)

    @property
    def several(self) -> bool:
        """Whether to run with other processes."""
        return self.distributed or self.coordinator is not None


def initialise(hosts: Hosts) -> None:
    """Connects the processes of a run; afterwards ``jax.devices()`` are those of all of them.

    It must come before anything that uses a device. A process that has been connected ends itself
    in bounded time (``process_timeout``) when another one dies or leaves early, whatever it is
    waiting for at that time.

    Args:
        hosts: how they find each other; if it asks for no other processes, nothing is done.

    Raises:
        ConfigError: if nothing says which processes there are, or a device has been used.
    """
    if not hosts.several:
        return
    try:
        jax.distributed.initialize(
            hosts.coordinator,
            hosts.processes,
            hosts.process_id,
            heartbeat_timeout_seconds=hosts.process_timeout,
            shutdown_timeout_seconds=hosts.process_timeout,
        )
    except ValueError as error:
        raise ConfigError(
            "nothing here says which processes run together; give --coordinator, --processes and "
            "--process-id (or coordinator, processes and process_id)"
        ) from error
    except RuntimeError as error:
        raise ConfigError(f"cannot connect the processes: {_line(error)}") from error


@dataclass(frozen=True)
class Processes:
    """The processes whose devices a mesh has, in the order of its rows.

    Attributes:
        count: number of processes.
        index: number of this process, from 0.
    """

    count: int = 1
    index: int = 0

    def reader(self, request: int) -> int:
        """The process that reads the clip of a request of a stream; all know which one it is."""
        return request % self.count


ALONE = Processes()


@lru_cache
def processes_of(mesh: Mesh | None) -> Processes:
    """The processes of a mesh; without a mesh this one alone.

    Raises:
        ConfigError: if the mesh does not give each process rows of its own.
    """
    if mesh is None:
        return ALONE
    owners = [{device.process_index for device in row} for row in mesh.devices]
    together = set[int]().union(*owners)
    own = jax.process_index()
    if together == {own}:
        return ALONE
    count, size = len(together), mesh.shape[DATA]
    if count != jax.process_count():
        raise ConfigError(
            f"the mesh has devices of {count} of {jax.process_count()} processes; it must have "
            "devices of all of them, or of one"
        )
    if size % count:
        own_devices = mesh.devices.size // count
        raise ConfigError(
            f"a mesh with data={size} cannot be divided among {count} processes, of which each "
            f"reads the clips of its own rows; data must be a multiple of {count}, and model at "
            f"most the {own_devices} devices of a process (a larger model: fsdp)"
        )
    order = [min(row) for row in owners[:: size // count]]
    if owners != [{process} for process in order for _ in range(size // count)]:
        raise ConfigError(
            "the mesh mixes the devices of processes; rows of devices along data must belong to "
            "one process each and those of a process follow each other, as in a mesh that is made "
            "from sizes such as 'data=4,model=2'"
        )
    return Processes(count, order.index(own))


def is_first() -> bool:
    """Whether this is the process that writes the results; true where there is only one."""
    return jax.process_index() == 0


def replicate(tree: Tree, mesh: Mesh | None) -> Tree:
    """Brings what every process has to the devices of all; nothing is done without others."""
    if processes_of(mesh).count == 1:
        return tree
    assert mesh is not None
    places = NamedSharding(mesh, P())

    def place(x: jax.Array) -> jax.Array:
        return jax.make_array_from_process_local_data(places, np.asarray(x))

    return jax.tree.map(place, tree)


def fetch(tree: Tree, mesh: Mesh | None) -> Tree:
    """Copies arrays from the devices to every process, also what lies on devices of others."""
    if processes_of(mesh).count > 1:
        assert mesh is not None
        tree = _on_all(mesh)(tree)
    return jax.device_get(tree)


@lru_cache
def _on_all(mesh: Mesh) -> Any:
    return jax.jit(lambda tree: tree, out_shardings=NamedSharding(mesh, P()))


_rounds = itertools.count()


def share(own: bytes) -> list[bytes]:
    """Gives some data to all processes, and waits for that of the others.

    It goes through JAX's coordination service, over the network of the hosts. A collective of the
    devices is no place to wait for a host that reads a long clip: it has time limits, and takes
    arrays of one size.

    Args:
        own: data of this process, at most some megabytes.

    Returns:
        The data of each process, by its number in JAX.

    Raises:
        HostError: if another process has ended.
    """
    from orbax.checkpoint import multihost

    client = multihost.get_jax_distributed_client()
    number, me = next(_rounds), jax.process_index()

    def key(round_number: int, process: int) -> str:
        return f"dycoke_jax/{round_number}/{process}"

    with failures_of_others():
        client.key_value_set_bytes(key(number, me), own)
        found = [
            client.blocking_key_value_get_bytes(key(number, process), _WEEK)
            for process in range(jax.process_count())
        ]
        if number:
            # All have come to this round, so none reads the one before any more.
            client.key_value_delete(key(number - 1, me))
    return found


@contextmanager
def failures_of_others() -> Iterator[None]:
    """Says of an error of JAX's run time, where there are several processes, what it may be.

    Raises:
        HostError: in its place.
    """
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if jax.process_count() == 1:
            raise
        raise HostError(
            f"process {jax.process_index()} of {jax.process_count()} cannot go on; if another one "
            f"has ended, its output says why: {_line(error)}"
        ) from error


def _line(error: Exception) -> str:
    return printable(" ".join(str(error).split()))[:300]
