"""Scores texts with an autoregressive teacher model."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from diffusion_t5x import partitioning
from diffusion_t5x.data.batch import Batch
from diffusion_t5x.data.ends import text_of
from diffusion_t5x.models.readout import score
from diffusion_t5x.models.transformer import Params
from diffusion_t5x.objectives.autoregressive import Autoregressive
from diffusion_t5x.objectives.distillation import Teacher

Judge = Callable[[Batch], dict[str, jax.Array]]


def make_judge(mesh: Mesh, teacher: Teacher) -> Judge:
    """Returns the jitted `batch -> sums` over each row's targets up to the token that ends them, `[B]` each.

    "teacher_nll": the negative log-likelihood in nats under the teacher, each token given those before it.
    "teacher_agreement": the number of tokens that are the teacher's most likely ones.
    """
    definition = teacher.definition

    def judge(params: Params, batch: Batch) -> dict[str, jax.Array]:
        model = definition.bind(params)
        nll, agree = score(model, Autoregressive().output(model, batch).hidden, batch.tokens)
        text = text_of(batch, definition.vocabulary)
        return {
            "teacher_nll": jnp.sum(jnp.where(text, nll, 0), axis=-1),
            "teacher_agreement": jnp.sum(text & agree, axis=-1),
        }

    jitted = jax.jit(judge, out_shardings=partitioning.replicated(mesh))
    return lambda batch: jitted(teacher.params, batch)
