"""Progress of a long loop: a bar on a terminal, an occasional plain line in a log."""

import contextlib
import datetime
import sys
import time
from types import TracebackType

import rich.markup
import rich.progress

from diffusion_t5x import terminal
from diffusion_t5x.console import Console


class Progress:
    """Shows step, loss, tokens per second and the remaining time on standard error.

    What cannot be shown, on a terminal that has closed or a pipe that nobody reads, is not an error.

    Rates count from the first update on: what comes before it is compilation.

    Args:
      total: the last step.
      start: the step that the loop starts from (the one it was resumed from).
      description: what is going on.
      unit: what a step is; "example" in decoding.
      interval: seconds between two lines where the standard error is no terminal.
      shown: or nothing is written.
    """

    def __init__(
        self,
        total: int,
        start: int = 0,
        description: str = "train",
        unit: str = "step",
        interval: float = 30.0,
        shown: bool = True,
    ):
        self._total = total
        self._description = terminal.safe(description)
        self._unit = unit
        self._interval = interval
        self._shown = shown
        self._step = start
        self._loss: float | None = None
        self._tokens = 0
        self._first: tuple[float, int] | None = None  # time and step of the first update
        self._printed = (-float("inf"), start)  # time and step of the last line
        self._bar: rich.progress.Progress | None = None
        if shown and sys.stderr.isatty():
            columns = ("{task.description}", rich.progress.BarColumn(bar_width=None), "{task.fields[status]}")
            self._bar = rich.progress.Progress(*columns, console=Console(stderr=True), expand=True)
            description = rich.markup.escape(self._description)
            self._task = self._bar.add_task(description, total=total, completed=start, status=self._status())

    def update(self, step: int, loss: float | None = None, tokens: int = 0) -> None:
        """Says that `step` is done.

        Args:
          step: steps done since the very beginning.
          loss: its loss.
          tokens: how many tokens went through since the update before.
        """
        now = time.monotonic()
        self._step, self._loss = step, loss
        if self._first is None:
            self._first = (now, step)
        else:
            self._tokens += tokens
        if self._bar:
            with contextlib.suppress(OSError):
                self._bar.update(self._task, completed=step, status=self._status())
        elif now - self._printed[0] >= self._interval:
            self._print(now)

    def __enter__(self) -> "Progress":
        if self._bar:
            self._bar.start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        if self._bar:
            with contextlib.suppress(OSError):
                self._bar.stop()
        elif self._step != self._printed[1]:
            self._print(time.monotonic())

    def _print(self, now: float) -> None:
        self._printed = (now, self._step)
        if not self._shown:
            return
        with contextlib.suppress(OSError):
            print(f"{self._description}: {self._status()}", file=sys.stderr, flush=True)

    def _status(self) -> str:
        parts = [f"{self._unit} {self._step:,}/{self._total:,}"]
        if self._loss is not None:
            parts.append(f"loss {self._loss:.4f}")
        first_time, first_step = self._first or (0.0, self._step)
        if self._step > first_step:
            seconds = max(time.monotonic() - first_time, 1e-9)
            if self._tokens:
                parts.append(f"{self._tokens / seconds:,.0f} tokens/s")
            left = round(seconds / (self._step - first_step) * (self._total - self._step))
            parts.append(f"ETA {datetime.timedelta(seconds=left)}")
        return "  ".join(parts)
