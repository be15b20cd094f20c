"""The variance of a block's loss over times drawn from parts of [0, 1] (BD3-LM, arXiv 2503.09573, section 5.3)."""

import dataclasses
import itertools
from collections.abc import Callable, Iterable, Sequence

import jax
import numpy as np
from jax.sharding import Mesh

from diffusion_t5x import partitioning
from diffusion_t5x.data.batch import Batch
from diffusion_t5x.data.dataset import Dataset
from diffusion_t5x.errors import UserError
from diffusion_t5x.models.transformer import ModelDefinition, Params
from diffusion_t5x.objectives.block import Block
from diffusion_t5x.objectives.masked import ALL_TIMES, Times, check_times
from diffusion_t5x.objectives.objective import Objective
from diffusion_t5x.shapes import AnyBoolBL, FloatBL

LossesOfTimes = Callable[[Params, Batch, Times, int], tuple[FloatBL, AnyBoolBL]]

HALVES = tuple((number / 20, number / 20 + 0.5) for number in range(11))


@dataclasses.dataclass(frozen=True)
class TimesEval:
    """A search among parts of [0, 1] for the times at which the loss of a block varies least.

    The loss keeps its weights, so it has another mean in each part, and parts that are narrow, or near 1, vary less:
    the search compares parts of one width, as BD3-LM does, and all of [0, 1].

    Attributes:
      dataset: the data set to measure on.
      num_batches: maximum number of batches; None takes all, 0 skips this evaluation.
      times: the parts, `(low, high)` each.
      num_draws: number of draws of each block's time and masks; all parts share their randomness.
      seed: seed of the draws.
    """

    dataset: Dataset
    num_batches: int | None = None
    times: Sequence[Times] = (ALL_TIMES, *HALVES)
    num_draws: int = 8
    seed: int = 0

    def __post_init__(self) -> None:
        if self.num_batches is not None and self.num_batches < 0:
            raise UserError(f"TimesEval.num_batches must be at least 0, or None for all; got {self.num_batches}.")
        if self.num_draws < 1 or not self.times:
            raise UserError(f"TimesEval needs num_draws of at least 1, and some times; got {self}.")
        for times in self.times:
            check_times(times)


def make_times_step(
    mesh: Mesh, definition: ModelDefinition, objective: Objective | None, *, seed: int
) -> LossesOfTimes:
    """Returns the jitted `(params, batch, times, draw) -> losses`, see `Block.block_losses`.

    Raises:
      UserError: the objective is not block diffusion by masks, weighted as the bound.
    """
    if not isinstance(objective, Block) or objective.noise != "mask" or objective.weighting != "elbo":
        raise UserError(
            'The search for times needs block diffusion with noise = "mask" and weighting = "elbo" '
            f"(objectives/block.gin); got {objective}."
        )

    def step(params, batch, times, draw):
        key = jax.random.fold_in(jax.random.key(seed), draw)
        return objective.block_losses(definition.bind(params), batch, key, times)

    jitted = jax.jit(step, out_shardings=partitioning.replicated(mesh))
    return lambda params, batch, times, draw: jitted(params, batch, objective.interval(times), draw)


def search_times(
    step: LossesOfTimes, params: Params, batches: Iterable[Batch], mesh: Mesh, search: TimesEval
) -> dict[str, float]:
    """Returns mean and variance of a block's loss in each part, over blocks and draws, and the part of least variance.

    Args:
      step: see `make_times_step`.
      params: the model's parameters.
      batches: of the data set.
      mesh: the mesh for the rows.
      search: the parts, and how much to measure.

    Returns:
      "mean_LOW_HIGH", in nats per token, and "variance_LOW_HIGH", its square, for each part; "times_low", "times_high".
    """
    losses: dict[Times, list[np.ndarray]] = {(low, high): [] for low, high in search.times}
    for batch in itertools.islice(batches, search.num_batches):
        with jax.set_mesh(mesh):
            placed = partitioning.put_batch(mesh, batch)
            for times, draw in itertools.product(losses, range(search.num_draws)):
                loss, starts = jax.device_get(step(params, placed, times, draw))
                losses[times].append(np.asarray(loss, np.float64)[starts])
    if not next(iter(losses.values())):
        raise UserError(f"{search.dataset.name} is empty: there is no variance to measure.")
    found: dict[str, float] = {}
    variances = {}
    for (low, high), drawn in losses.items():
        every = np.concatenate(drawn)
        variances[low, high] = float(every.var())
        found |= {
            f"mean_{low:g}_{high:g}": float(every.mean()),
            f"variance_{low:g}_{high:g}": variances[low, high],
        }
    low, high = min(variances, key=lambda times: variances[times])
    return found | {"times_low": low, "times_high": high}
