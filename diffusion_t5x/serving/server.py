"""Runs an application on uvicorn until a signal ends it."""

import contextlib
import errno
import ipaddress
import signal
import socket
import sys
from collections.abc import Callable, Iterator

import uvicorn
from starlette.types import ASGIApp

from diffusion_t5x.errors import UserError

_BACKLOG = 2048


class Server:
    """An address, taken at once, and the server that listens there later.

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
        except OSError as error:
            hint = " Choose another --port." if getattr(error, "errno", None) == errno.EADDRINUSE else ""
            raise UserError(f"Cannot listen at --host {host} --port {port}: {error}.{hint}") from error
        name, port = self._socket.getsockname()[:2]
        self.url = f"http://{f'[{name}]' if ':' in name else name}:{port}"
        self.is_local = ipaddress.ip_address(name).is_loopback

    def fail(self) -> None:
        """Ends the server as a signal does, but with exit status 1. Any thread may call it."""
        self._has_failed = True
        if self._server is not None:
            self._server.should_exit = True

    def run(self, app: ASGIApp, say: Callable[[str], None]) -> None:
        """Serves until SIGTERM or SIGINT: then new requests are refused, and those that run are answered."""
        config = uvicorn.Config(
            app, ws="none", log_level="error", access_log=False, server_header=False,
            timeout_graceful_shutdown=self._grace,
        )  # fmt: skip
        server = self._server = uvicorn.Server(config)
        with _signals_end_quietly():
            self._socket.listen(_BACKLOG)  # not before: clients would wait while the model is loaded
            say(f"Serving at {self.url}")
            server.run(sockets=[self._socket])
        if self._has_failed:
            sys.exit(1)


@contextlib.contextmanager
def _signals_end_quietly() -> Iterator[None]:
    """Context in which the signals that uvicorn raises again after its own shutdown do nothing."""
    before = {number: signal.signal(number, lambda *_: None) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
