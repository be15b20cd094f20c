"""Metric writers: JSON lines and TensorBoard, neither of which needs TensorFlow.

A run that was killed and resumed from step s shows each step once: a writer is made with `last_step=s` and forgets what
was written for later steps.
"""

import json
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Protocol

import jax
import tensorboardX

from diffusion_t5x.errors import UserError


class Writer(Protocol):
    """Where the metrics of a run go."""

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Writes numbers (anything that `float` takes) by name."""

    def write_text(self, step: int, name: str, text: str) -> None:
        """Writes a text, such as a decoded example."""

    def close(self) -> None:
        """Writes out what is still held back."""


class JsonlWriter:
    """`metrics.jsonl`: one JSON object a line, `{"step": 10, "loss": 2.5, ...}`, on disk when the call returns.

    Args:
      directory: made if it is not there.
      last_step: lines of later steps are dropped, and so is a line that was cut short.
    """

    def __init__(self, directory: str, last_step: int = 0):
        path = pathlib.Path(directory) / "metrics.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists():
            kept = path.with_suffix(".jsonl.tmp")
            with path.open(encoding="utf-8") as old, kept.open("w", encoding="utf-8") as new:
                new.writelines(line for line in old if _step(line) <= last_step)
            os.replace(kept, path)
        self._file = path.open("a", encoding="utf-8")

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        self._write_line({"step": int(step)} | {name: float(value) for name, value in metrics.items()})

    def write_text(self, step: int, name: str, text: str) -> None:
        self._write_line({"step": int(step), name: text})

    def close(self) -> None:
        self._file.close()

    def _write_line(self, line: dict[str, int | float | str]) -> None:
        self._file.write(json.dumps(line, ensure_ascii=False) + "\n")
        self._file.flush()


class TensorBoardWriter:
    """TensorBoard event files.

    Args:
      directory: made if it is not there.
      last_step: TensorBoard hides what earlier files in this folder hold for later steps.
    """

    def __init__(self, directory: str, last_step: int = 0):
        self._writer = tensorboardX.SummaryWriter(str(directory), purge_step=last_step + 1, flush_secs=10)

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        for name, value in metrics.items():
            self._writer.add_scalar(name, float(value), int(step))

    def write_text(self, step: int, name: str, text: str) -> None:
        self._writer.add_text(name, text, int(step))

    def close(self) -> None:
        self._writer.close()


class MultiWriter:
    """Writes to each of its writers."""

    def __init__(self, writers: Sequence[Writer]):
        self._writers = writers

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        for writer in self._writers:
            writer.write(step, metrics)

    def write_text(self, step: int, name: str, text: str) -> None:
        for writer in self._writers:
            writer.write_text(step, name, text)

    def close(self) -> None:
        for writer in self._writers:
            writer.close()


WRITERS = {"jsonl": JsonlWriter, "tensorboard": TensorBoardWriter}


def make_writer(directory: str, last_step: int = 0, names: Sequence[str] = ("jsonl", "tensorboard")) -> MultiWriter:
    """The writers of these names, all to one folder. Only the first process of a run writes.

    Raises:
      UserError: no writer has such a name.
    """
    for name in names:
        if name not in WRITERS:
            raise UserError(f"No metric writer is called {name!r}; there are {', '.join(WRITERS)}.")
    if jax.process_index():
        return MultiWriter([])
    return MultiWriter([WRITERS[name](directory, last_step) for name in names])


def _step(line: str) -> float:
    try:
        return json.loads(line)["step"]
    except ValueError:
        return float("inf")
