"""A server in a thread of this process, and what its clients need."""

import base64
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import openai

from dycoke_jax import Decoding, FrameSampling, LlavaVideo
from dycoke_jax.inputs.any_video import read_video
from dycoke_jax.serving.protocol import Defaults
from dycoke_jax.serving.run import Server, bind
from dycoke_jax.serving.settings import Serving

DEFAULTS = Defaults("tiny", Decoding(max_new_tokens=8), FrameSampling(4))


class Running:
    """A running server, whose clips are only read while its gate is open."""

    def __init__(
        self, model: LlavaVideo, settings: Serving, defaults: Defaults, api_key: str | None
    ) -> None:
        self.gate = threading.Event()
        self.gate.set()

        def read(*arguments: Any, **named: Any) -> Any:
            assert self.gate.wait(60)
            return read_video(*arguments, **named)

        self.server = Server(model, defaults, settings, api_key=api_key, read=read)
        listening = bind("127.0.0.1", 0)
        self.url = f"http://127.0.0.1:{listening.getsockname()[1]}"
        self.thread = threading.Thread(target=self.server.run, args=([listening],))
        self.thread.start()
        self._pool = ThreadPoolExecutor(32)
        self.client = openai.OpenAI(
            base_url=f"{self.url}/v1", api_key=api_key or "none", max_retries=0, timeout=60
        )
        self.wait(lambda: self.server.started)

    def wait(self, condition: Callable[[], bool]) -> None:
        """Waits until something is true, for no more than 30 seconds."""
        until = time.monotonic() + 30
        while not condition():
            assert time.monotonic() < until
            time.sleep(0.01)

    def ask(self, content: Any, **named: Any) -> Any:
        """The answer to a user turn."""
        messages = [{"role": "user", "content": content}]
        return self.client.chat.completions.create(model="tiny", messages=messages, **named)

    def later(self, content: Any, **named: Any) -> Future[Any]:
        """Asks in a thread, and has the answer, or the error, later."""
        return self._pool.submit(self.ask, content, **named)

    def post(self, body: Any = None, **named: Any) -> httpx.Response:
        """Posts a body as it is."""
        named.setdefault("headers", {"content-type": "application/json"})
        return httpx.post(f"{self.url}/v1/chat/completions", content=body, timeout=60, **named)

    def metric(self, name: str) -> float:
        """The value of a metric; 0 if it was never set."""
        for line in httpx.get(f"{self.url}/metrics").text.splitlines():
            if line.startswith(f"dycoke_jax_{name} "):
                return float(line.split()[1])
        return 0.0

    def in_hand(self) -> float:
        """Number of requests that are not answered."""
        return self.metric("requests_waiting") + self.metric("requests_running")

    def end(self) -> None:
        """Ends the server, which answers what it has."""
        self.gate.set()
        self.server.drain()
        self.thread.join(60)
        assert not self.thread.is_alive()
        self._pool.shutdown()
        self.client.close()


@contextmanager
def serving(
    model: LlavaVideo,
    api_key: str | None = None,
    defaults: Defaults = DEFAULTS,
    **settings: Any,
) -> Iterator[Running]:
    """A server with these settings."""
    running = Running(model, Serving(**settings), defaults, api_key)
    try:
        yield running
    finally:
        running.end()


def data_url(path: Path, kind: str = "video/mp4") -> str:
    """A file as a data URL."""
    return f"data:{kind};base64,{base64.b64encode(path.read_bytes()).decode()}"


def clip_and(question: str, url: str, kind: str = "video_url") -> list[dict[str, Any]]:
    """The content of a turn with a clip and a question."""
    return [{"type": kind, kind: {"url": url}}, {"type": "text", "text": question}]
