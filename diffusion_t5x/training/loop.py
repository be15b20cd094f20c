"""The training loop. It needs no TensorFlow: batches come from any iterator that has a position."""

import contextlib
import dataclasses
import faulthandler
import logging
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple, Protocol

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


class Batches(Protocol):
    """This process's share of each training batch, with a position in the data."""

    def next_batch(self, state: TrainState) -> Batch:
        """Returns the next batch, numpy (see `partitioning.put_rows`); on-policy texts depend on the state."""

    def state_dict(self) -> Mapping[str, np.ndarray]: ...


@dataclasses.dataclass(frozen=True)
class Periods:
    """Numbers of steps between events; each event also happens at the last step.

    Attributes:
      log: steps between writing metrics, averaged since the last time.
      eval: steps between evaluations; None never evaluates.
      save: steps between checkpoints.
      eval_start: also evaluate what the run starts from, as step 0, to see what training made of it.
    """

    log: int = 10
    eval: int | None = 1000
    save: int = 1000
    eval_start: bool = False

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


class _Due(NamedTuple):
    """The events after a step."""

    stops: bool
    evaluates: bool
    saves: bool


@dataclasses.dataclass(frozen=True)
class Saving:
    """The checkpoints of a run, and what they contain besides the state and the data position.

    Attributes:
      checkpoints: where to save.
      metadata: metadata of every checkpoint; "step", "metrics" and the judge's memory are added.
      check_folder: raises an error if the run's folder has been removed.
    """

    checkpoints: Checkpoints
    metadata: Mapping[str, Any]
    check_folder: Callable[[], None] = lambda: None


@dataclasses.dataclass(frozen=True)
class Reporting:
    """The observers of a run.

    Attributes:
      writer: gets the training metrics, in folder "train", and the shares of time, in "goodput".
      judge: judge of bad steps; its memory goes into every checkpoint's metadata.
      goodput: counts the time.
      description: title of the progress bar.
      hang_timeout: seconds; a step after the first that takes longer, including its batch, ends the process with exit
        code 1 and a stack trace of every thread on standard error. None waits forever.
    """

    writer: Writer
    judge: Judge
    goodput: Goodput
    description: str = "train"
    hang_timeout: float | None = None


@dataclasses.dataclass(frozen=True)
class TrainLoop:
    """Trains up to `total_steps`, and saves so that a run killed at any moment continues from its last checkpoint.

    At the end of a period it saves first and then evaluates. Until the evaluation is finished, the checkpoint's
    metadata have "evaluation_due"; its metrics are added afterwards. If an evaluation fails between two saves, the
    steps are saved in the same way. Told to stop (see `preemption`), it finishes the step and saves; a running
    evaluation is aborted.

    Attributes:
      mesh: the mesh of the training.
      train_step: see `make_train_step`. It must not move data between host and devices implicitly.
      batches: the batches, at the position of the state.
      evaluate: called with the state and its step; its metrics go into the checkpoint, if one is saved at this step.
      total_steps: total number of steps, including those before a resumption.
      periods: periods of logging, evaluation and saving.
      saving: the checkpoints.
      reporting: the observers.
    """

    mesh: Mesh
    train_step: Callable[[TrainState, Batch, jax.Array], tuple[TrainState, Metrics]]
    batches: Batches
    evaluate: Callable[[TrainState, int], Mapping[str, float]]
    total_steps: int
    periods: Periods
    saving: Saving
    reporting: Reporting

    def run(self, state: TrainState, evaluation_due: bool = False) -> TrainState:
        """Returns the state after the last step.

        Args:
          state: the state to start from; donated.
          evaluation_due: begin with the evaluation of `state` that an earlier run did not finish.

        Raises:
          SystemExit: it was told to stop, and has saved.
          UserError: too many bad steps.
        """
        start, checkpoints, watched = int(state.step), self.saving.checkpoints, self.reporting
        progress = Progress(self.total_steps, start, watched.description, shown=jax.process_index() == 0)
        with StopSignals() as stop, jax.set_mesh(self.mesh), progress:

            def evaluated(state: TrainState, step: int) -> Mapping[str, float] | None:
                with progress.paused("evaluating …"):
                    return stop.attempt(lambda: self.evaluate(state, step))

            at_start = self.periods.eval_start and start == 0
            if (evaluation_due or at_start) and self.periods.eval is not None:
                results = evaluated(state, start)
                if results is None:
                    sys.exit(stop.exit_code)
                if evaluation_due:
                    checkpoints.add_evaluation(start, results)
            log = _Log(watched.writer, progress, self.periods.log, watched.judge, watched.goodput)
            watched.goodput.started()
            for step in range(start + 1, self.total_steps + 1):
                state = self._step(step, state, log, first=step == start + 1)
                due = self._due(step, stop.reached(step))
                if step % self.periods.log == 0 or due.evaluates or due.saves:
                    self.saving.check_folder()
                if not (due.evaluates or due.saves):
                    continue
                if due.stops:
                    log.finish(step)
                with log.paused():
                    is_whole = self._save_and_evaluate(step, state, due, evaluated)
                if not is_whole or (due.stops and step < self.total_steps):
                    self._wait_for_saves()
                    sys.exit(stop.exit_code)
            self._wait_for_saves()
            self.saving.check_folder()
        return state

    def _due(self, step: int, told_to_stop: bool) -> _Due:
        stops, last = told_to_stop or step == self.total_steps, step == self.total_steps
        evaluates = self.periods.eval is not None and (last or step % self.periods.eval == 0)
        return _Due(stops, evaluates, saves=stops or step % self.periods.save == 0)

    def _step(self, step: int, state: TrainState, log: _Log, first: bool) -> TrainState:
        """Returns the state after one step, which may still be running."""
        judge, goodput = self.reporting.judge, self.reporting.goodput
        with _watched(None if first else self.reporting.hang_timeout):
            asked = time.monotonic()
            batch = self.batches.next_batch(state)
            on_devices = partitioning.put_rows(self.mesh, batch)
            limit = partitioning.put_whole(self.mesh, np.float32(judge.limit))
            if not log.is_running:
                goodput.add("input", time.monotonic() - asked)
            # An implicit transfer would make every step wait for it.
            compiling = _compiling(goodput) if first else contextlib.nullcontext()
            with compiling, jax.transfer_guard("disallow"), jax.profiler.StepTraceAnnotation("train", step_num=step):
                state, metrics = self.train_step(state, on_devices, limit)
            log.add(step, metrics, batch)
        return state

    def _save_and_evaluate(
        self,
        step: int,
        state: TrainState,
        due: _Due,
        evaluated: Callable[[TrainState, int], Mapping[str, float] | None],
    ) -> bool:
        """Saves and evaluates as due. Returns False if the evaluation was aborted; the checkpoint notes that."""
        if due.saves:
            self._save(step, state, due.evaluates)
        if not due.evaluates:
            return True
        results = None
        try:
            with self.reporting.goodput.spent("evaluation"):
                results = evaluated(state, step)
        except Exception:
            logger.warning("the evaluation of step %d failed: the same command repeats it first", step)
            raise
        finally:
            if results is None and not due.saves:
                self._save(step, state, evaluation_due=True)
        if results is not None and due.saves:
            with self.reporting.goodput.spent("checkpoint"):
                self.saving.checkpoints.add_evaluation(step, results)
        return results is not None

    def _save(self, step: int, state: TrainState, evaluation_due: bool) -> None:
        due = {"evaluation_due": True} if evaluation_due else {}
        noted = {**self.saving.metadata, "step": step, "metrics": {}, **self.reporting.judge.memory(), **due}
        with self.reporting.goodput.spent("checkpoint"):
            self.saving.checkpoints.save(step, state, self.batches.state_dict(), noted)

    def _wait_for_saves(self) -> None:
        with self.reporting.goodput.spent("checkpoint"):
            self.saving.checkpoints.wait()
