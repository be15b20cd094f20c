"""Judges the texts of rollouts on the host, while the devices train on those that are judged already."""

import collections
import dataclasses
import logging
import threading
import time
from collections.abc import Iterable, Mapping
from types import TracebackType
from typing import Self

import jax
import numpy as np
from jaxtyping import Bool

from diffusion_t5x.data.batch import Batch
from diffusion_t5x.data.examples import Example
from diffusion_t5x.training.metrics import Writer
from diffusion_t5x.training.rewards import Grader

logger = logging.getLogger(__name__)


@dataclasses.dataclass(eq=False)
class Written:
    """A training batch of texts that the model wrote.

    Attributes:
      texts: numpy, the rows of all processes; with advantages once they are judged.
      in_text: which tokens are of a text, up to its end.
      examples: of the rows whose prompts this process read, by index; None: there is nothing to judge, or no more.
    """

    texts: Batch
    in_text: Bool[np.ndarray, "batch length"] | None = None
    examples: Mapping[int, Example] | None = None


class Judging:
    """The texts that wait for their rewards, in the order in which they are trained on: no result depends on time.

    Args:
      grader: judges them.
      writer: gets the metrics of each rollout when all of it is judged, in folder "rollout".
      num_batches: training batches of a rollout.
    """

    def __init__(self, grader: Grader, writer: Writer | None, num_batches: int):
        self._grader, self._writer, self._num_batches = grader, writer, num_batches
        self._waiting: collections.deque[Written] = collections.deque()
        self._metrics: list[dict[str, float]] = []

    @property
    def num_waiting(self) -> int:
        """Number of batches that wait."""
        return len(self._waiting)

    def add(self, batches: Iterable[Written]) -> None:
        self._waiting.extend(batches)

    def judge_next(self, step: int, running: jax.Array | None) -> None:
        """Judges the first of the batches that wait; all processes must call it at the same time.

        Args:
          step: the number of the training step that takes the next batch, from 1, for the metrics.
          running: a result of what the devices compute meanwhile; None: nothing.
        """
        batch = self._waiting.popleft()
        assert batch.in_text is not None and batch.examples is not None
        with _Idle(running) as idle:
            batch.texts, metrics = self._grader.grade(batch.texts, batch.in_text, batch.examples)
        batch.in_text = batch.examples = None
        self._metrics.append(metrics | {"reward_wait_seconds": idle.seconds})
        if len(self._metrics) == self._num_batches:
            self._write(step)

    def _write(self, step: int) -> None:
        """Writes a rollout's metrics: means over its batches, and sums of seconds."""
        found = {name: [metrics[name] for metrics in self._metrics] for name in self._metrics[0]}
        whole = {name: float(sum(x) if name.endswith("seconds") else np.mean(x)) for name, x in found.items()}
        self._metrics = []
        logger.info("rollout: %s", ", ".join(f"{name} {value:.3g}" for name, value in whole.items()))
        if self._writer is not None:
            self._writer.write(step, "rollout", whole)


class _Idle:
    """Context that measures how long the devices have nothing to do in it.

    Attributes:
      seconds: the time in which `running` was ready, to a millisecond; known at the end.

    Args:
      running: a result of the last thing that they were given to compute; None: it is ready.
    """

    def __init__(self, running: jax.Array | None):
        self._running, self._over = running, threading.Event()
        self.seconds = 0.0

    def __enter__(self) -> Self:
        self._thread = threading.Thread(target=self._count)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over.set()
        self._thread.join()

    def _count(self) -> None:
        # JAX's arrays have it, though their type does not say so.
        while self._running is not None and not self._running.is_ready():  # type: ignore[attr-defined]
            if self._over.wait(0.001):
                return
        start = time.monotonic()
        self._over.wait()
        self.seconds = time.monotonic() - start
