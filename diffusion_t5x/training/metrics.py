"""Metric writers: JSON lines and TensorBoard, neither of which needs TensorFlow, and Weights & Biases.

A writer belongs to a run and writes below its MODEL_DIR. Metrics have a folder, such as "train" or
"training_eval/my_task", for JSON lines and TensorBoard's events.

A run that was killed and resumed from step s shows each step once: a writer is created with `last_step=s` and removes
metrics of later steps, and of s itself if that is evaluated again. (W&B cannot remove metrics and shows those steps
twice.)
"""

import json
import os
import pathlib
import sys
import uuid
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, TextIO

import jax

from diffusion_t5x import records
from diffusion_t5x.errors import UserError, did_you_mean
from diffusion_t5x.training.preemption import RUN_AGAIN


class Writer(Protocol):
    """Destination of a run's metrics."""

    def write(self, step: int, folder: str, metrics: Mapping[str, float]) -> None:
        """Writes numbers (anything that `float` accepts) by name."""

    def close(self) -> None:
        """Flushes buffered metrics."""


class JsonlWriter:
    """`metrics.jsonl` in each folder: one JSON object per line, `{"step": 10, "loss": 2.5, ...}`, on disk at once.

    Args:
      model_dir: folders in it are created as needed.
      last_step: lines of later steps are dropped, and so is an incomplete last line.
    """

    def __init__(self, model_dir: str, last_step: int = 0):
        self._model_dir, self._last_step = model_dir, last_step
        self._files: dict[str, TextIO] = {}

    def write(self, step: int, folder: str, metrics: Mapping[str, float]) -> None:
        if folder not in self._files:
            self._files[folder] = self._open(folder, min(self._last_step, step - 1))
        line = {"step": int(step)} | {name: float(value) for name, value in metrics.items()}
        self._files[folder].write(json.dumps(line, ensure_ascii=False) + "\n")
        self._files[folder].flush()

    def close(self) -> None:
        for file in self._files.values():
            file.close()

    def _open(self, folder: str, last_step: int) -> TextIO:
        path = pathlib.Path(self._model_dir, folder, "metrics.jsonl")
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists():
            with path.open("rb") as old, records.replacing(path, "wb") as new:
                new.writelines(line for line in old if _step(line) <= last_step)
        return path.open("a", encoding="utf-8")


class TensorBoardWriter:
    """TensorBoard event files in each folder.

    Args:
      model_dir: folders in it are created as needed.
      last_step: TensorBoard hides what earlier files in a folder have for later steps.
    """

    def __init__(self, model_dir: str, last_step: int = 0):
        self._model_dir, self._last_step = model_dir, last_step
        self._writers: dict[str, Any] = {}

    def write(self, step: int, folder: str, metrics: Mapping[str, float]) -> None:
        import tensorboardX  # not above: most verbs write no events, and it takes a tenth of a second to import

        if folder not in self._writers:
            path = os.path.join(self._model_dir, folder)
            purged = min(self._last_step + 1, step)
            self._writers[folder] = tensorboardX.SummaryWriter(path, purge_step=purged, flush_secs=10)
        for name, value in metrics.items():
            self._writers[folder].add_scalar(name, float(value), int(step))

    def close(self) -> None:
        for writer in self._writers.values():
            writer.close()


class WandbWriter:
    """One Weights & Biases run per MODEL_DIR, which a resumed run continues; "train/loss" over "step".

    W&B's environment variables apply, such as WANDB_MODE=offline, WANDB_PROJECT ("diffusion_t5x" by default) and
    WANDB_NAME (MODEL_DIR's name by default). Its files, and the id of the run, are in MODEL_DIR/wandb.

    Raises:
      UserError: W&B does not start, for example because nobody is logged in.
    """

    def __init__(self, model_dir: str, config: Mapping[str, Any]):
        import wandb

        folder = pathlib.Path(model_dir, "wandb")
        folder.mkdir(parents=True, exist_ok=True)
        run_id = folder / "run_id"
        if not run_id.exists():
            records.write_text(run_id, uuid.uuid4().hex)
        try:
            self._run = wandb.init(
                dir=model_dir,
                id=run_id.read_text(encoding="utf-8"),
                resume="allow",
                reinit="create_new",  # a caller's own W&B run stays as it is
                project=os.environ.get("WANDB_PROJECT", "diffusion_t5x"),
                name=os.environ.get("WANDB_NAME", pathlib.Path(model_dir).resolve().name),
                config=dict(config),
            )
        except wandb.Error as error:
            raise UserError(f"Weights & Biases: {error} To write to disk only, set WANDB_MODE=offline.") from error
        # W&B's own steps only grow, and each call of `log` is one; ours is a metric, over which the others are drawn.
        self._run.define_metric("*", step_metric="step")

    def write(self, step: int, folder: str, metrics: Mapping[str, float]) -> None:
        self._run.log({"step": int(step)} | {f"{folder}/{name}": float(value) for name, value in metrics.items()})

    def close(self) -> None:
        error = sys.exc_info()[1]  # closed on the way out of an exception
        code = error.code if isinstance(error, SystemExit) else int(error is not None)
        if isinstance(code, str):  # a message, which Python ends with 1 after
            code = 1
        if code == RUN_AGAIN:  # "preempted", not "failed"
            self._run.mark_preempting()
        self._run.finish(exit_code=code)


class MultiWriter:
    """Writes to each of its writers."""

    def __init__(self, writers: Sequence[Writer]):
        self._writers = writers

    def write(self, step: int, folder: str, metrics: Mapping[str, float]) -> None:
        for writer in self._writers:
            writer.write(step, folder, metrics)

    def close(self) -> None:
        for writer in self._writers:
            writer.close()


WRITERS = ("jsonl", "tensorboard", "wandb")


def check_writers(names: Sequence[str]) -> None:
    """Raises a UserError if a name is not one of WRITERS, or its package is not installed."""
    if isinstance(names, str):
        raise UserError(f"metric_writers must be a list of names, such as ({names!r},), not {names!r}.")
    for name in names:
        if name not in WRITERS:
            known = ", ".join(WRITERS)
            raise UserError(f"No metric writer is called {name!r}; there are {known}.{did_you_mean(name, WRITERS)}")
    if "wandb" in names:
        try:
            from wandb import init  # noqa: F401  (a folder `wandb` is a package without it)
        except ImportError as error:
            raise UserError("The metric writer 'wandb' needs a package: pip install diffusion_t5x[wandb]") from error


def make_writer(
    model_dir: str, names: Sequence[str], last_step: int = 0, config: Mapping[str, Any] | None = None
) -> MultiWriter:
    """Returns the writers of these names (see `check_writers`). Only the first process of a run writes.

    Args:
      model_dir: the run's folder.
      names: names from WRITERS.
      last_step: the step that the run continues from.
      config: nested names and values, for writers that show them.
    """
    makers: dict[str, Callable[[], Writer]] = {
        "jsonl": lambda: JsonlWriter(model_dir, last_step),
        "tensorboard": lambda: TensorBoardWriter(model_dir, last_step),
        "wandb": lambda: WandbWriter(model_dir, config or {}),
    }
    return MultiWriter([] if jax.process_index() else [makers[name]() for name in names])


def _step(line: bytes) -> float:
    """Returns the step of a line; infinite if it is incomplete or damaged."""
    try:
        return float(json.loads(line)["step"]) if line.endswith(b"\n") else float("inf")
    except (ValueError, KeyError, TypeError):
        return float("inf")
