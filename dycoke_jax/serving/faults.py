"""What a client is told when its request is not answered, in the form of the OpenAI API."""

from typing import Any

from dycoke_jax.engine.requests import Failure

RETRY_AFTER = 1
"""Seconds after which a client that was refused for want of room may ask again."""


class Fault(Exception):
    """A request that is not answered, with the HTTP status that says so.

    Attributes:
        status: HTTP status.
        message: what is wrong and what to do, in one line.
        param: the field of the request that is wrong; None if it is none.
        code: a word for programs.
    """

    def __init__(
        self, status: int, message: str, *, param: str | None = None, code: str | None = None
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code

    @property
    def headers(self) -> dict[str, str]:
        """Headers of the response."""
        if self.status == 401:
            return {"WWW-Authenticate": "Bearer"}
        return {"Retry-After": str(RETRY_AFTER)} if self.status in (429, 503) else {}

    def as_json(self) -> dict[str, Any]:
        """The error object of the OpenAI API."""
        kind = {401: "authentication_error", 429: "rate_limit_error"}.get(
            self.status, "server_error" if self.status >= 500 else "invalid_request_error"
        )
        error = {"message": self.message, "type": kind, "param": self.param, "code": self.code}
        return {"error": error}


def bad(message: str, param: str | None = None, code: str = "invalid_value") -> Fault:
    """A request that makes no sense, or asks for what the server cannot do (status 400)."""
    return Fault(400, message, param=param, code=code)


def of_failure(failure: Failure) -> Fault:
    """The fault of a request that the engine could not answer."""
    if failure.kind == "internal":
        return failed()
    param = "messages" if failure.kind in ("video", "prompt") else None
    return bad(failure.message, param, f"invalid_{failure.kind}")


def failed() -> Fault:
    """The program or the device is at fault."""
    return Fault(500, "the engine has failed; see the log of the server", code="engine_failed")


def stopping() -> Fault:
    """The server is shutting down."""
    return Fault(503, "the server is shutting down; ask again later", code="shutting_down")
