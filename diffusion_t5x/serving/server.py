"""Runs an application on uvicorn until a signal ends it."""

import contextlib
import errno
import ipaddress
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Literal

import uvicorn
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from diffusion_t5x.errors import UserError
from diffusion_t5x.serving.refusals import Refusal

_BACKLOG = 2048
_SECONDS = 5  # that a client is told to wait while the model is loaded


class Server:
    """Listens at an address from the start: with status 503 while the model is loaded, then with an application.

    Args:
      host: address or name to listen at.
      port: its port; 0 takes a free one.
      grace: seconds that requests have to end after a signal.

    Attributes:
      url: where the server is.
      is_local: only this machine can reach it.

    Raises:
      UserError: it cannot listen there.
    """

    def __init__(self, host: str, port: int, grace: int):
        self._grace, self._has_failed = grace, False
        self._server: uvicorn.Server | None = None
        try:
            family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
            self._socket = socket.socket(family)
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            self._socket.bind(address)
            self._socket.listen(_BACKLOG)
        except OSError as error:
            hint = " Choose another --port." if error.errno == errno.EADDRINUSE else ""
            raise UserError(
                f"Cannot listen at --host {host} --port {port}: {error.strerror or error}.{hint}"
            ) from error
        name, port = self._socket.getsockname()[:2]
        self.url = f"http://{f'[{name}]' if ':' in name else name}:{port}"
        self.is_local = ipaddress.ip_address(name).is_loopback

    @contextlib.contextmanager
    def loading(self) -> Iterator[None]:
        """Context in which each request is answered with status 503. Signals are left as they are."""
        server = self._uvicorn(_loading, lifespan="off")
        # uvicorn closes the socket that it is given. Connections that come in between wait for the application.
        thread = threading.Thread(target=server.run, args=([self._socket.dup()],), daemon=True)
        thread.start()
        try:
            yield
        finally:
            server.should_exit = True
            thread.join()

    def fail(self) -> None:
        """Ends the server as a signal does, but with exit status 1. Any thread may call it."""
        self._has_failed = True
        if self._server is not None:
            self._server.should_exit = True

    def run(self, app: ASGIApp, say: Callable[[str], None]) -> None:
        """Serves until SIGTERM or SIGINT: then new requests are refused, and those that run are answered."""
        server = self._server = self._uvicorn(app, lifespan="on")
        with _signals_end_quietly():
            say(f"Serving at {self.url}")
            server.run(sockets=[self._socket])
        if self._has_failed:
            sys.exit(1)

    def _uvicorn(self, app: ASGIApp, lifespan: Literal["on", "off"]) -> uvicorn.Server:
        config = uvicorn.Config(
            app, ws="none", lifespan=lifespan, log_level="error", access_log=False, server_header=False,
            timeout_graceful_shutdown=self._grace,
        )  # fmt: skip
        return uvicorn.Server(config)


async def _loading(scope: Scope, receive: Receive, send: Send) -> None:
    """The application while the model is loaded."""
    headers = {"Retry-After": str(_SECONDS), "Connection": "close"}
    refusal = Refusal("The model is being loaded. Try again later.", kind="server_error", code="loading")
    body = {"status": "loading"} if scope["path"] == "/health" else refusal.body
    await JSONResponse(body, 503, headers)(scope, receive, send)


@contextlib.contextmanager
def _signals_end_quietly() -> Iterator[None]:
    """Context in which the signals that uvicorn raises again after its own shutdown do nothing."""
    before = {number: signal.signal(number, lambda *_: None) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
