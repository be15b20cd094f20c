"""The HTTP side of a server: OpenAI's endpoints, health, metrics and the page."""

import asyncio
import dataclasses
import hmac
import json
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from typing import Any, TypeVar

import starlette.exceptions
from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import Lifespan, Receive, Scope, Send

from diffusion_t5x.serving import page, requests
from diffusion_t5x.serving.answers import Piece
from diffusion_t5x.serving.metrics import Metrics
from diffusion_t5x.serving.refusals import Refusal
from diffusion_t5x.serving.responses import Chats, Completions
from diffusion_t5x.serving.service import Reply, Service

T = TypeVar("T")


class App:
    """The endpoints of a service.

    Args:
      service: answers the requests.
      metrics: counts them.
      api_key: the key that clients must give; None asks for none.
    """

    def __init__(self, service: Service, metrics: Metrics, api_key: str | None):
        self._service, self._metrics, self._api_key = service, metrics, api_key
        self._since = int(time.time())
        self._page = page.render(
            service.name,
            repr(service.decoder),
            service.prompts.chat is not None,
            service.prompts.length,
            api_key is not None,
            service.sampling(),
        )

    def asgi(self, lifespan: Lifespan[Starlette]) -> Starlette:
        """Returns the application, which runs inside the context `lifespan`."""
        return Starlette(
            lifespan=lifespan,
            routes=[
                Route("/", self._show_page),
                Route("/health", self._health),
                Route("/metrics", self._show_metrics),
                Route("/v1/models", self._models),
                Route("/v1/models/{name:path}", self._model),
                Route("/v1/completions", self._complete, methods=["POST"]),
                Route("/v1/chat/completions", self._chat, methods=["POST"]),
            ],
            exception_handlers={
                Refusal: _refused,
                starlette.exceptions.HTTPException: _http_error,
                Exception: _unexpected,
            },
        )

    async def _show_page(self, request: Request) -> Response:
        return Response(self._page.html, media_type="text/html", headers=self._page.headers)

    async def _health(self, request: Request) -> Response:
        healthy = self._service.is_healthy
        return _json({"status": "ok" if healthy else "decoding has failed"}, 200 if healthy else 503)

    async def _show_metrics(self, request: Request) -> Response:
        return Response(self._metrics.as_text(), media_type=self._metrics.content_type)

    async def _models(self, request: Request) -> Response:
        self._check_key(request)
        return _json({"object": "list", "data": [self._about()]})

    async def _model(self, request: Request) -> Response:
        self._check_key(request)
        if request.path_params["name"] != self._service.name:
            raise Refusal("There is no such model here.", "model", status=404, code="model_not_found")
        return _json(self._about())

    def _about(self) -> dict[str, Any]:
        return {"id": self._service.name, "object": "model", "created": self._since, "owned_by": "diffusion_t5x"}

    async def _complete(self, request: Request) -> Response:
        return await self._counted("completions", request, requests.completion, Completions)

    async def _chat(self, request: Request) -> Response:
        return await self._counted("chat", request, requests.chat, Chats)

    async def _counted(
        self,
        endpoint: str,
        request: Request,
        read: Callable[[requests.Body], requests.Ask],
        form: type[Completions],
    ) -> Response:
        """Answers a request, and counts it when its response has been sent."""
        start = time.monotonic()

        def first_text() -> None:
            self._metrics.first_text_seconds.labels(endpoint).observe(time.monotonic() - start)

        def ended(status: int) -> None:
            self._metrics.requests.labels(endpoint, status).inc()
            self._metrics.seconds.labels(endpoint).observe(time.monotonic() - start)

        try:
            self._check_key(request)
            body = requests.parse(await self._content(request))
            ask = read(body)
            texts, prompt_tokens = await asyncio.to_thread(self._service.texts, ask)
            reply = self._service.open(ask, texts, prompt_tokens)
        except Refusal as refusal:
            ended(refusal.status)
            raise
        except ClientDisconnect:
            ended(_CLIENT_LEFT)
            return Response(status_code=_CLIENT_LEFT)  # to nobody
        return _Answering(reply, form(self._service.name), ask, first_text, ended, self._service.prompts.cells)

    def _check_key(self, request: Request) -> None:
        if self._api_key is None:
            return
        scheme, _, given = request.headers.get("authorization", "").partition(" ")
        # Headers are read as Latin-1; the bytes are the key's.
        if scheme.lower() != "bearer" or not hmac.compare_digest(given.encode("latin-1"), self._api_key.encode()):
            raise Refusal(
                "The API key is missing or wrong: send it as the header Authorization: Bearer KEY.",
                status=401,
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )

    async def _content(self, request: Request) -> bytes:
        """Returns the request's body, if it is not too large."""
        if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
            # A form on another site could send anything else without asking.
            raise Refusal("Send JSON, with the header Content-Type: application/json.", status=415)
        most = self._service.limits.body
        content = bytearray()
        async for piece in request.stream():
            content += piece
            if len(content) > most:
                message = f"The request's body is larger than {most:,} bytes."
                raise Refusal(message, status=413, headers={"Connection": "close"})
        return bytes(content)


_CLIENT_LEFT = 499  # as nginx counts it


class _Answering(Response):
    """Sends a reply, whole or as a stream of events, and cancels it when the client leaves."""

    def __init__(
        self,
        reply: Reply,
        form: Completions,
        ask: requests.Ask,
        first_text: Callable[[], None],
        ended: Callable[[int], None],
        cells: Callable[[Sequence[int]], list[str]],
    ):
        super().__init__()
        self._reply, self._form, self._ask, self._cells = reply, form, ask, cells
        self._first_text, self._ended = first_text, ended

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        answer = self._stream(send) if self._ask.stream else self._whole(scope, receive, send)
        status = _CLIENT_LEFT
        try:
            status = await _while_connected(receive, answer) or _CLIENT_LEFT
        finally:
            self._reply.close()
            self._ended(status)

    async def _whole(self, scope: Scope, receive: Receive, send: Send) -> int:
        texts: list[list[str]] = [[] for _ in range(self._reply.num_answers)]
        last: dict[int, Piece] = {}
        try:
            async for piece in self._pieces():
                texts[piece.index].append(piece.text)
                last[piece.index] = piece
        except Refusal as refusal:
            response = _refusal(refusal)
        else:
            whole = [dataclasses.replace(last[index], text="".join(text)) for index, text in enumerate(texts)]
            response = _json(self._form.whole(whole, self._reply.usage))
        await response(scope, receive, send)
        return response.status_code

    async def _stream(self, send: Send) -> int:
        headers = {"content-type": "text/event-stream; charset=utf-8", "cache-control": "no-store"}
        headers["x-accel-buffering"] = "no"  # nginx passes each event on at once
        raw = [(name.encode(), value.encode()) for name, value in headers.items()]
        await send({"type": "http.response.start", "status": 200, "headers": raw})
        status = 200
        try:
            async for event in self._events():
                await _send_event(send, json.dumps(event))
        except Refusal as refusal:
            await _send_event(send, json.dumps(refusal.body))
            status = refusal.status
        else:
            await _send_event(send, "[DONE]")
        await send({"type": "http.response.body", "body": b""})
        return status

    async def _events(self) -> AsyncIterator[dict[str, Any]]:
        for index in range(self._reply.num_answers):
            if (event := self._form.start(index)) is not None:
                yield event
        async for piece in self._pieces():
            canvas = self._cells(piece.canvas) if self._ask.include_canvas else None
            if piece.text or piece.finish_reason or canvas is not None:
                yield self._form.piece(piece, canvas)
        if self._ask.include_usage:
            yield self._form.end(self._reply.usage)

    async def _pieces(self) -> AsyncIterator[Piece]:
        waits = True
        async for piece in self._reply.pieces():
            if waits and (piece.text or piece.finish_reason):
                waits = False
                self._first_text()
            yield piece


async def _while_connected(receive: Receive, work: Coroutine[Any, Any, T]) -> T | None:
    """Returns the result of some work; None if the client leaves before it is done, which cancels the work."""
    working, leaving = asyncio.ensure_future(work), asyncio.ensure_future(_left(receive))
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        return working.result() if working.done() else None
    finally:
        for task in (working, leaving):
            task.cancel()
        await asyncio.gather(working, leaving, return_exceptions=True)


async def _left(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _send_event(send: Send, data: str) -> None:
    body = f"data: {data}\n\n".encode()
    await send({"type": "http.response.body", "body": body, "more_body": True})


def _json(content: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    """Returns JSON in ASCII: it can hold any text that a client has sent."""
    return Response(json.dumps(content), status, headers, "application/json")


def _refusal(refusal: Refusal) -> Response:
    return _json(refusal.body, refusal.status, refusal.headers)


async def _refused(request: Request, error: Exception) -> Response:
    assert isinstance(error, Refusal)
    return _refusal(error)


async def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, starlette.exceptions.HTTPException)
    return _refusal(Refusal(f"{error.detail}.", status=error.status_code, headers=dict(error.headers or {})))


async def _unexpected(request: Request, error: Exception) -> Response:
    return _refusal(Refusal("The server has failed; its log says why.", status=500, kind="server_error"))
