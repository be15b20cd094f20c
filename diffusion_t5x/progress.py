"""Progress of a long loop: a bar in a terminal, an occasional plain line in a log."""

import contextlib
import datetime
import sys
import time
import types
from collections.abc import Iterator, Mapping

import rich.markup
import rich.progress
import rich.table

from diffusion_t5x import terminal
from diffusion_t5x.console import Console


class Progress:
    """Shows the step, its metrics, tokens per second and the time left, on standard error.

    A closed terminal or a pipe without a reader is not an error.

    Rates count from the first update on, because compilation comes before it. Tokens per second exclude pauses.

    Args:
      total: the last step.
      start: the step that the loop starts or resumes from.
      description: name of the activity.
      unit: name of a step; "example" in decoding.
      interval: seconds between two lines if standard error is not a terminal.
      shown: False writes nothing.
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
        self._metrics: Mapping[str, float] = {}
        self._tokens = 0
        self._paused = 0.0  # seconds since the first update
        self._activity = ""  # what is going on in a pause
        self._first: tuple[float, int] | None = None  # time and step of the first update
        self._printed = (-float("inf"), start)  # time and step of the last line
        self._bar: rich.progress.Progress | None = None
        if shown and sys.stderr.isatty():
            # Where the terminal is too narrow, the description is cut short.
            title = rich.progress.TextColumn(
                "{task.description}", table_column=rich.table.Column(ratio=1, no_wrap=True, overflow="ellipsis")
            )
            status = rich.progress.TextColumn(
                "{task.fields[status]}", markup=False, table_column=rich.table.Column(no_wrap=True)
            )
            columns = (title, rich.progress.BarColumn(bar_width=10), status)
            self._bar = rich.progress.Progress(*columns, console=Console(stderr=True), expand=True)
            description = rich.markup.escape(self._description)
            self._task = self._bar.add_task(description, total=total, completed=start, status=self._status())

    def update(self, step: int, metrics: Mapping[str, float] = types.MappingProxyType({}), tokens: int = 0) -> None:
        """Shows that a step is done.

        Args:
          step: number of steps done since the run began.
          metrics: the step's metrics, by name.
          tokens: number of tokens processed since the previous update.
        """
        now = time.monotonic()
        self._step, self._metrics = step, metrics
        if self._first is None:
            self._first = (now, step)
        else:
            self._tokens += tokens
        if self._bar:
            self._redraw()
        elif now - self._printed[0] >= self._interval:
            self._print(now)

    @contextlib.contextmanager
    def paused(self, activity: str) -> Iterator[None]:
        """Context for work between two steps: the bar names the activity, and tokens per second exclude its time."""
        start = time.monotonic()
        self._activity = activity
        self._redraw()
        try:
            yield
        finally:
            self._activity = ""
            if self._first is not None:
                self._paused += time.monotonic() - start
            self._redraw()

    def _redraw(self) -> None:
        if self._bar:
            with contextlib.suppress(OSError):
                self._bar.update(self._task, completed=self._step, status=self._status())

    def __enter__(self) -> "Progress":
        if self._bar:
            self._bar.start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, traceback: types.TracebackType | None) -> None:
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
        parts += [f"{name} {value:.4f}" for name, value in self._metrics.items()]
        first_time, first_step = self._first or (0.0, self._step)
        if self._step > first_step:
            seconds = max(time.monotonic() - first_time, 1e-9)
            if self._tokens:
                parts.append(f"{self._tokens / max(seconds - self._paused, 1e-9):,.0f} tokens/s")
            left = round(seconds / (self._step - first_step) * (self._total - self._step))
            parts.append(self._activity or f"ETA {datetime.timedelta(seconds=left)}")
        elif self._activity:
            parts.append(self._activity)
        return terminal.safe("  ".join(parts))
