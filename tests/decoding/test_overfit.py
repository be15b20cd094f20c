"""Eight examples learnt by heart are written without an error, by either kind of model."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny
from whole_rollouts import make_rollout_step

from diffusion_t5x.decoding.autoregressive import AutoregressiveDecoder
from diffusion_t5x.decoding.block import BlockDecoder
from diffusion_t5x.decoding.masked import MaskedDecoder
from diffusion_t5x.decoding.sundae import SundaeDecoder
from diffusion_t5x.objectives.autoregressive import Autoregressive
from diffusion_t5x.objectives.block import Block
from diffusion_t5x.objectives.distillation import Distillation
from diffusion_t5x.objectives.masked import Masked
from diffusion_t5x.objectives.sundae import Sundae
from diffusion_t5x.training.step import loss_and_gradients

CANVAS = 7


def examples():
    """Inputs of 2 to 5 tokens; targets of 2 to 6 tokens, EOS, and pad up to the end of the canvas."""
    rng = np.random.default_rng(0)
    for number in range(8):
        inputs, targets = tiny.random_example(rng, 2 + number % 4, 2 + number % 5)
        yield inputs, [*targets, 1] + [0] * (CANVAS - 1 - len(targets))


SUNDAE = SundaeDecoder(num_steps=4, num_samples=1)
MASKED = MaskedDecoder(num_steps=4), MaskedDecoder(num_steps=None, threshold=0.9)
DECODER_ONLY, ENCODER_DECODER = tiny.RELATIVE, tiny.ENCODER_DECODER


@pytest.mark.parametrize(
    "config,objective,decoders,steps",
    [
        (DECODER_ONLY, Autoregressive(), [AutoregressiveDecoder()], 200),
        pytest.param(DECODER_ONLY, Sundae(), [SundaeDecoder()], 800, marks=pytest.mark.slow),
        pytest.param(DECODER_ONLY, Masked(), MASKED, 800, marks=pytest.mark.slow),
        pytest.param(ENCODER_DECODER, Masked(), MASKED, 1600, marks=pytest.mark.slow),
        pytest.param(
            DECODER_ONLY, Block(3), [BlockDecoder(3, decoder) for decoder in MASKED], 800, marks=pytest.mark.slow
        ),
        pytest.param(
            *(DECODER_ONLY, Block(3, noise="uniform", weighting="uniform"), [BlockDecoder(3, SUNDAE)], 800),
            marks=pytest.mark.slow,
        ),
    ],
    ids=["autoregressive", "sundae", "masked", "masked encoder_decoder", "block", "uniform block"],
)
def test_eight_examples_are_learnt_by_heart(config, objective, decoders, steps):
    definition, params = tiny.make_model(config)
    rows = [[example] for example in examples()]
    batch = tiny.pack_apart(rows, 5, CANVAS) if config is ENCODER_DECODER else tiny.pack(rows, 5 + CANVAS)
    optimizer = optax.adam(optax.cosine_decay_schedule(1e-2, steps))

    def step(carry, key):
        params, opt_state = carry
        sums, grads = loss_and_gradients(definition, objective.loss, params, batch, key)
        updates, opt_state = optimizer.update(grads, opt_state)
        return (optax.apply_updates(params, updates), opt_state), sums.loss.mean()

    @jax.jit
    def learn(params):
        keys = jax.random.split(jax.random.key(0), steps)
        (params, _), losses = jax.lax.scan(step, (params, optimizer.init(params)), keys)
        return params, losses, objective.loss(definition.bind(params), batch, jax.random.key(1), train=False)

    params, losses, sums = learn(params)
    assert losses[0] > 10 * losses[-10:].mean()
    accuracies = [float(ratio.mean()) for name, ratio in sums.metrics.items() if name.startswith("accuracy")]
    assert accuracies and min(accuracies) > 0.95  # noise may leave too little to tell examples apart

    empty = batch.replace(tokens=jnp.where(batch.target_mask, 5, batch.tokens))
    for decoder in decoders:
        decoded = jax.jit(lambda p: decoder.decode(definition.bind(p), empty, jax.random.key(2)))(params)  # noqa: B023
        np.testing.assert_array_equal(decoded.tokens, batch.tokens)


@pytest.mark.slow
def test_a_teacher_that_knows_them_by_heart_hands_them_on():
    """On-policy: the student, from other parameters, only ever reads inputs and its own texts."""
    definition, params = tiny.make_model(DECODER_ONLY)
    batch = tiny.pack([[example] for example in examples()], 5 + CANVAS)
    decoders = [BlockDecoder(3, decoder) for decoder in MASKED]
    empty = batch.replace(tokens=jnp.where(batch.target_mask, 5, batch.tokens))
    write = make_rollout_step(definition, BlockDecoder(3, MaskedDecoder(num_steps=3, temperature=1.0)))

    def train(params, loss_of_step, steps):
        optimizer = optax.adam(optax.cosine_decay_schedule(1e-2, steps))

        def step(carry, number):
            params, opt_state = carry
            loss, batch = loss_of_step(params, number)
            _, grads = loss_and_gradients(definition, loss, params, batch, jax.random.key(number))
            updates, opt_state = optimizer.update(grads, opt_state)
            return (optax.apply_updates(params, updates), opt_state), None

        return jax.lax.scan(step, (params, optimizer.init(params)), jnp.arange(steps))[0][0]

    @jax.jit
    def learn(params, teacher):
        teacher = train(teacher, lambda *_: (Autoregressive().loss, batch), 200)
        loss = functools.partial(Distillation(3, score_end=True).loss, teacher=definition.bind(teacher))
        return train(params, lambda params, number: (loss, write(params, empty, number)), 800)

    student = learn(tiny.random_params(definition, 1), params)
    for decoder in decoders:
        decoded = jax.jit(lambda p: decoder.decode(definition.bind(p), empty, jax.random.key(2)))(student)  # noqa: B023
        np.testing.assert_array_equal(decoded.tokens, batch.tokens)
