"""Policy gradients of autoregressive models against enumeration: every text of a vocabulary of four words."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from whole_rollouts import make_rollout_step

from diffusion_t5x.decoding.autoregressive import AutoregressiveDecoder
from diffusion_t5x.errors import UserError
from diffusion_t5x.models.masks import CAUSAL
from diffusion_t5x.models.reading import shift_right, shifted_slots
from diffusion_t5x.models.sampling import forbid
from diffusion_t5x.objectives.autoregressive_policy_gradient import AutoregressivePolicyGradient

EOS, WORDS, LENGTH = 1, (1, 2, 3, 4), 3
VOCABULARY = dataclasses.replace(tiny.VOCABULARY, size=7, mask_id=6, noise_ranges=((1, 5),), noise_only=True)
INPUTS, KEY = (5, 5, 3), jax.random.key(1)


@functools.cache
def make_model():
    definition = dataclasses.replace(
        tiny.make_model(dataclasses.replace(tiny.LLAMA, num_layers=1))[0], vocabulary=VOCABULARY
    )
    return definition, tiny.random_params(definition, 3)


def all_texts():
    """Every text of at most three tokens; one that is shorter ends in EOS."""
    found = [text for n in (1, 2) for text in itertools.product(WORDS[1:], repeat=n - 1)]
    return [(*text, EOS) for text in found] + [
        (*text, word) for text in itertools.product(WORDS[1:], repeat=LENGTH - 1) for word in WORDS
    ]


def log_probabilities(params, batch):
    definition, _ = make_model()
    model = definition.bind(params)
    read = shift_right(batch.tokens, batch.positions, VOCABULARY.start_id)
    logits = forbid(model.logits(model(read, shifted_slots(batch, VOCABULARY), CAUSAL).hidden), VOCABULARY)
    each = jnp.take_along_axis(jax.nn.log_softmax(logits), batch.tokens[..., None], axis=-1)[..., 0]
    return jnp.where(batch.target_mask, each, 0)


@functools.cache
def program(objective):
    """The jitted `(params, batch, start) -> (gradient of the loss's numerator, sums)`."""
    definition, _ = make_model()

    def loss(params, batch, start):
        sums = objective.loss(definition.bind(params), batch, KEY, teacher=definition.bind(start))
        return sums.loss.numerator, sums

    return jax.jit(jax.grad(loss, has_aux=True))


def flat(tree):
    return np.concatenate([np.ravel(x) for x in jax.tree.leaves(tree)])


@pytest.mark.slow
def test_the_gradient_is_that_of_the_expected_reward():
    """Each text counts with its probability; the divergence and the entropy are those of texts, by the chain rule."""
    definition, params = make_model()
    texts, start = all_texts(), tiny.random_params(make_model()[0], 4)
    rewards = jnp.asarray([1.5 * (text[0] == 3) + (text[-1] == EOS) - 0.5 * len(text) for text in texts])
    batch = tiny.one_a_row([(INPUTS, text) for text in texts], length=len(INPUTS) + LENGTH)

    @jax.jit
    def expected(params):
        each = log_probabilities(params, batch)
        return jnp.sum(jnp.exp(each.sum(axis=1)) * rewards), each

    gradient, each = jax.jit(jax.grad(expected, has_aux=True))(params)
    p = np.exp(each.sum(axis=1))
    assert p.sum() == pytest.approx(1, abs=1e-5)
    batch = batch.replace(
        written_at=np.where(batch.target_mask, batch.positions, -1),
        written_log_probability=np.asarray(each),
        advantage=np.asarray(p * rewards),
    )
    found, sums = program(AutoregressivePolicyGradient())(params, batch, start)
    np.testing.assert_allclose(-flat(found), flat(gradient), atol=2e-5)
    assert np.abs(flat(gradient)).max() > 0.05
    np.testing.assert_allclose(sums.metrics["ratio"].mean(), 1, atol=1e-5)
    assert sums.loss.denominator == batch.tokens.size and sums.metrics["clip_fraction"].mean() == 0

    held = AutoregressivePolicyGradient(kl_weight=0.5, entropy_weight=0.25)
    # Of one row at a time, the metrics' numerators are those of its text.
    one = jax.jit(
        jax.vmap(
            lambda row: held.loss(
                definition.bind(params), jax.tree.map(lambda x: x[None], row), KEY, teacher=definition.bind(start)
            )
        )
    )(batch)
    log_q = log_probabilities(start, batch).sum(axis=1)
    divergence, entropy = np.sum(p * (np.log(p) - log_q)), -np.sum(p * np.log(p))
    np.testing.assert_allclose(np.sum(p * one.metrics["kl_from_start"].numerator), divergence, rtol=1e-4)
    np.testing.assert_allclose(np.sum(p * one.metrics["entropy"].numerator), entropy, rtol=1e-4)
    rest = one.loss.numerator + jnp.sum(batch.target_mask, axis=1) * batch.advantage
    np.testing.assert_allclose(
        rest, 0.5 * one.metrics["kl_from_start"].numerator - 0.25 * one.metrics["entropy"].numerator, atol=1e-4
    )


@pytest.mark.slow
def test_ratios_are_one_to_the_model_that_wrote_the_texts():
    """By a cache, token by token, and here in one pass; what comes after the end of a text is no part of it."""
    definition, params = make_model()
    prompts = tiny.one_a_row([(INPUTS, [0] * 5), (INPUTS[:2], [0] * 5)] * 8)
    write = make_rollout_step(definition, AutoregressiveDecoder(temperature=1.0))
    texts = jax.device_get(write(params, prompts, 0)).replace(advantage=np.linspace(-1, 1, 16, dtype=np.float32))
    written, ends = texts.written_at >= 0, (texts.tokens == EOS).any(axis=1)
    assert (written == texts.target_mask).all() and 0 < ends.sum() < 16
    assert (texts.tokens[ends][written[ends]] == EOS).sum() == ends.sum()  # the last token of each
    assert (texts.written_log_probability[written] < 0).all() and not texts.written_log_probability[~written].any()
    gradient, sums = program(AutoregressivePolicyGradient())(params, texts, params)
    assert sums.metrics["ratio"].denominator == written.sum()
    np.testing.assert_allclose(sums.metrics["ratio"].mean(), 1, atol=1e-5)
    np.testing.assert_allclose(sums.metrics["kl_from_writer"].mean(), 0, atol=1e-6)
    np.testing.assert_allclose(sums.loss.numerator, -(written * texts.advantage[:, None]).sum(), rtol=1e-4)
    padding = np.where(texts.segment_ids > 0, texts.tokens, 4)
    again, _ = program(AutoregressivePolicyGradient())(params, texts.replace(tokens=padding), params)
    np.testing.assert_allclose(flat(again), flat(gradient), atol=1e-6)


def test_mistakes():
    definition, params = make_model()
    batch = tiny.one_a_row([(INPUTS, (2, 3))])
    with pytest.raises(UserError, match="a reward judged"):
        AutoregressivePolicyGradient().loss(definition.bind(params), batch, KEY)
    for wrong, message in (({"clip": (0.0, 0.2)}, "clip"), ({"entropy_weight": -1.0}, "entropy_weight")):
        with pytest.raises(UserError, match=message):
            AutoregressivePolicyGradient(**wrong)
    for decoder, draws in ((AutoregressiveDecoder(), False), (AutoregressiveDecoder(temperature=1.0), True)):
        assert decoder.samples_model == draws
    assert not AutoregressiveDecoder(temperature=1.0, top_p=0.9).samples_model
