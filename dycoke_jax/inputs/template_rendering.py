"""Renders chat templates in a process of its own, since they come with checkpoints from anywhere.

A chat template is a program. The sandbox in which transformers runs it keeps it from files, and not
from running for ever or from filling the memory; no thread can be kept from that, and a process
can. One process renders for all threads, one conversation after the other, which takes about a
millisecond.
"""

import atexit
from collections.abc import Mapping, Sequence
from threading import Lock
from typing import Any

from dycoke_jax.inputs.child_process import Child, ChildError, Message

SECONDS = 10.0
"""Longest wall time of a rendering."""
MOST_CHARACTERS, MOST_TIMES = 2**20, 4
"""A rendering may have so many characters, and so many for each character of the conversation."""


class RenderingError(Exception):
    """A template that cannot be rendered, and why."""


class _Renderer:
    """The process, which is started when it is needed."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._child: Child | None = None

    def ask(self, request: Message) -> Message:
        """Waits for the process to be free and then for its reply.

        Raises:
            ChildError: if it ends first.
        """
        with self._lock:
            if self._child is not None and not self._child.is_alive:
                self._end()
            if self._child is None:
                self._child = Child("dycoke_jax.inputs.template_process")
            try:
                with self._child.within(SECONDS):
                    self._child.tell(request)
                    return self._child.hear()
            except BaseException:
                self._end()
                raise

    def end(self) -> None:
        """Ends the process, if there is one."""
        with self._lock:
            self._end()

    def _end(self) -> None:
        if self._child is not None:
            self._child.end()
            self._child = None


_renderer = _Renderer()
atexit.register(_renderer.end)


def render(template: str, messages: Sequence[Mapping[str, Any]], tokens: Mapping[str, str]) -> str:
    """Renders a conversation as transformers does, up to where the answer begins.

    Args:
        template: source of the template.
        messages: the conversation, of values of JSON.
        tokens: the tokenizer's special tokens by name, such as ``eos_token``.

    Returns:
        The text.

    Raises:
        RenderingError: if the template fails, takes too long, or writes too much.
    """
    most = MOST_CHARACTERS + MOST_TIMES * _characters(messages)
    request = {"template": template, "messages": messages, "tokens": tokens, "most": most}
    try:
        reply = _renderer.ask(request)
    except ChildError as error:
        if error.is_late:
            raise RenderingError(f"it takes more than {SECONDS:g} seconds") from error
        raise RenderingError(f"the process that renders it has ended: {error.how}") from error
    if "error" in reply:
        raise RenderingError(reply["error"])
    return str(reply["text"])


def _characters(value: Any) -> int:
    """Number of characters of all texts in a value of JSON."""
    if isinstance(value, str):
        return len(value)
    parts = value.values() if isinstance(value, Mapping) else value
    return sum(map(_characters, parts))
