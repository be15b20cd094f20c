"""Counts requests, tokens and times, for Prometheus."""

from collections.abc import Callable

import prometheus_client
from prometheus_client import Counter, Gauge, Histogram

_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 50, 100, 250)


class Metrics:
    """The numbers of one server; memory and CPU time of its process are among them.

    Attributes:
      requests: requests by "endpoint" and "status".
      seconds: time from a request's arrival to its end, by "endpoint".
      first_text_seconds: time from a request's arrival to the first text of its answer, by "endpoint".
      prompt_tokens, completion_tokens: tokens read and written.
    """

    content_type = prometheus_client.CONTENT_TYPE_LATEST

    def __init__(self) -> None:
        registry = self._registry = prometheus_client.CollectorRegistry()
        prometheus_client.ProcessCollector(registry=registry)
        by = ("endpoint",)
        self.requests = Counter("diffusion_t5x_requests", "Requests.", (*by, "status"), registry=registry)
        self.seconds = Histogram(
            "diffusion_t5x_request_seconds", "Time of a request.", by, buckets=_SECONDS, registry=registry
        )
        self.first_text_seconds = Histogram(
            "diffusion_t5x_first_text_seconds", "Time to the first text.", by, buckets=_SECONDS, registry=registry
        )
        self.prompt_tokens = Counter("diffusion_t5x_prompt_tokens", "Tokens of prompts.", registry=registry)
        self.completion_tokens = Counter("diffusion_t5x_completion_tokens", "Tokens of answers.", registry=registry)

    def watch(self, running: Callable[[], int], waiting: Callable[[], int]) -> None:
        """Adds the numbers of texts that are being written, and that wait for a slot."""
        for name, about, number in (
            ("running", "Texts that are being written.", running),
            ("waiting", "Texts that wait for a slot.", waiting),
        ):
            Gauge(f"diffusion_t5x_texts_{name}", about, registry=self._registry).set_function(number)

    def as_text(self) -> bytes:
        """Returns all numbers in Prometheus's text format."""
        return prometheus_client.generate_latest(self._registry)
