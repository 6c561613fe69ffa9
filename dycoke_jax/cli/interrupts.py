"""Ctrl-C for work that ends at a good place: the first one asks it to end, the second one ends it.

A handler of Python runs between two steps of the interpreter, so it waits while the main thread is
inside a compiled program. A thread that waits at the wakeup file descriptor does not.
"""

import os
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

INTERRUPTED = 130
"""Exit code after an interrupt: that of a process that SIGINT ends (128 + 2)."""


@contextmanager
def interruptible(asked: Callable[[], None]) -> Iterator[threading.Event]:
    """Turns the first SIGINT into an event, and ends the process at the second one.

    It must be entered in the main thread.

    Args:
        asked: called, in a thread, after the first one.

    Yields:
        The event that is set by the first one.
    """
    event = threading.Event()
    reading, writing = socket.socketpair()
    writing.setblocking(False)

    def watch() -> None:
        while (number := reading.recv(1)[0]) != 0:
            if number != signal.SIGINT:
                continue
            if event.is_set():
                sys.stderr.write("\x1b[?25h" if sys.stderr.isatty() else "")  # shows the cursor
                sys.stderr.flush()
                os._exit(INTERRUPTED)
            event.set()
            asked()

    thread = threading.Thread(target=watch, name="interrupts", daemon=True)
    thread.start()
    descriptor = signal.set_wakeup_fd(writing.fileno())
    handler = signal.signal(signal.SIGINT, lambda *_: None)
    try:
        yield event
    finally:
        signal.signal(signal.SIGINT, handler)
        signal.set_wakeup_fd(descriptor)
        writing.send(b"\0")
        thread.join()
        reading.close()
        writing.close()
