"""Everything that is wrong with a checkpoint, gathered and told at once."""

import warnings
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from dycoke_jax.errors import CheckpointError

Kind = Literal[
    "file", "index", "unknown", "duplicate", "wrong dtype", "wrong shape", "tied head", "missing"
]


class CheckpointWarning(UserWarning):
    """A checkpoint that can be used but looks wrong, such as weights that are NaN."""


class Report:
    """Collects problems; ``raise_if_any`` tells all of them in one error, a line each."""

    def __init__(self) -> None:
        self._problems: list[tuple[Kind, str]] = []

    def add(self, kind: Kind, text: str) -> None:
        """Notes one problem; ``text`` is one line that names the tensor or file."""
        self._problems.append((kind, " ".join(text.split())))

    def raise_if_any(self, folder: Path) -> None:
        """Raises the collected problems as one ``CheckpointError``; nothing when there are none."""
        if not self._problems:
            return
        counts = Counter(kind for kind, _ in self._problems)
        summary = ", ".join(f"{count} {kind}" for kind, count in counts.items())
        total = len(self._problems)
        lines = [f"{folder}: {total} problem{'s' if total > 1 else ''} with the weights: {summary}"]
        lines += [f"  {kind}: {text}" for kind, text in self._problems]
        raise CheckpointError("\n".join(lines))


def warn_non_finite(folder: Path, paths: Sequence[str]) -> None:
    """One ``CheckpointWarning`` that names every tensor holding NaN or infinity, if any does."""
    if paths:
        warnings.warn(
            f"{folder}: NaN or infinity in {len(paths)} tensor{'s' if len(paths) > 1 else ''}: "
            + ", ".join(paths),
            CheckpointWarning,
            stacklevel=3,
        )
