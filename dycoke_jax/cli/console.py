"""What a person at the terminal sees beside the answers: lines and bars, on stderr."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import rich.progress
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn

from dycoke_jax.progress import BYTES, Progress

_MEBI = 1 << 20


def say(text: str, style: str | None = None) -> None:
    """Writes a line for the person at the terminal, as it is and unbroken."""
    Console(stderr=True).print(text, style=style, markup=False, highlight=False, soft_wrap=True)


@contextmanager
def progress_bars() -> Iterator[Progress]:
    """Progress bars, a bar for each kind of work; gone after the block, hidden without terminal."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    console = Console(stderr=True)
    hidden = not console.is_terminal
    with rich.progress.Progress(*columns, console=console, transient=True, disable=hidden) as bars:
        yield _shown(bars)


def _shown(bars: rich.progress.Progress) -> Progress:
    tasks: dict[str, Any] = {}

    def show(what: str, done: int, total: int) -> None:
        kind = what.split(":")[0]
        if kind.endswith(BYTES):
            what = f"{kind.removesuffix(BYTES)} (MiB)"
            done, total = -(-done // _MEBI), -(-total // _MEBI)
        if kind not in tasks:
            tasks[kind] = bars.add_task(what, total=total)
        bars.update(tasks[kind], completed=done, total=total, description=what)

    return show
