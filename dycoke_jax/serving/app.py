"""The routes of the server."""

import asyncio
import hmac
import time
import uuid
from collections.abc import AsyncIterator
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from dycoke_jax.engine.requests import Answer, Piece
from dycoke_jax.serving.faults import Fault
from dycoke_jax.serving.metrics import Metrics
from dycoke_jax.serving.protocol import Asked, Defaults, Writer, event, read_body
from dycoke_jax.serving.settings import Serving
from dycoke_jax.serving.worker import Ticket, Worker

_GONE = 499
"""Status under which requests are counted whose client has gone away."""


def make_app(
    worker: Worker,
    metrics: Metrics,
    defaults: Defaults,
    settings: Serving,
    api_key: str | None = None,
) -> FastAPI:
    """Makes the application.

    Args:
        worker: runs the engine.
        metrics: what /metrics tells; the worker counts into the same.
        defaults: what requests do not say.
        settings: what is accepted.
        api_key: what clients must send to use /v1; None: anyone may use it.
    """
    app = FastAPI(title="dycoke_jax", docs_url=None, redoc_url=None, openapi_url=None)
    started = int(time.time())

    def check_key(request: Request) -> None:
        if api_key is None:
            return
        scheme, _, given = request.headers.get("authorization", "").partition(" ")
        is_right = hmac.compare_digest(given.encode("latin-1"), api_key.encode())
        if scheme.lower() != "bearer" or not is_right:
            raise Fault(401, "the API key is missing or wrong", code="invalid_api_key")

    @app.exception_handler(Fault)
    async def on_fault(request: Request, fault: Fault) -> Response:
        return _refusal(fault)

    @app.exception_handler(HTTPException)
    async def on_http(request: Request, error: HTTPException) -> Response:
        return _refusal(Fault(error.status_code, f"{request.url.path}: {error.detail}"))

    @app.exception_handler(Exception)
    async def on_error(request: Request, error: Exception) -> Response:
        return _refusal(Fault(500, "the server has failed; see its log"))

    @app.get("/health")
    async def health() -> Response:
        if worker.is_ready:
            return JSONResponse({"status": "ok"})
        return JSONResponse({"status": "stopping"}, 503)

    @app.get("/metrics")
    async def measured() -> Response:
        return Response(metrics.text(), media_type="text/plain; version=0.0.4")

    def described() -> dict[str, Any]:
        return {
            "id": defaults.model,
            "object": "model",
            "created": started,
            "owned_by": "dycoke_jax",
        }

    @app.get("/v1/models")
    async def models(request: Request) -> Response:
        check_key(request)
        return JSONResponse({"object": "list", "data": [described()]})

    @app.get("/v1/models/{name:path}")
    async def model(request: Request, name: str) -> Response:
        check_key(request)
        if name != defaults.model:
            raise Fault(404, "there is no such model", param="model", code="model_not_found")
        return JSONResponse(described())

    @app.post("/v1/chat/completions")
    async def chat(request: Request) -> Response:
        try:
            check_key(request)
            response = await _answer(request, worker, metrics, defaults, settings)
        except Fault as fault:
            response = _refusal(fault)
        except ClientDisconnect:
            response = Response(status_code=_GONE)
        if not isinstance(response, StreamingResponse):  # which is counted at its end
            metrics.requests.labels(str(response.status_code)).inc()
        return response

    return app


def _refusal(fault: Fault) -> Response:
    return JSONResponse(fault.as_json(), fault.status, fault.headers)


async def _answer(
    request: Request, worker: Worker, metrics: Metrics, defaults: Defaults, settings: Serving
) -> Response:
    """Answers a request for a chat completion.

    Raises:
        Fault: if it is refused.
        ClientDisconnect: if the client has gone away.
    """
    arrived = time.monotonic()
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        # Pages in a browser may send other types to any server without being asked for leave.
        raise Fault(415, "the body must be JSON, with content type application/json")
    worker.admit()
    is_submitted = False
    try:
        asked = await _read(request, defaults, settings)
        loop = asyncio.get_running_loop()
        ticket = Ticket(asked.request, asked.compression, loop, asyncio.Queue())
        worker.submit(ticket)
        is_submitted = True
    finally:
        if not is_submitted:
            worker.leave()

    async def pieces() -> AsyncIterator[Piece]:
        gone = asyncio.ensure_future(_disconnected(request))
        answer = None
        try:
            while answer is None:
                rest = arrived + settings.timeout - time.monotonic()
                piece = await _next_piece(ticket, gone, rest)
                answer = piece.answer
                yield piece
        finally:
            gone.cancel()
            ticket.abandoned = answer is None

    coming = pieces()
    writer = Writer(
        f"chatcmpl-{uuid.uuid4().hex}", int(time.time()), defaults.model, asked.include_usage
    )
    # A request that cannot be answered fails before its first piece, when a status can say so.
    first = await anext(coming)
    metrics.first_seconds.observe(time.monotonic() - arrived)
    if asked.stream:
        events = _events(first, coming, writer, metrics, arrived)
        return StreamingResponse(
            events, media_type="text/event-stream", headers={"Cache-Control": "no-cache"}
        )
    answer = first.answer
    async for piece in coming:
        answer = piece.answer
    assert isinstance(answer, Answer)
    metrics.seconds.observe(time.monotonic() - arrived)
    return JSONResponse(writer.whole(answer))


async def _read(request: Request, defaults: Defaults, settings: Serving) -> Asked:
    """Reads the body of a request, no more of it than is allowed."""
    too_large = Fault(
        413, f"the body has more than {settings.max_body} MB (--max-body)", code="too_large"
    )
    try:
        async with asyncio.timeout(settings.timeout):
            body = bytearray()
            async for chunk in request.stream():
                body += chunk
                if len(body) > settings.body_bytes:
                    raise too_large
            return await asyncio.to_thread(read_body, bytes(body), defaults, settings)
    except TimeoutError:
        raise Fault(408, "the body did not come in time", code="timeout") from None


async def _disconnected(request: Request) -> None:
    """Waits until the client has gone away."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _next_piece(ticket: Ticket, gone: asyncio.Future[None], seconds: float) -> Piece:
    """Waits for the next piece of an answer.

    Raises:
        Fault: if the request has failed, or if there is no piece in time.
        ClientDisconnect: if the client has gone away.
    """
    getting = asyncio.ensure_future(ticket.events.get())
    try:
        both: set[asyncio.Future[Any]] = {getting, gone}
        await asyncio.wait(both, timeout=max(0, seconds), return_when=asyncio.FIRST_COMPLETED)
        if getting.done():
            result = getting.result()
            if isinstance(result, Fault):
                raise result
            return result
        if gone.done():
            raise ClientDisconnect
        raise Fault(504, "the answer was not ready in time (--timeout)", code="timeout")
    finally:
        getting.cancel()


async def _events(
    first: Piece,
    coming: AsyncIterator[Piece],
    writer: Writer,
    metrics: Metrics,
    arrived: float,
) -> AsyncIterator[str]:
    """The server-sent events of an answer; after an error one that says so, and no end mark."""
    status = _GONE
    try:
        yield writer.begin()
        piece = first
        while True:
            if piece.text:
                yield writer.text(piece.text)
            if piece.answer is not None:
                yield writer.end(piece.answer)
                break
            piece = await anext(coming)
        status = 200
        metrics.seconds.observe(time.monotonic() - arrived)
    except Fault as fault:
        status = fault.status
        yield event(fault.as_json())
    except ClientDisconnect:
        pass
    finally:
        metrics.requests.labels(str(status)).inc()
        await coming.aclose()  # type: ignore[attr-defined]
