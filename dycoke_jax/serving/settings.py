"""The settings of the server."""

from dataclasses import dataclass
from pathlib import Path

from dycoke_jax import checks
from dycoke_jax.errors import RequestError


@dataclass(frozen=True)
class Serving:
    """What the server accepts, and how long it waits.

    Attributes:
        batch_size: largest number of requests that run together, at least 1.
        max_requests: requests in the server at the same time, those included that run; at least 1.
            Further ones get the status 429.
        gather: seconds that an idle server waits for more requests after one has come, so that
            requests sent together run together.
        timeout: seconds after which a request that has no whole answer is given up, with the
            status 504.
        grace: seconds that the server goes on with its requests after SIGTERM or Ctrl-C.
        max_body: largest body of a request in MB (10^6 bytes). A clip as a data URL takes a third
            more than its file.
        max_frames: largest number of frames that a request may ask for, at least 1.
        max_tokens: largest number of tokens of an answer that a request may ask for, at least 1.
            Requests that run together wait for the longest of their answers.
        media_root: folder whose files requests may name by file:// URLs. Default: none may.
        allow_urls: fetch clips from http and https URLs, also from hosts that only this machine
            can reach.

    Raises:
        RequestError: naming the setting and its range.
    """

    batch_size: int = 8
    max_requests: int = 64
    gather: float = 0.01
    timeout: float = 600.0
    grace: float = 30.0
    max_body: int = 64
    max_frames: int = 128
    max_tokens: int = 1024
    media_root: Path | None = None
    allow_urls: bool = False

    def __post_init__(self) -> None:
        """Checks the types and values of the settings."""
        for name in ("batch_size", "max_requests", "max_body", "max_frames", "max_tokens"):
            checks.whole_number(name, getattr(self, name), 1, error=RequestError)
        for name in ("gather", "grace"):
            checks.number(name, getattr(self, name), 0, error=RequestError)
        checks.number("timeout", self.timeout, 0, with_low=False, error=RequestError)
        checks.flag("allow_urls", self.allow_urls, error=RequestError)
        if self.media_root is not None and not Path(self.media_root).is_dir():
            raise RequestError(f"media_root is {self.media_root}, which is no folder")

    @property
    def body_bytes(self) -> int:
        """Largest body of a request, and largest clip that is fetched, in bytes."""
        return self.max_body * 10**6
