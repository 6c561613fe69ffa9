"""Messages and progress bars for the user, on stderr."""

import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import rich.progress
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn

from dycoke_jax.cli.streams import discard
from dycoke_jax.progress import BYTES, Progress

_MEBI = 1 << 20


class _Messages(Console):
    def on_broken_pipe(self) -> None:
        """Goes on without messages, where rich would end the process and discard stdout."""
        discard(sys.stderr)


def say(text: str, style: str | None = None) -> None:
    """Prints a line to stderr, without markup and without wrapping.

    A line that cannot be written, because the disk is full or the pipe is closed, is dropped: an
    answer on stdout is worth more than the remarks on it.

    Args:
        text: the line.
        style: a rich style, such as a colour; None for plain text.
    """
    try:
        _Messages(stderr=True).print(
            text, style=style, markup=False, highlight=False, soft_wrap=True
        )
    except OSError:
        discard(sys.stderr)


def say_notes(notes: Iterable[str]) -> None:
    """Prints each remark on a clip or a checkpoint as a line of its own."""
    for note in notes:
        say(f"note: {note}", style="yellow")


@contextmanager
def progress_bars() -> Iterator[Progress]:
    """Shows progress bars while the block runs, one for each kind of work.

    The bars are removed at the end of the block. If stderr is not a terminal, none are drawn.

    Yields:
        The callback that moves the bars.
    """
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    console = _Messages(stderr=True)
    hidden = not console.is_terminal
    with rich.progress.Progress(*columns, console=console, transient=True, disable=hidden) as bars:
        yield _callback(bars)


def _callback(bars: rich.progress.Progress) -> Progress:
    """A progress callback that adds a bar for each new kind of work and moves it."""
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
