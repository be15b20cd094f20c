"""Policy gradients of whole canvases against enumeration: every way to write three targets of three words."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from variants import quick
from whole_rollouts import make_rollout_step

from diffusion_t5x.decoding.entropy_bounded import EntropyBoundedDecoder
from diffusion_t5x.decoding.masked import MaskedDecoder
from diffusion_t5x.errors import UserError
from diffusion_t5x.models.masks import BIDIRECTIONAL, Slots
from diffusion_t5x.models.sampling import forbid
from diffusion_t5x.objectives.masked_policy_gradient import MaskedPolicyGradient
from diffusion_t5x.training.rollout_texts import prompts

WORDS, LENGTH, STEPS = (1, 2, 3), 3, 2  # two targets in the first step, one in the second
VOCABULARY = dataclasses.replace(tiny.VOCABULARY, size=6, mask_id=5, noise_ranges=((1, 4),), noise_only=True)
INPUTS, KEY = (4, 4, 3), jax.random.key(1)
TRAJECTORIES = [
    (tokens, tuple(int(place == last) for place in range(LENGTH)))
    for tokens in itertools.product(WORDS, repeat=LENGTH)
    for last in range(LENGTH)
]


@functools.cache
def make_model():
    config = dataclasses.replace(tiny.LLAMA, num_layers=1)
    definition = dataclasses.replace(tiny.make_model(config)[0], vocabulary=VOCABULARY)
    return definition, tiny.random_params(definition, 3)


def log_probabilities(params):
    """Log-probabilities of the trajectories, and of their tokens `[trajectory, place]`."""
    states, places = {}, []
    for tokens, steps in TRAJECTORIES:
        for place, step in enumerate(steps):
            canvas = tuple(5 if at >= step else token for token, at in zip(tokens, steps, strict=True))
            places.append((states.setdefault(canvas, len(states)), len(INPUTS) + place, tokens[place]))
    rows = tiny.one_a_row([(INPUTS, state) for state in states], length=len(INPUTS) + LENGTH)
    model, (state, slot, token) = make_model()[0].bind(params), np.array(places).T
    logits = forbid(model.logits(model(rows.tokens, Slots.of(rows), BIDIRECTIONAL).hidden), VOCABULARY)
    each = jax.nn.log_softmax(logits)[state, slot, token].reshape(-1, LENGTH)
    return each.sum(axis=1) - np.log(LENGTH), each  # each place is as often the last


def flat(tree):
    return np.concatenate([np.ravel(x) for x in jax.tree.leaves(tree)])


@functools.cache
def enumerated():
    """All trajectories, each with an advantage of its probability times its reward; the expected reward's gradient."""
    _, params = make_model()
    rewards = jnp.asarray([1.5 * (tokens[0] == 3) - (tokens[0] == tokens[1]) + tokens[2] for tokens, _ in TRAJECTORIES])

    def expected(params):
        total, each = log_probabilities(params)
        return jnp.sum(jnp.exp(total) * rewards), (total, each)

    gradient, (total, each) = jax.jit(jax.grad(expected, has_aux=True))(params)
    assert jnp.sum(jnp.exp(total)) == pytest.approx(1, abs=1e-5)
    batch = tiny.one_a_row([(INPUTS, tokens) for tokens, _ in TRAJECTORIES], length=len(INPUTS) + LENGTH)
    at, log_probability = np.full(batch.tokens.shape, -1, np.int32), np.zeros(batch.tokens.shape, np.float32)
    at[:, len(INPUTS) :] = [steps for _, steps in TRAJECTORIES]
    log_probability[:, len(INPUTS) :] = each
    advantage = np.asarray(jnp.exp(total) * rewards)
    return params, batch.replace(written_at=at, written_log_probability=log_probability, advantage=advantage), gradient


@functools.cache
def program(objective):
    """The jitted `(params, batch, key) -> (gradient of the loss's numerator, sums)`."""
    definition, _ = make_model()

    def loss(params, batch, key):
        sums = objective.loss(definition.bind(params), batch, key)
        return sums.loss.numerator, sums

    return jax.jit(jax.grad(loss, has_aux=True))


def test_the_gradient_is_that_of_the_expected_reward():
    """Each trajectory counts with its probability: the sum is the mean over texts that the model writes."""
    params, batch, expected = enumerated()
    gradient, sums = program(MaskedPolicyGradient(draws=STEPS))(params, batch, KEY)
    np.testing.assert_allclose(-flat(gradient) / STEPS, flat(expected), atol=2e-5)
    assert np.abs(flat(expected)).max() > 0.05
    np.testing.assert_allclose(sums.metrics["ratio"].mean(), 1, atol=1e-5)
    assert sums.metrics["ratio"].denominator == batch.target_mask.sum()  # every token is scored once
    assert sums.loss.denominator == STEPS * batch.tokens.size and sums.metrics["clip_fraction"].mean() == 0


@pytest.mark.slow
def test_one_state_has_the_same_gradient_on_average():
    params, batch, expected = enumerated()
    run = program(MaskedPolicyGradient(draws=1))
    draws = np.array([-flat(run(params, batch, key)[0]) for key in jax.random.split(KEY, 100)])
    errors = np.linalg.norm(draws - flat(expected), axis=1)
    assert np.linalg.norm(draws.mean(axis=0) - flat(expected)) < 3 * np.sqrt(np.mean(errors**2) / 100)
    assert errors.min() > 0.01 * np.linalg.norm(flat(expected))  # each by itself is off


CONFIGS = {
    "same-position": dataclasses.replace(tiny.LLAMA, num_layers=1),
    "shifted": dataclasses.replace(tiny.LLAMA, num_layers=1, shifted=True),
    "shifted, without a start": dataclasses.replace(tiny.LLAMA, num_layers=1, shifted=True, reads_start=False),
    "encoder-decoder": tiny.ENCODER_DECODER,
}
CASES = [(name, "trajectory", None) for name in CONFIGS]
CASES += [("same-position", "trajectory", 2), ("same-position", "one_step", None), ("shifted", "coupled", None)]


@pytest.mark.parametrize(("config", "surrogate", "window"), quick(CASES, [("shifted", "trajectory", None)]))
def test_ratios_are_one_to_the_model_that_wrote_the_texts(config, surrogate, window):
    """A canvas of five targets in three steps, or by two, two and one in windows, a target a step."""
    definition, params = tiny.make_model(CONFIGS[config])
    decoder = MaskedDecoder(num_steps=3, order="random", temperature=1.0, window=window)
    steps = 5 if window else 3
    objective = MaskedPolicyGradient(surrogate, draws=steps)
    examples = tiny.random_examples(0, [(4, 3), (2, 5)] * 4)
    apart = CONFIGS[config].architecture == "encoder_decoder"
    data = tiny.pack_apart([[example] for example in examples], 4, 6) if apart else tiny.one_a_row(examples, length=8)
    write = make_rollout_step(definition, decoder, prepare=objective.prepare_rollout)

    @jax.jit
    def run(params):
        texts = write(params, prompts(data, 4, 5, 6), 0).replace(advantage=jnp.linspace(-1, 2, 8))
        return texts, objective.loss(definition.bind(params), texts, KEY)

    texts, sums = jax.device_get(run(params))
    assert texts.target_mask.sum() == 8 * 5 == sums.metrics["ratio"].denominator
    states = {"trajectory": steps, "one_step": 1, "coupled": 2}[surrogate]
    assert set(np.unique(texts.written_at[texts.target_mask])) == set(range(states))
    assert (texts.written_log_probability[texts.target_mask] < 0).all()
    assert (texts.written_at[~texts.target_mask] == -1).all()
    assert not texts.written_log_probability[~texts.target_mask].any()
    np.testing.assert_allclose(sums.metrics["ratio"].mean(), 1, atol=1e-5)
    np.testing.assert_allclose(sums.metrics["kl_from_writer"].mean(), 0, atol=1e-6)
    # The loss is that of all rows of a text: as many as there are steps.
    np.testing.assert_allclose(sums.loss.numerator, -steps * 5 * texts.advantage.sum(), rtol=1e-4)


def test_mistakes():
    for wrong, message in (
        ({"draws": 0}, "draws"),
        ({"clip": (0.0, 0.2)}, "clip"),
        ({"softmax": "all"}, "softmax"),
        ({"surrogate": "bound"}, "surrogate"),
    ):
        with pytest.raises(UserError, match=message):
            MaskedPolicyGradient(**wrong)
    for decoder in (MaskedDecoder(order="random", temperature=1.0), EntropyBoundedDecoder(temperature=1.0)):
        assert decoder.samples_model
        assert not dataclasses.replace(decoder, guidance=0.5).samples_model
    assert not MaskedPolicyGradient("one_step", softmax="all").needs_samples
