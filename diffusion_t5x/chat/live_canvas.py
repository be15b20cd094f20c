"""Shows a decoder's canvas in a terminal while it is written."""

import contextlib
import logging
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import rich.console
import rich.live
import rich.text

from diffusion_t5x import terminal
from diffusion_t5x.data.batch import Batch
from diffusion_t5x.evaluation import traces

_BLOCK = "░"
_FRAMES_PER_SECOND = 20


class Stopped(Exception):
    """Raised when the user stops an answer."""


class LiveCanvas:
    """A `Watch` that draws the canvas in a terminal; unwritten positions are dim blocks.

    If a decoder denoises several canvases per text, the first one is shown.

    Args:
      console: the terminal.
      cells: maps the tokens of a canvas to their texts, one each.
      left_to_right: the decoder writes left to right; only what it has written is shown.
    """

    def __init__(self, console: rich.console.Console, cells: Callable[[Sequence[int]], list[str]], left_to_right: bool):
        self._console = console
        self._cells = cells
        self._left_to_right = left_to_right
        self._frame: tuple[int, list[int], list[float]] | None = None
        self._targets = np.zeros(0, bool)
        self._stopped = self._drawing = False
        logging.getLogger("jax._src.debugging").addFilter(_is_no_stop)

    def __call__(self, step: np.ndarray, tokens: np.ndarray, confidence: np.ndarray) -> None:
        """Raises `Stopped` if the user has stopped the answer, which ends decoding."""
        if self._stopped:
            raise Stopped
        if self._frame is None or step > self._frame[0]:
            row, sure = (np.asarray(x)[0][self._targets].tolist() for x in (tokens, confidence))
            self._frame = int(step), row, sure

    @property
    def num_steps(self) -> int:
        """Number of steps seen so far."""
        return self._frame[0] if self._frame else 0

    def stop(self) -> None:
        """Stops the current answer at its next step."""
        self._stopped = True

    @contextlib.contextmanager
    def shown(self, batch: Batch) -> Iterator[None]:
        """Context that draws the canvas of a batch and then restores the terminal."""
        self._targets, self._frame = np.asarray(batch.target_mask[0]), None
        self._stopped, self._drawing = False, True
        live = rich.live.Live(
            get_renderable=self._fitting,
            console=self._console,
            refresh_per_second=_FRAMES_PER_SECOND,
            redirect_stdout=False,
            redirect_stderr=False,
            transient=True,
        )
        with live:
            try:
                yield
            finally:
                self._drawing = False  # it ends with an empty picture

    def picture(self) -> rich.text.Text:
        """The canvas after the last step shown; more confident tokens are greener."""
        if self._frame is None:
            return rich.text.Text()
        _, tokens, confidence = self._frame
        end = len(tokens)
        if self._left_to_right:
            end = 1 + max((place for place, sure in enumerate(confidence) if sure), default=-1)
        text = rich.text.Text()
        for cell, sure in zip(self._cells(tokens)[:end], confidence, strict=False):
            text.append(terminal.safe(cell) if sure else _BLOCK, traces.colour(sure) if sure else "dim")
        return text

    def _fitting(self) -> rich.text.Text:
        """The last lines of the picture that fit the terminal."""
        if not self._drawing or self._frame is None:
            return rich.text.Text("…" if self._drawing else "", "dim")
        width, height = self._console.size
        lines = self.picture().wrap(self._console, width)
        return rich.text.Text("\n").join(lines[-(height - 2) :])


def _is_no_stop(record: logging.LogRecord) -> bool:
    """Log filter against the traceback that JAX logs for a `Stopped` from a callback."""
    return not (record.exc_info and isinstance(record.exc_info[1], Stopped))
