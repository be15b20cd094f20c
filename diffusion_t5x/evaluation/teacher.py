"""What another model, an autoregressive teacher, says of texts."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from diffusion_t5x import partitioning
from diffusion_t5x.data.batch import Batch
from diffusion_t5x.models.sampling import forbid
from diffusion_t5x.models.transformer import Params
from diffusion_t5x.objectives.autoregressive import Autoregressive, shifted_slots
from diffusion_t5x.objectives.distillation import Teacher
from diffusion_t5x.objectives.objective import after_end

Judge = Callable[[Batch], dict[str, jax.Array]]


def make_judge(mesh: Mesh, teacher: Teacher) -> Judge:
    """The function `batch -> sums`, jitted, over each row's targets up to the token that ends them, `[B]` each.

    "teacher_nll": the negative log-likelihood in nats under the teacher, each token given those before it.
    "teacher_agreement": how many of the tokens are the teacher's likeliest.
    """
    definition, autoregressive = teacher.definition, Autoregressive()

    def judge(params: Params, batch: Batch) -> dict[str, jax.Array]:
        model = definition.bind(params)
        read = autoregressive.model_inputs(definition.vocabulary, batch, None)
        hidden = model(read, shifted_slots(batch), autoregressive.attention, model.encode(batch))

        def read_out(logits, labels):
            log_p = jax.nn.log_softmax(forbid(logits, definition.vocabulary))
            nll = -jnp.take_along_axis(log_p, labels[..., None], axis=-1)[..., 0]
            return nll, jnp.argmax(log_p, axis=-1) == labels

        nll, agree = model.map_logits(read_out, hidden, batch.tokens)
        text = batch.target_mask & ~after_end(batch.tokens, batch, definition.vocabulary)
        return {
            "teacher_nll": jnp.sum(jnp.where(text, nll, 0), axis=-1),
            "teacher_agreement": jnp.sum(text & agree, axis=-1),
        }

    jitted = jax.jit(judge, out_shardings=partitioning.replicated(mesh))
    return lambda batch: jitted(teacher.params, batch)
