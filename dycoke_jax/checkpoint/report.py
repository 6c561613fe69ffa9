"""Collects all problems of a checkpoint and reports them together."""

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
    """Warns of a checkpoint that can be used but looks wrong, such as weights that are NaN."""


class Report:
    """Collects problems; ``raise_if_any`` raises all of them as one error, one line each."""

    def __init__(self) -> None:
        self._problems: list[tuple[Kind, str]] = []

    def add(self, kind: Kind, text: str) -> None:
        """Adds a problem.

        Args:
            kind: the kind of problem, which starts its line.
            text: a description that names the tensor or file; line breaks become spaces.
        """
        self._problems.append((kind, " ".join(text.split())))

    def raise_if_any(self, folder: Path) -> None:
        """Raises an error if any problem was added.

        Args:
            folder: the checkpoint's folder, named in the message.

        Raises:
            CheckpointError: with the number of problems by kind, and one line for each problem.
        """
        if not self._problems:
            return
        counts = Counter(kind for kind, _ in self._problems)
        summary = ", ".join(f"{count} {kind}" for kind, count in counts.items())
        total = len(self._problems)
        lines = [f"{folder}: {total} problem{'s' if total > 1 else ''} with the weights: {summary}"]
        lines += [f"  {kind}: {text}" for kind, text in self._problems]
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
