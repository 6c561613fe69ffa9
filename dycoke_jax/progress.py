"""The callback type with which long-running functions report progress."""

from collections.abc import Callable

Progress = Callable[[str, int, int], None]
"""A callback, called as ``progress(what, done, total)`` after each step of a task.

``what`` names the task, such as "decoding frames". If it ends with ``BYTES``, ``done`` and
``total`` are bytes, otherwise counts. Text after a colon is detail that changes from call to call,
such as the loss of a training step.
"""

BYTES = ", bytes"
"""Suffix of ``what`` for tasks whose progress is measured in bytes."""
