"""Compiled programs: kept on disk from one process to the next, and counted."""

import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import filelock
import jax

from dycoke_jax.errors import OutputError

MAX_BYTES = 2 << 30
"""Size to which a folder of programs grows by default: a program takes 0.01 to 10 MB."""

# By the name of the environment variable, a setting of jax and its value. Programs that take less
# than a second to compile are kept too: there are many of them, and they add up.
_SETTINGS: dict[str, tuple[str, Any]] = {
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": (
        "jax_persistent_cache_min_compile_time_secs",
        0.0,
    ),
    "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": ("jax_persistent_cache_min_entry_size_bytes", -1),
}


def use_compilation_cache(
    folder: str | os.PathLike[str] | None = None, max_bytes: int = MAX_BYTES
) -> Path:
    """Keeps compiled programs in a folder, so that later processes need not compile them again.

    It sets jax's persistent compilation cache for the whole process, and is meant to be called
    before the first program runs. The library itself never calls it; its command line does. A
    folder that jax has already, from the environment variable JAX_COMPILATION_CACHE_DIR or from
    ``jax.config``, stays, and so does every other setting whose variable is set.

    Several processes may use a folder at the same time: a lock file in it keeps them apart. Only
    its owner should be able to write to it, because what it holds is run.

    Args:
        folder: folder of the programs, which is made if it is missing; None: ``default_folder()``.
        max_bytes: size in bytes at which the programs that were not used for longest are removed.

    Returns:
        The folder that is in use.

    Raises:
        OutputError: if the folder cannot be written; nothing has been set then.
    """
    given = jax.config.jax_compilation_cache_dir  # type: ignore[attr-defined]
    path = Path(given or folder or default_folder()).expanduser().absolute()
    if not given:
        _make(path)
        jax.config.update("jax_compilation_cache_dir", str(path))
        if "JAX_COMPILATION_CACHE_MAX_SIZE" not in os.environ:
            # The limit also makes jax take a lock whenever it reads or writes.
            jax.config.update("jax_compilation_cache_max_size", max_bytes)
    for variable, (name, value) in _SETTINGS.items():
        if variable not in os.environ:
            jax.config.update(name, value)
    return Path(given) if given else path


def default_folder() -> Path:
    """The folder ``dycoke_jax`` in the place where the system's users keep caches."""
    if sys.platform == "win32":
        place = os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local"
    elif sys.platform == "darwin":
        place = Path.home() / "Library" / "Caches"
    else:
        place = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(place) / "dycoke_jax"


def _make(folder: Path) -> None:
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
        _remove_unfinished(folder)
    except (OSError, NotImplementedError) as error:  # the latter where files cannot be locked
        reason = getattr(error, "strerror", None) or error
        raise OutputError(f"cannot keep compiled programs in {folder}: {reason}") from error


def _remove_unfinished(folder: Path) -> None:
    """Removes programs that a process which was ended had begun to write.

    jax does not write them at one stroke, and looks for the time of use of each when it makes room.
    That time is written last.
    """
    try:
        with filelock.FileLock(folder / ".lockfile", timeout=1):  # the one that jax takes
            for program in folder.glob("*-cache"):
                if not program.with_name(f"{program.name.removesuffix('cache')}atime").exists():
                    program.unlink()
    except filelock.Timeout:
        pass  # another process is at work there


@dataclass
class Compilations:
    """How many programs XLA was asked for, and how it came by them.

    Attributes:
        programs: programs that this process did not have yet.
        found: those of them that were found in the compilation cache.
        seconds: time that compiling and reading them took.
    """

    programs: int = 0
    found: int = 0
    seconds: float = 0.0

    @property
    def compiled(self) -> int:
        """Number of programs that were compiled."""
        return self.programs - self.found


@contextmanager
def counted() -> Iterator[Compilations]:
    """Counts the programs that jax compiles, in whatever thread, while the block runs."""
    count = Compilations()

    def timed(event: str, duration_secs: float, **_: Any) -> None:
        if event == "/jax/core/compile/backend_compile_duration":  # found ones have it too
            count.programs += 1
            count.seconds += duration_secs

    def happened(event: str, **_: Any) -> None:
        if event == "/jax/compilation_cache/cache_hits":
            count.found += 1

    jax.monitoring.register_event_duration_secs_listener(timed)
    jax.monitoring.register_event_listener(happened)
    try:
        yield count
    finally:
        jax.monitoring.unregister_event_duration_listener(timed)
        jax.monitoring.unregister_event_listener(happened)
