"""The loss on an evaluation set."""

import itertools
from collections.abc import Callable, Iterable

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from diffusion_t5x import partitioning
from diffusion_t5x.data.batch import Batch
from diffusion_t5x.errors import UserError
from diffusion_t5x.models.transformer import Params
from diffusion_t5x.objectives.objective import LossSums
from diffusion_t5x.training.step import means


def evaluate_loss(
    loss_step: Callable[[Params, Batch], LossSums],
    params: Params,
    batches: Iterable[Batch],
    mesh: Mesh,
    num_batches: int | None = None,
) -> dict[str, float]:
    """Returns the loss and metrics of an objective over batches: sums over all of them, divided once.

    With `num_batches`, at most this many are read.
    """
    total = None
    for batch in itertools.islice(batches, num_batches):
        with jax.set_mesh(mesh):
            sums = loss_step(params, partitioning.put_batch(mesh, batch))
        total = sums if total is None else jax.tree.map(jnp.add, total, sums)
    if total is None:
        raise UserError("The evaluation set is empty: there is no loss to measure.")
    return {name: float(value) for name, value in jax.device_get(means(total)).items()}
