"""The signatures of models, objectives and decoders state shapes and dtypes, and in the tests a call that has others
fails."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from jaxtyping import TypeCheckError
from my_objective import MaskPredict

from diffusion_t5x.data.ends import text_of
from diffusion_t5x.decoding.canvas import Canvas, Written
from diffusion_t5x.decoding.masked import MaskedDecoder
from diffusion_t5x.models.masks import CAUSAL, Slots
from diffusion_t5x.models.readout import score
from diffusion_t5x.models.sampling import uniform
from diffusion_t5x.objectives.distillation import divergence
from diffusion_t5x.objectives.masked import Masked
from diffusion_t5x.objectives.objective import normalized

BATCH = tiny.one_a_row([([3, 4], [5, 6, 7]), ([8], [9, 10])])  # two rows of five slots
SLOTS = Slots.of(BATCH)
KEY = jax.random.key(0)
DEFINITION = tiny.ModelDefinition(dataclasses.replace(tiny.RELATIVE, num_layers=1), tiny.VOCABULARY)
PARAMS = DEFINITION.abstract()
TABLE = tiny.TableModel(jnp.zeros((32, 32)))
CANVAS = Canvas.start(jnp.asarray(BATCH.tokens), jnp.asarray(BATCH.target_mask))
ZEROS = jnp.zeros(BATCH.tokens.shape)
WRITTEN = Written(tokens=CANVAS.tokens, mask=CANVAS.target_mask, log_probability=ZEROS, score=ZEROS[:, 0])


class FirstSlot(tiny.TableModel):
    """Returns what belongs to the first slot alone."""

    def map_logits(self, fn, hidden, *per_position):
        return jax.tree.map(lambda x: x[:, :1], super().map_logits(fn, hidden, *per_position))


def model(tokens, slots=SLOTS, dropout_keys=None):
    """The shapes of the model's output."""
    return jax.eval_shape(
        lambda params: DEFINITION.bind(params)(tokens, slots, CAUSAL, dropout_keys=dropout_keys), PARAMS
    )


def write(eligible):
    hidden = jnp.zeros((*BATCH.tokens.shape, 32))
    return MaskedDecoder().write(TABLE, hidden, CANVAS, eligible, BATCH.positions, jax.random.split(KEY, 2))


# A function, an argument that it takes, and some that it does not.
CALLS = {
    "a model's tokens": (model, BATCH.tokens, [BATCH.tokens[0], BATCH.tokens.astype(np.float32)]),
    "a model's slots": (
        lambda slots: model(BATCH.tokens, slots),
        SLOTS,
        [SLOTS.replace(positions=SLOTS.positions[:, 1:]), SLOTS.replace(is_input=SLOTS.positions)],
    ),
    "a model's keys": (
        lambda keys: model(BATCH.tokens, dropout_keys=keys),
        jax.random.split(KEY, 2),
        [jax.random.split(KEY, 3), jax.random.PRNGKey(0)],
    ),
    "draws": (lambda keys: uniform(keys, BATCH.positions), jax.random.split(KEY, 2), [jax.random.split(KEY, 1), KEY]),
    "a batch": (
        lambda batch: text_of(batch, tiny.VOCABULARY),
        BATCH,
        [BATCH.replace(target_mask=BATCH.target_mask[:1]), BATCH.replace(written_at=BATCH.example_ids)],
    ),
    "a summed loss": (lambda loss: normalized(BATCH, loss, "sequences"), ZEROS, [ZEROS[0], ZEROS[..., None]]),
    "a divergence": (
        lambda student: divergence(jnp.zeros((2, 5, 7)), student),
        jnp.zeros((2, 5, 7)),
        [jnp.zeros((2, 5, 6)), jnp.zeros((2, 1, 7)), jnp.zeros((2, 5, 7), jnp.int32)],
    ),
    "an objective's key": (lambda key: Masked().loss(TABLE, BATCH, key), KEY, [jax.random.split(KEY, 2)]),
    "an objective of one's own": (
        lambda key: MaskPredict().corrupt(tiny.VOCABULARY, BATCH, key),
        KEY,
        [jax.random.PRNGKey(0)],
    ),
    "a step's positions": (write, CANVAS.target_mask, [CANVAS.tokens, CANVAS.target_mask[:, 1:]]),
    "a step's output": (
        lambda score: CANVAS.after(WRITTEN.replace(score=score), jnp.ones(2, bool)),
        ZEROS[:, 0],
        [ZEROS, jnp.float32(0), jnp.zeros(2, jnp.int32)],
    ),
    "what a function returns": (
        lambda model: score(model, ZEROS[..., None] + jnp.zeros(32), BATCH.tokens),
        TABLE,
        [FirstSlot(TABLE.table)],
    ),
}


@pytest.mark.parametrize("name", CALLS)
def test_a_wrong_array_raises(name):
    call, right, wrong = CALLS[name]
    call(right)
    for value in wrong:
        with pytest.raises(TypeCheckError):
            call(value)
