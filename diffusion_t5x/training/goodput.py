"""Goodput: the share of a run's time spent in steps, and in everything else."""

import contextlib
import logging
import time
from collections.abc import Iterator
from typing import Self

logger = logging.getLogger(__name__)

KINDS = ("start", "compile", "input", "evaluation", "checkpoint")


class Goodput:
    """Counts seconds from its creation; as a context manager, logs their shares at its end.

    "start" is everything before the first batch is requested; "compile" the first call of the step; "input" the time
    spent on a batch while no step was running; "evaluation" and "checkpoint" the time that the loop waited for them.
    The rest is "steps".
    """

    def __init__(self):
        self._began = time.monotonic()
        self._spent: dict[str, float] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        logger.info("%s", self)

    def started(self) -> None:
        """Marks the time of the first batch request."""
        self._spent["start"] = time.monotonic() - self._began

    @contextlib.contextmanager
    def spent(self, kind: str) -> Iterator[None]:
        """Context whose time counts as `kind`."""
        start = time.monotonic()
        try:
            yield
        finally:
            self.add(kind, time.monotonic() - start)

    def add(self, kind: str, seconds: float) -> None:
        self._spent[kind] = self._spent.get(kind, 0.0) + seconds

    def shares(self) -> dict[str, float]:
        """Returns shares of the time so far, by kind; they sum to 1."""
        total = max(time.monotonic() - self._began, 1e-9)
        shares = {kind: self._spent.get(kind, 0.0) / total for kind in KINDS}
        return shares | {"steps": max(1 - sum(shares.values()), 0.0)}

    def __str__(self) -> str:
        shares = ", ".join(f"{kind} {share:.1%}" for kind, share in self.shares().items() if share >= 0.0005)
        return f"{time.monotonic() - self._began:,.0f} s: {shares}"
