"""Runs the server until it is told to end, and lets it end well."""

import logging
import os
import socket
import threading
import time
from types import FrameType

import uvicorn

from dycoke_jax import checks
from dycoke_jax.errors import RequestError
from dycoke_jax.inputs.any_video import ReadVideo, read_video
from dycoke_jax.llava_video import LlavaVideo
from dycoke_jax.serving.app import make_app
from dycoke_jax.serving.metrics import Metrics
from dycoke_jax.serving.protocol import Defaults
from dycoke_jax.serving.settings import Serving
from dycoke_jax.serving.worker import Worker

_LOG = logging.getLogger(__name__)

_LAST_SECONDS = 5
"""In which the last answers must be sent, after the engine has ended or was given up."""
_TICK = 0.05
"""Seconds after which it is looked again whether the server is to end at once."""


def bind(host: str, port: int) -> socket.socket:
    """Takes a port, on which nothing is answered yet.

    Args:
        host: address of this machine, or a name of it.
        port: the port; 0 for any that is free.

    Raises:
        RequestError: if it cannot be had.
    """
    checks.whole_number("port", port, 0, 65535, error=RequestError)
    taken = None
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        taken = socket.socket(family, kind, protocol)
        if os.name == "posix":  # elsewhere it would let two servers have the same port
            taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        taken.bind(address)
    except (OSError, OverflowError, UnicodeError) as error:
        if taken is not None:
            taken.close()
        reason = getattr(error, "strerror", None) or error
        raise RequestError(f"cannot listen on {host} port {port}: {reason}") from error
    return taken


class Server(uvicorn.Server):
    """The server of one model.

    At the first SIGTERM or SIGINT it refuses new requests with the status 503 and goes on with
    those that it has; at the second one it gives them up.
    """

    def __init__(
        self,
        model: LlavaVideo,
        defaults: Defaults,
        settings: Serving,
        *,
        api_key: str | None = None,
        read: ReadVideo = read_video,
    ) -> None:
        """Starts nothing yet; ``run`` does, and returns when the server has ended.

        Args:
            model: the model.
            defaults: what requests do not say.
            settings: what is accepted.
            api_key: what clients must send; None: anyone may ask.
            read: reads the clips, as in ``LlavaVideo.run``.
        """
        metrics = Metrics()
        self.worker = Worker(model, settings, metrics, read)
        self._grace = settings.grace
        self._hurries = False
        self._draining: threading.Thread | None = None
        app = make_app(self.worker, metrics, defaults, settings, api_key)
        super().__init__(
            uvicorn.Config(
                app,
                lifespan="off",
                log_level="warning",
                timeout_graceful_shutdown=_LAST_SECONDS,
            )
        )

    def run(self, sockets: list[socket.socket] | None = None) -> None:
        """Serves on sockets, such as that of ``bind``, until ``drain`` or a signal ends it."""
        self.worker.start()
        super().run(sockets)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Begins to end; the second signal ends the time of grace."""
        if self._draining is not None:
            self._hurries = True
        # Not in this handler, which may have interrupted a thread that holds a lock.
        self.drain()

    def drain(self) -> None:
        """Refuses new requests, and ends when the others are answered or the time of grace is over.

        It returns at once, and may be called in any thread.
        """
        if self._draining is None:
            self._draining = threading.Thread(target=self._drain, name="draining", daemon=True)
            self._draining.start()

    def _drain(self) -> None:
        self.worker.stop()
        until = time.monotonic() + self._grace
        while time.monotonic() < until and not self._hurries and not self.worker.join(_TICK):
            pass
        if not self.worker.join(0):
            _LOG.warning("the server ends before all of its requests are answered")
            self.worker.give_up()
        self.should_exit = True
