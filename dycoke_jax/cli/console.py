"""What a person at the terminal sees beside the answers: lines and bars, on stderr."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn


def say(text: str, style: str | None = None) -> None:
    """Writes a line for the person at the terminal, as it is and unbroken."""
    Console(stderr=True).print(text, style=style, markup=False, highlight=False, soft_wrap=True)


@contextmanager
def bars() -> Iterator[Progress]:
    """Progress bars, gone after the block; hidden where nobody watches."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    console = Console(stderr=True)
    hidden = not console.is_terminal
    with Progress(*columns, console=console, transient=True, disable=hidden) as progress:
        yield progress


def counts(bars: Progress) -> Callable[[str, int, int], None]:
    """A bar for each thing that is done."""
    tasks: dict[str, Any] = {}

    def show(what: str, done: int, total: int) -> None:
        if what not in tasks:
            tasks[what] = bars.add_task(what, total=total)
        bars.update(tasks[what], completed=done, total=total)

    return show


def training_steps(bars: Progress) -> Callable[[int, int, str], None]:
    """A bar that says how training goes."""
    task = bars.add_task("compiling", total=None)
    return lambda done, total, line: bars.update(
        task, completed=done, total=total, description=line
    )


def byte_counts(bars: Progress, what: str) -> Callable[[int, int, str], None]:
    """A bar of bytes, told of them with a tensor's name."""
    show = counts(bars)
    mega = 1 << 20
    return lambda done, total, _: show(f"{what} (MiB)", -(-done // mega), -(-total // mega))
