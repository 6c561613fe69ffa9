"""The one form in which long work reports how far it is."""

from collections.abc import Callable

Progress = Callable[[str, int, int], None]
"""Called as ``progress(what, done, total)`` after each part of some work.

``what`` names the work, such as "decoding frames". Bytes are told apart from counts by the ending
``BYTES``; what follows a colon is detail that changes, such as the loss of a training step.
"""

BYTES = ", bytes"
