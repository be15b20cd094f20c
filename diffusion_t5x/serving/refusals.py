"""Refusals of requests, in the shape of OpenAI's errors."""

from typing import Any


class Refusal(Exception):
    """A request that is not answered.

    Attributes:
      status: the HTTP status.
      body: the response's JSON.
      headers: more headers of the response.
    """

    def __init__(
        self,
        message: str,
        param: str | None = None,
        *,
        status: int = 400,
        kind: str = "invalid_request_error",
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ):
        super().__init__(message)
        self.status = status
        self.body: dict[str, Any] = {"error": {"message": message, "type": kind, "param": param, "code": code}}
        self.headers = headers or {}


def busy(message: str, seconds: int) -> Refusal:
    """Refuses a request that finds no room; the client may try again after this many seconds."""
    headers = {"Retry-After": str(seconds)}
    return Refusal(message, status=429, kind="rate_limit_error", code="rate_limit_exceeded", headers=headers)


def failed(message: str) -> Refusal:
    """Reports a failure of the server's own."""
    return Refusal(message, status=500, kind="server_error")
