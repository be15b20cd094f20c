"""Policy gradients of SUNDAE models against the chain's transition matrix, on all canvases of two of three words."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from diffusion_t5x.decoding.sundae import SundaeDecoder
from diffusion_t5x.errors import UserError
from diffusion_t5x.models.masks import BIDIRECTIONAL, Slots
from diffusion_t5x.models.sampling import forbid
from diffusion_t5x.models.streams import stream
from diffusion_t5x.objectives.sundae_policy_gradient import SundaePolicyGradient
from diffusion_t5x.training.rollout_texts import denoised, prompts

WORDS, LENGTH, STEPS = (1, 2, 3), 2, 2
VOCABULARY = dataclasses.replace(tiny.VOCABULARY, size=6, mask_id=5, noise_ranges=((1, 4),), noise_only=True)
INPUTS, KEY = (4, 4, 3), jax.random.key(1)
CANVASES = np.array(list(itertools.product(WORDS, repeat=LENGTH)))


@functools.cache
def make_model():
    config = dataclasses.replace(tiny.LLAMA, num_layers=1)
    definition = dataclasses.replace(tiny.make_model(config)[0], vocabulary=VOCABULARY)
    return definition, tiny.random_params(definition, 3)


def rows_of(canvases):
    return tiny.one_a_row([(INPUTS, canvas) for canvas in canvases], length=len(INPUTS) + LENGTH)


def draws_of(params):
    """Log-probabilities of the draws `[canvas read, canvas drawn, place]`."""
    definition, _ = make_model()
    model, rows = definition.bind(params), rows_of(CANVASES)
    logits = forbid(model.logits(model(rows.tokens, Slots.of(rows), BIDIRECTIONAL).hidden), VOCABULARY)
    each = jax.nn.log_softmax(logits)[:, len(INPUTS) :]
    return each[:, np.arange(LENGTH), CANVASES]


def flat(tree):
    return np.concatenate([np.ravel(x) for x in jax.tree.leaves(tree)])


@functools.cache
def program(objective):
    """The jitted `(params, batch, key) -> (gradient of the loss's numerator, sums)`."""
    definition, _ = make_model()

    def loss(params, batch, key):
        sums = objective.loss(definition.bind(params), batch, key)
        return sums.loss.numerator, sums

    return jax.jit(jax.grad(loss, has_aux=True))


@functools.cache
def enumerated():
    """All chains, each with an advantage of its probability times its reward; the gradient of the expected reward."""
    _, params = make_model()
    rewards = jnp.asarray(1.5 * (CANVASES[:, 0] == 3) - 1.0 * (CANVASES[:, 0] == CANVASES[:, 1]))

    @jax.jit
    def expected(params):
        each = draws_of(params)
        transitions = jnp.exp(each.sum(axis=-1))
        return jnp.mean(transitions @ transitions @ rewards), each

    gradient, each = jax.jit(jax.grad(expected, has_aux=True))(params)
    chains = np.array(list(itertools.product(range(len(CANVASES)), repeat=STEPS + 1)))
    p = np.exp(each[chains[:, 0], chains[:, 1]].sum(axis=1) + each[chains[:, 1], chains[:, 2]].sum(axis=1))
    p /= len(CANVASES)  # the first canvas is noise
    assert p.sum() == pytest.approx(1, abs=1e-5)
    batch = rows_of(CANVASES[chains[:, -1]])
    canvases = np.stack([rows_of(CANVASES[chains[:, step]]).tokens for step in range(STEPS)], axis=1)
    log_probability = np.zeros(canvases.shape, np.float32)
    for step in range(STEPS):
        log_probability[:, step, len(INPUTS) :] = each[chains[:, step], chains[:, step + 1]]
    batch = batch.replace(
        written_at=np.where(batch.target_mask, STEPS - 1, -1),
        written_log_probability=np.zeros(batch.tokens.shape, np.float32),
        canvases=canvases,
        canvas_log_probability=log_probability,
        advantage=np.asarray(p * rewards[chains[:, -1]], np.float32),
    )
    return params, batch, gradient


@pytest.mark.slow
def test_the_gradient_is_that_of_the_expected_reward():
    params, batch, expected = enumerated()
    found, sums = program(SundaePolicyGradient(draws=STEPS))(params, batch, KEY)
    np.testing.assert_allclose(-flat(found) / STEPS, flat(expected), atol=2e-5)
    assert np.abs(flat(expected)).max() > 0.05
    np.testing.assert_allclose(sums.metrics["ratio"].mean(), 1, atol=1e-5)
    assert sums.metrics["ratio"].denominator == STEPS * batch.target_mask.sum()
    assert sums.loss.denominator == STEPS * batch.tokens.size and sums.metrics["clip_fraction"].mean() == 0


@pytest.mark.slow
def test_one_step_has_the_same_gradient_on_average_and_more_than_there_are_change_nothing():
    params, batch, expected = enumerated()
    run = program(SundaePolicyGradient(draws=1))
    draws = np.array([-flat(run(params, batch, key)[0]) for key in jax.random.split(KEY, 60)])
    errors = np.linalg.norm(draws - flat(expected), axis=1)
    assert np.linalg.norm(draws.mean(axis=0) - flat(expected)) < 3 * np.sqrt(np.mean(errors**2) / 60)
    assert errors.min() > 0.01 * np.linalg.norm(flat(expected))
    found, sums = program(SundaePolicyGradient(draws=3))(params, batch, KEY)
    np.testing.assert_allclose(-flat(found) / 3, flat(expected), atol=2e-5)
    assert sums.metrics["ratio"].denominator == STEPS * batch.target_mask.sum()


@pytest.mark.slow
@pytest.mark.parametrize("config", [dataclasses.replace(tiny.LLAMA, shifted=True), tiny.ENCODER_DECODER])
def test_ratios_are_one_to_the_model_that_wrote_the_texts(config):
    definition, params = tiny.make_model(config)
    decoder, objective = SundaeDecoder(num_steps=3, num_samples=1, temperature=1.0), SundaePolicyGradient(draws=3)
    examples = tiny.random_examples(0, [(4, 3), (2, 5)] * 4)
    apart = config.architecture == "encoder_decoder"
    data = tiny.pack_apart([[example] for example in examples], 4, 6) if apart else tiny.one_a_row(examples, length=8)
    asked = prompts(data, 4, 5, 6)

    @jax.jit
    def run(params):
        model = definition.bind(params)
        texts = denoised(decoder, model, asked, stream(KEY, "texts")).replace(advantage=jnp.linspace(-1, 1, 8))
        return texts, objective.loss(model, texts, KEY)

    texts, sums = jax.device_get(run(params))
    assert (texts.written_at[texts.target_mask] == 2).all() and texts.target_mask.sum() == 8 * 5
    assert texts.canvases.shape == (8, 3, texts.tokens.shape[1])
    given = np.broadcast_to(~texts.target_mask[:, None], texts.canvases.shape)
    assert (texts.canvases == texts.tokens[:, None])[given].all() and not texts.canvas_log_probability[given].any()
    assert (texts.canvas_log_probability[~given] < 0).all()
    assert sums.metrics["ratio"].denominator == 3 * 8 * 5
    np.testing.assert_allclose(sums.metrics["ratio"].mean(), 1, atol=1e-5)
    np.testing.assert_allclose(sums.metrics["kl_from_writer"].mean(), 0, atol=1e-6)


def test_mistakes():
    with pytest.raises(UserError, match="draws"):
        SundaePolicyGradient(draws=0)
    exact = SundaeDecoder(num_samples=1, temperature=1.0)
    assert exact.samples_model
    for other in ({"num_samples": 2}, {"temperature": 0.2}, {"update_share": 0.5}, {"stop_when_unchanged": True}):
        assert not dataclasses.replace(exact, **other).samples_model
