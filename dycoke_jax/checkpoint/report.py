"""Collects all problems of a checkpoint and reports them together."""

import warnings
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from dycoke_jax.errors import CheckpointError, printable

Kind = Literal[
    "file", "index", "unknown", "duplicate", "wrong dtype", "wrong shape", "tied head", "missing"
]


_MOST_LINES = 200
"""Problems that are listed; a file that is full of them would fill the terminal."""
_LONGEST_LINE = 1000  # characters


class CheckpointWarning(UserWarning):
    """Warns of a checkpoint that can be used but looks wrong, such as weights that are NaN."""


class Report:
    """Collects problems; ``raise_if_any`` raises all of them as one error, one line each."""

    def __init__(self) -> None:
        self._problems: list[tuple[Kind, str]] = []

    def add(self, kind: Kind, text: str) -> None:
        """Adds a problem.

        Args:
            kind: the kind of problem, which starts its line.
            text: a description that names the tensor or file. It is made one line: control codes
                in names are escaped, and endless names cut.
        """
        text = " ".join(text.split())
        if len(text) > _LONGEST_LINE:
            text = f"{text[:_LONGEST_LINE]}... ({len(text)} characters)"
        self._problems.append((kind, printable(text)))

    def raise_if_any(self, folder: Path) -> None:
        """Raises an error if any problem was added.

        Args:
            folder: the checkpoint's folder, named in the message.

        Raises:
            CheckpointError: with the number of problems by kind, and one line for each of the
                first 200.
        """
        if not self._problems:
            return
        counts = Counter(kind for kind, _ in self._problems)
        summary = ", ".join(f"{count} {kind}" for kind, count in counts.items())
        total = len(self._problems)
        lines = [f"{folder}: {total} problem{'s' if total > 1 else ''} with the weights: {summary}"]
        lines += [f"  {kind}: {text}" for kind, text in self._problems[:_MOST_LINES]]
        if total > _MOST_LINES:
            lines.append(f"  ... and {total - _MOST_LINES} more")
        raise CheckpointError("\n".join(lines))


def warn_non_finite(folder: Path, paths: Sequence[str]) -> None:
    """Issues one ``CheckpointWarning`` that names the tensors holding NaN or infinity, if any.

    Args:
        folder: the checkpoint's folder, named in the message.
        paths: paths of the tensors that hold NaN or infinity.
    """
    if paths:
        warnings.warn(
            f"{folder}: NaN or infinity in {len(paths)} tensor{'s' if len(paths) > 1 else ''}: "
            + ", ".join(paths),
            CheckpointWarning,
            stacklevel=3,
        )
