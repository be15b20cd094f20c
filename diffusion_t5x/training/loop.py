"""The training loop. It needs no TensorFlow: batches come from any iterator that has a position."""

import contextlib
import dataclasses
import faulthandler
import logging
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol

import jax
import numpy as np
from jax.sharding import Mesh

from diffusion_t5x import partitioning
from diffusion_t5x.checkpointing.checkpoints import Checkpoints
from diffusion_t5x.data.batch import Batch
from diffusion_t5x.errors import UserError
from diffusion_t5x.progress import Progress
from diffusion_t5x.training.bad_numbers import Judge
from diffusion_t5x.training.goodput import Goodput
from diffusion_t5x.training.metrics import Writer
from diffusion_t5x.training.preemption import StopSignals
from diffusion_t5x.training.state import TrainState
from diffusion_t5x.training.step import Metrics

logger = logging.getLogger(__name__)


class BatchIterator(Protocol):
    """An endless stream of this process's part of the batches, which can save and restore its position.

    A `state_dict` of {} means that the position cannot be saved.
    """

    def __next__(self) -> Batch: ...

    def state_dict(self) -> dict[str, np.ndarray]: ...

    def load_state_dict(self, state: dict[str, np.ndarray]) -> None: ...


@dataclasses.dataclass(frozen=True)
class Periods:
    """Numbers of steps between events; each event also happens at the last step.

    Attributes:
      log: steps between writing metrics, averaged since the last time.
      eval: steps between evaluations; None never evaluates.
      save: steps between checkpoints.
    """

    log: int = 10
    eval: int | None = 1000
    save: int = 1000

    def __post_init__(self) -> None:
        for name in ("log", "eval", "save"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"Periods.{name} must be at least 1 step, not {value}.")


class _Log:
    """Reads each step's metrics while the next step runs, and writes their means periodically."""

    def __init__(self, writer: Writer, progress: Progress, period: int, judge: Judge, goodput: Goodput):
        self._writer, self._progress, self._period = writer, progress, period
        self._judge, self._goodput = judge, goodput
        self._pending: tuple[int, Metrics, Batch] | None = None
        self._since: list[Mapping[str, float]] = []
        self._time = time.monotonic()
        self._fastest = 0.0

    def add(self, step: int, metrics: Metrics, batch: Batch) -> None:
        """Takes in the metrics of `step`, which may still be running."""
        self.flush()
        self._pending = (step, metrics, batch)

    @property
    def is_running(self) -> bool:
        """True while the latest step keeps the devices busy."""
        # JAX's arrays have it, though their type does not say so.
        return self._pending is not None and not self._pending[1]["loss"].is_ready()  # type: ignore[attr-defined]

    def flush(self) -> None:
        """Waits for the latest metrics."""
        if self._pending is None:
            return
        step, metrics, batch = self._pending
        self._pending = None
        values = {name: float(value) for name, value in jax.device_get(metrics).items()}
        self._since.append(values)
        self._progress.update(step, headline(values), int(values["tokens"]))
        self._judge.add(step, values, batch)
        if step % self._period == 0:
            self._write(step)

    def finish(self, step: int) -> None:
        """Writes all remaining metrics when `step` is the run's last."""
        self.flush()
        if self._since:
            self._write(step)

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Context for work between two steps: waits for the latest metrics, and does not count the time."""
        self.flush()
        start = time.monotonic()
        yield
        self._time += time.monotonic() - start

    def _write(self, step: int) -> None:
        names = [name for name in self._since[0] if name not in ("tokens", "bad")]
        good = [m for m in self._since if not m.get("bad")] or self._since
        means = {name: float(np.mean([m[name] for m in good])) for name in names}
        seconds = time.monotonic() - self._time
        rate = sum(m["tokens"] for m in self._since) / seconds
        if rate < self._fastest / 2 and seconds > 1:  # less is noise
            logger.warning("step %d: %.0f tokens/s, less than half of the %.0f seen before", step, rate, self._fastest)
        self._fastest = max(rate, self._fastest)
        means |= {"tokens_per_second": rate, "seconds_per_step": seconds / len(self._since)}
        if self._judge.count:
            means["bad_steps"] = self._judge.count
        self._writer.write(step, "train", means)
        self._writer.write(step, "goodput", self._goodput.shares())
        self._since, self._time = [], time.monotonic()


def headline(metrics: Mapping[str, float]) -> dict[str, float]:
    """Returns the metrics of a step for the progress line: the loss, negative log-likelihoods and the first accuracy.

    A likelihood that equals the loss is left out.
    """
    loss = metrics["loss"]
    names = [name for name in metrics if name.startswith("nll") and metrics[name] != loss]
    names += [name for name in metrics if name.startswith("accuracy")][:1]
    return {"loss": loss} | {name: metrics[name] for name in names}


@contextlib.contextmanager
def _compiling(goodput: Goodput) -> Iterator[None]:
    """Context for the first call of the training step: logs that it compiles, and how long that took."""
    start = time.monotonic()
    logger.info("compiling the training step …")
    with goodput.spent("compile"):
        yield
    logger.info("compiled in %.1f s", time.monotonic() - start)


@contextlib.contextmanager
def _watched(seconds: float | None) -> Iterator[None]:
    """Context that ends the process if it takes longer; None sets no limit."""
    if seconds is not None:
        faulthandler.dump_traceback_later(seconds, exit=True, file=sys.__stderr__ or sys.stderr)
    try:
        yield
    finally:  # an exception leaves no clock behind that would end the process later
        if seconds is not None:
            faulthandler.cancel_dump_traceback_later()


def train_loop(
    *,
    mesh: Mesh,
    state: TrainState,
    train_step: Callable[[TrainState, Batch, float], tuple[TrainState, Metrics]],
    next_batch: Callable[[TrainState], Batch],
    data_state: Callable[[], Mapping[str, np.ndarray]],
    total_steps: int,
    periods: Periods,
    evaluate: Callable[[TrainState, int], Mapping[str, float]],
    checkpoints: Checkpoints,
    metadata: Mapping[str, Any],
    writer: Writer,
    judge: Judge,
    goodput: Goodput,
    description: str = "train",
    evaluation_due: bool = False,
    hang_timeout: float | None = None,
    check_folder: Callable[[], None] = lambda: None,
) -> TrainState:
    """Trains up to `total_steps`, and saves so that a run killed at any moment continues from its last checkpoint.

    At the end of a period it saves first and then evaluates. Until the evaluation is finished, the checkpoint's
    metadata have "evaluation_due"; its metrics are added afterwards. If an evaluation fails between two saves, the
    steps are saved in the same way. Told to stop (see `preemption`), it finishes the step and saves; a running
    evaluation is aborted.

    Args:
      mesh: the mesh of the training.
      state: the state to start from; donated.
      train_step: see `make_train_step`.
      next_batch: returns this process's share of the next batch (see `partitioning.put_rows`), at the position of
        `state`; texts that a model writes itself depend on the state.
      data_state: returns the position of the data.
      total_steps: total number of steps, including those before a resumption.
      periods: periods of logging, evaluation and saving.
      evaluate: called with the state and its step; its metrics go into the checkpoint, if one is saved at this step.
      checkpoints: where to save.
      metadata: metadata of every checkpoint; "step" and "metrics" are added.
      writer: gets the training metrics, in folder "train", and the shares of time, in "goodput".
      judge: judge of bad steps; its memory goes into every checkpoint's metadata.
      goodput: counts the time.
      description: title of the progress bar.
      evaluation_due: begin with the evaluation of `state` that an earlier run did not finish.
      hang_timeout: seconds; a step after the first that takes longer, including its batch, ends the process with exit
        code 1 and a stack trace of every thread on standard error.
      check_folder: raises an error if the run's folder has been removed.

    Returns:
      The state after the last step.

    Raises:
      SystemExit: it was told to stop, and has saved.
      UserError: too many bad steps.
    """

    def save(step: int, state: TrainState, due: bool) -> None:
        noted = {**metadata, "step": step, "metrics": {}, **judge.memory()} | ({"evaluation_due": True} if due else {})
        with goodput.spent("checkpoint"):
            checkpoints.save(step, state, data_state(), noted)

    start = int(state.step)
    shown = jax.process_index() == 0
    with StopSignals() as stop, jax.set_mesh(mesh), Progress(total_steps, start, description, shown=shown) as progress:
        if evaluation_due and periods.eval is not None:
            with progress.paused("evaluating …"):
                results = stop.attempt(lambda: evaluate(state, start))
            if results is None:
                sys.exit(stop.exit_code)
            checkpoints.add_evaluation(start, results)
        log = _Log(writer, progress, periods.log, judge, goodput)
        goodput.started()
        for step in range(start + 1, total_steps + 1):
            first = step == start + 1
            with _watched(None if first else hang_timeout):
                asked = time.monotonic()
                batch = next_batch(state)
                on_devices = partitioning.put_rows(mesh, batch)
                if not log.is_running:
                    goodput.add("input", time.monotonic() - asked)
                with _compiling(goodput) if first else contextlib.nullcontext():
                    state, metrics = train_step(state, on_devices, judge.limit)
                log.add(step, metrics, batch)
            last = step == total_steps
            stopping = stop.reached(step)
            evals = periods.eval is not None and (last or step % periods.eval == 0)
            saves = last or stopping or step % periods.save == 0
            if step % periods.log == 0 or evals or saves:
                check_folder()
            if not (evals or saves):
                continue
            if last or stopping:
                log.finish(step)
            with log.paused():
                if saves:
                    save(step, state, due=evals)
                results = None
                if evals:
                    try:
                        with goodput.spent("evaluation"), progress.paused("evaluating …"):
                            results = stop.attempt(lambda: evaluate(state, step))  # noqa: B023  (called at once)
                    except Exception:
                        logger.warning("the evaluation of step %d failed: the same command begins with it again", step)
                        raise
                    finally:
                        if results is None and not saves:
                            save(step, state, due=True)
                    if results is not None and saves:
                        with goodput.spent("checkpoint"):
                            checkpoints.add_evaluation(step, results)
            if (evals and results is None) or (stopping and not last):
                with goodput.spent("checkpoint"):
                    checkpoints.wait()
                sys.exit(stop.exit_code)
        with goodput.spent("checkpoint"):
            checkpoints.wait()
        check_folder()
    return state
