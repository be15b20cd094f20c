"""Numbers that change from one rollout of on-policy training to the next."""

import dataclasses
import math
from typing import Literal

from diffusion_t5x.errors import UserError, check_choices


@dataclasses.dataclass(frozen=True)
class Ramp:
    """A number that goes from `start` to `end` over the first `num_rollouts` rollouts, and stays there.

    The first rollout has already taken one step of the way, and rollout `num_rollouts` is the first at `end`: OPDLM's
    code counts its "RL steps" from 1 (github.com/divelab/OPDLM at 3bb8bf6, rl.py, `_get_scheduled_max_token`).

    Attributes:
      start: the number before the first rollout.
      end: the number from rollout `num_rollouts` on.
      num_rollouts: number of rollouts; 0 starts at the end.
      shape: the share of the way after a share p of the rollouts. "cos": 1 - cos(p pi / 2), slow at first. "sin":
        sin(p pi / 2), fast at first. "linear": p.
    """

    start: float
    end: float
    num_rollouts: int = 100
    shape: Literal["cos", "sin", "linear"] = "cos"

    def __post_init__(self) -> None:
        check_choices(self)
        if self.num_rollouts < 0:
            raise UserError(f"Ramp.num_rollouts must not be negative; got {self.num_rollouts}.")

    def at(self, rollout: int) -> float:
        """Returns the number for this rollout, counted from 0."""
        part = min((rollout + 1) / self.num_rollouts, 1.0) if self.num_rollouts else 1.0
        if part == 1:
            return self.end
        way = {"cos": 1 - math.cos(part * math.pi / 2), "sin": math.sin(part * math.pi / 2), "linear": part}[self.shape]
        return self.start + way * (self.end - self.start)
