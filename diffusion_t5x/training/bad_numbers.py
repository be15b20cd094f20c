"""Handling of bad steps: a loss or gradient that is not finite, or a loss spike.

The step detects them on the device and leaves parameters, optimizer and moving average unchanged. The host reads this
with the other metrics, while the next step runs, so nothing waits.
"""

import collections
import dataclasses
import logging
import math
import os
from collections.abc import Iterable, Mapping
from typing import Literal

import jax
import numpy as np

from diffusion_t5x import records
from diffusion_t5x.data.batch import Batch
from diffusion_t5x.errors import UserError, check_choices

logger = logging.getLogger(__name__)

_FEWEST = 20  # losses, before a leap can be told from noise


@dataclasses.dataclass(frozen=True)
class BadNumbers:
    """Policy for steps with NaN, infinite or spiking loss or gradients. Their updates are never applied.

    Attributes:
      policy: "skip" continues with the next batch, "halt" stops at the first bad step.
      max_in_a_row: number of consecutive bad steps that ends the run under either policy.
      spike_factor: a loss above this multiple of the median of the last `window` good losses is bad too; None accepts
        any finite loss. Noise varies in difficulty: 3 is a small factor for a diffusion loss.
      window: number of losses to remember. They are saved in checkpoints.
    """

    policy: Literal["skip", "halt"] = "skip"
    max_in_a_row: int = 10
    spike_factor: float | None = None
    window: int = 100

    def __post_init__(self) -> None:
        check_choices(self)
        if self.max_in_a_row < 1 or self.window < _FEWEST:
            raise UserError(f"BadNumbers needs max_in_a_row of at least 1, and a window of {_FEWEST}; got {self}.")
        if self.spike_factor is not None and self.spike_factor <= 1:
            raise UserError(f"BadNumbers.spike_factor must be above 1, or None; got {self.spike_factor}.")


class Judge:
    """Counts the bad steps of a run, and ends it when there are too many.

    Args:
      rules: the policy.
      folder: gets the batch of the step that ends the run.
      losses: the last good losses of the run that this one continues.

    Attributes:
      count: number of bad steps so far.
    """

    def __init__(self, rules: BadNumbers, folder: str, losses: Iterable[float] = ()):
        self.count = 0
        self._rules, self._folder = rules, folder
        self._in_a_row = 0
        self._losses = collections.deque(losses, maxlen=rules.window)

    def memory(self) -> dict[str, list[float]]:
        """Returns state for a checkpoint's metadata: "losses", the last good ones."""
        return {"losses": list(self._losses)} if self._losses else {}

    @property
    def limit(self) -> float:
        """The largest loss that is not bad."""
        if self._rules.spike_factor is None or len(self._losses) < _FEWEST:
            return math.inf
        return self._rules.spike_factor * float(np.median(self._losses))

    def add(self, step: int, metrics: Mapping[str, float], batch: Batch) -> None:
        """Adds a step's results, in the order of steps.

        Raises:
          UserError: the run must end; the message says what was bad, and where the batch is saved.
        """
        if not metrics.get("bad"):
            self._in_a_row = 0
            if self._rules.spike_factor is not None:
                self._losses.append(metrics["loss"])
            return
        self.count += 1
        self._in_a_row += 1
        what = f"loss {metrics['loss']:.4g}, gradient norm {metrics['gradient_norm']:.4g}"
        if self._rules.policy == "skip" and self._in_a_row < self._rules.max_in_a_row:
            logger.warning("step %d is bad (%s): not applied. %d bad steps so far", step, what, self.count)
            return
        path = self._keep(step, batch)
        row = f", the last of {self._in_a_row} in a row" if self._in_a_row > 1 else ""
        raise UserError(
            f"Step {step} is bad{row}: {what}. None of them was applied. The batch is in {path}; the same command "
            "continues from the last checkpoint and meets the same batch again. A lower learning rate, a max_grad_norm "
            "for the optimizer or another RANDOM_SEED may help; train.train.bad_numbers sets what counts as bad and "
            "how many bad steps end the run."
        )

    def _keep(self, step: int, batch: Batch) -> str:
        process = f"_process_{jax.process_index()}" if jax.process_count() > 1 else ""
        path = os.path.join(self._folder, f"bad_step_{step}{process}.npz")
        with records.replacing(path, "wb") as file:
            np.savez(file, **{name: x for name, x in vars(batch).items() if x is not None})
        return path
