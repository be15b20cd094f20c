"""Policy gradients against enumeration: every text that a decoder can write, on a vocabulary of four words."""

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

from diffusion_t5x.decoding.block import BlockDecoder
from diffusion_t5x.decoding.masked import MaskedDecoder
from diffusion_t5x.errors import UserError
from diffusion_t5x.models.masks import AttentionKind, Slots
from diffusion_t5x.models.sampling import forbid
from diffusion_t5x.objectives.policy_gradient import PolicyGradient

EOS, WORDS = 1, (1, 2, 3, 4)
VOCABULARY = dataclasses.replace(tiny.VOCABULARY, size=7, mask_id=6, noise_ranges=((1, 5),), noise_only=True)
INPUTS, TARGETS, SIZE = (5, 5, 3), 3, 2  # a block of two targets and one of one
KEY = jax.random.key(1)


@functools.cache
def make_model(shifted=False):
    config = dataclasses.replace(tiny.LLAMA, num_layers=1, shifted=shifted)
    definition = dataclasses.replace(tiny.make_model(config)[0], vocabulary=VOCABULARY)
    return definition, tiny.random_params(definition, 3)


def trajectories():
    """Rows `(tokens, written_at)` of all ways to write the targets, one token a step; a text ends in its block."""
    found = []
    for first in itertools.product(WORDS, repeat=SIZE):
        for order in ((0, 1), (1, 0)):
            rest = [()] if EOS in first else [(word,) for word in WORDS]
            found += [(first + last, order + (0,) * len(last)) for last in rest]
    return found


def batch_of(written):
    rows = [(INPUTS, tokens) for tokens, _ in written]
    batch = tiny.one_a_row(rows, length=len(INPUTS) + TARGETS)
    at = np.full(batch.tokens.shape, -1, np.int32)
    for row, (_, steps) in enumerate(written):
        at[row, len(INPUTS) : len(INPUTS) + len(steps)] = steps
    return batch.replace(written_at=at)


def log_probabilities(definition, params, written):
    """Log-probabilities of trajectories, and of their tokens: each state in a row, after what is before its block."""
    states, places = {}, []
    for row, (tokens, steps) in enumerate(written):
        for place, step in enumerate(steps):
            first = place - place % SIZE
            block = [6 if steps[i] >= step else tokens[i] for i in range(first, min(first + SIZE, len(tokens)))]
            state = states.setdefault((*tokens[:first], *block), len(states))
            places.append((row, len(INPUTS) + place, state, tokens[place]))
    rows = tiny.one_a_row([(INPUTS, state) for state in states], length=len(INPUTS) + TARGETS)
    model, (row, slot, state, token) = definition.bind(params), np.array(places).T
    hidden = model(rows.tokens, Slots.of(rows), AttentionKind("block_causal", SIZE)).hidden
    found = jax.nn.log_softmax(forbid(model.logits(hidden), VOCABULARY))[state, slot, token]
    each = jnp.zeros((len(written), len(INPUTS) + TARGETS)).at[row, slot].set(found)
    return each.sum(axis=1) - np.log(2), each  # either place of the first block comes first as often


def reward(tokens):
    return 1.5 * (tokens[0] == 3) + (tokens[-1] == EOS) - 0.5 * len(tokens)


@functools.cache
def enumerated():
    """The model; all trajectories with their log-probabilities; the gradient of the expected reward."""
    definition, params = make_model()
    written = trajectories()
    rewards = jnp.asarray([reward(tokens) for tokens, _ in written])

    def expected(params):
        return jnp.sum(jnp.exp(log_probabilities(definition, params, written)[0]) * rewards)

    gradient = jax.jit(jax.grad(expected))(params)
    total, each = jax.jit(lambda params: log_probabilities(definition, params, written))(params)
    assert jnp.sum(jnp.exp(total)) == pytest.approx(1, abs=1e-5)
    batch = batch_of(written).replace(
        written_log_probability=np.asarray(each), advantage=np.asarray(jnp.exp(total) * rewards)
    )
    return definition, params, batch, gradient


@functools.cache
def program(objective, shifted=False):
    """The jitted `(params, batch, key) -> (gradient of the loss's numerator, sums)`."""
    definition, _ = make_model(shifted)

    def loss(params, batch, key):
        sums = objective.loss(definition.bind(params), batch, key)
        return sums.loss.numerator, sums

    return jax.jit(jax.grad(loss, has_aux=True))


def flat(tree):
    return np.concatenate([np.ravel(x) for x in jax.tree.leaves(tree)])


def test_the_gradient_is_that_of_the_expected_reward():
    """Each trajectory counts with its probability: the sum is the mean over texts that the model writes."""
    _, params, batch, expected = enumerated()
    gradient, sums = program(PolicyGradient(SIZE, draws=2))(params, batch, KEY)
    # The loss is that of both rows of a text: the denominator, a constant, counts them too.
    np.testing.assert_allclose(-flat(gradient) / 2, flat(expected), atol=2e-5)
    assert np.abs(flat(expected)).max() > 0.05
    np.testing.assert_allclose(sums.metrics["ratio"].mean(), 1, atol=1e-5)
    assert sums.loss.denominator == 2 * batch.tokens.size and sums.metrics["clip_fraction"].mean() == 0


def test_one_state_a_block_has_the_same_gradient_on_average():
    _, params, batch, expected = enumerated()
    run = program(PolicyGradient(SIZE, draws=1))
    draws = np.array([-flat(run(params, batch, key)[0]) for key in jax.random.split(KEY, 100)])
    errors = np.linalg.norm(draws - flat(expected), axis=1)
    assert np.linalg.norm(draws.mean(axis=0) - flat(expected)) < 3 * np.sqrt(np.mean(errors**2) / 100)
    assert errors.min() > 0.02 * np.linalg.norm(flat(expected))  # each by itself is off


def test_divergence_and_entropy_add_up_to_those_of_the_trajectories():
    """The chain rule: each way to write counts with its probability, and its tokens with those of their states."""
    definition, params, batch, _ = enumerated()
    start, objective = tiny.random_params(definition, 4), PolicyGradient(SIZE, draws=2, kl_weight=1.0)

    def metrics(row):
        row = jax.tree.map(lambda x: x[None], row)
        return objective.loss(definition.bind(params), row, KEY, teacher=definition.bind(start)).metrics

    found = jax.jit(jax.vmap(metrics))(batch)
    log_p, log_q = (log_probabilities(definition, x, trajectories())[0] for x in (params, start))
    p = jnp.exp(log_p)
    divergence = jnp.sum(p * (log_p - log_q))
    assert divergence > 0.05
    np.testing.assert_allclose(jnp.sum(p * found["kl_from_start"].numerator), divergence, rtol=1e-4)
    entropy = -jnp.sum(p * log_p) - np.log(2)  # which place comes first is no choice of the model
    np.testing.assert_allclose(jnp.sum(p * found["entropy"].numerator), entropy, rtol=1e-4)


@pytest.mark.parametrize("surrogate", quick(["trajectory", "one_step"], ["trajectory"]))
def test_without_advantages_the_loss_is_the_divergence_minus_the_entropy(surrogate):
    params, objective, texts = rollout(surrogate)
    definition, _ = make_model()
    objective = dataclasses.replace(objective, kl_weight=0.5, entropy_weight=0.25)
    texts = texts.replace(advantage=np.zeros(16, np.float32))

    @jax.jit
    def run(params, start):
        def loss(params):
            sums = objective.loss(definition.bind(params), texts, KEY, teacher=definition.bind(start))
            return sums.loss.numerator, sums

        return jax.grad(loss, has_aux=True)(params)

    _, sums = run(params, tiny.random_params(definition, 4))
    kl, entropy = sums.metrics["kl_from_start"].numerator, sums.metrics["entropy"].numerator
    assert kl > 0.1 and entropy > 0.1
    np.testing.assert_allclose(sums.loss.numerator, 2 * (0.5 * kl - 0.25 * entropy), rtol=1e-4)
    objective = dataclasses.replace(objective, entropy_weight=0.0)
    run.clear_cache()
    gradient, sums = run(params, params)
    np.testing.assert_allclose(sums.metrics["kl_from_start"].mean(), 0, atol=1e-6)
    np.testing.assert_allclose(flat(gradient), 0, atol=1e-5)


@functools.cache
def rollout(surrogate, shifted=False, blocks_from="targets"):
    """Sixteen texts that a decoder wrote, by a model with and without a shift."""
    definition, params = make_model(shifted)
    objective = PolicyGradient(SIZE, surrogate, draws=2, blocks_from=blocks_from)
    decoder = BlockDecoder(SIZE, MaskedDecoder(order="random", temperature=1.0), blocks_from)
    prompts = tiny.one_a_row([(INPUTS, [0] * 5), (INPUTS[:2], [0] * 5)] * 8)
    write = make_rollout_step(definition, decoder, prepare=objective.prepare_rollout)
    texts = jax.device_get(write(params, prompts, 0))
    advantage = np.random.default_rng(0).normal(size=16).astype(np.float32)
    return params, objective, texts.replace(advantage=advantage)


CASES = [("trajectory", False, "targets"), ("trajectory", True, "targets"), ("trajectory", False, "row")]
CASES += [("one_step", False, "targets"), ("coupled", False, "targets"), ("coupled", True, "targets")]


@pytest.mark.parametrize(("surrogate", "shifted", "blocks_from"), quick(CASES, [CASES[1], CASES[3], CASES[5]]))
def test_ratios_are_one_to_the_model_that_wrote_the_texts(surrogate, shifted, blocks_from):
    params, objective, texts = rollout(surrogate, shifted, blocks_from)
    _, sums = program(objective, shifted)(params, texts, KEY)
    ratio, written = sums.metrics["ratio"], texts.written_at >= 0
    assert ratio.denominator == written.sum()  # two states a block at most: every token is scored once
    np.testing.assert_allclose(ratio.mean(), 1, atol=1e-5)
    np.testing.assert_allclose(sums.metrics["kl_from_writer"].mean(), 0, atol=1e-6)
    assert (texts.written_log_probability[written] < 0).all() and not texts.written_log_probability[~written].any()
    loss = -2 * (written * texts.advantage[:, None]).sum()
    np.testing.assert_allclose(sums.loss.numerator, loss, rtol=1e-4)


def test_states_of_the_surrogates():
    """The surrogates hide all of a block, or complements."""
    at = {name: rollout(name)[2] for name in ("one_step", "coupled")}
    assert set(np.unique(at["one_step"].written_at)) == {-1, 0}
    assert set(np.unique(at["coupled"].written_at)) == {-1, 0, 1}
    hidden = {}
    for name, texts in at.items():
        objective = PolicyGradient(SIZE, name)
        for state in (0, 1):
            noisy = np.asarray(objective._masked(VOCABULARY, texts, jnp.full(texts.tokens.shape, state)))
            hidden[name, state] = noisy == VOCABULARY.mask_id
            assert (noisy[~hidden[name, state]] == texts.tokens[~hidden[name, state]]).all()
    written = at["coupled"].written_at >= 0
    assert (hidden["one_step", 0] == written).all()
    assert (hidden["coupled", 0] ^ hidden["coupled", 1] == written).all()  # complements


@pytest.mark.parametrize(
    ("advantage", "moved", "is_cut"), [(1, 1, True), (1, -1, False), (-1, 1, False), (-1, -1, True)]
)
def test_what_has_moved_far_enough_in_the_right_direction_is_left_alone(advantage, moved, is_cut):
    params, objective, texts = rollout("trajectory")
    before = texts.written_log_probability - np.where(texts.written_at >= 0, 0.5 * moved, 0)
    texts = texts.replace(
        written_log_probability=before.astype(np.float32), advantage=np.full(16, advantage, np.float32)
    )
    gradient, sums = program(objective)(params, texts, KEY)
    assert (flat(gradient) == 0).all() == is_cut
    assert sums.metrics["clip_fraction"].mean() == is_cut
    np.testing.assert_allclose(sums.metrics["ratio"].mean(), np.exp(0.5 * moved), rtol=1e-4)
    cut = 1 + 0.2 * moved if is_cut else np.exp(0.5 * moved)
    np.testing.assert_allclose(sums.loss.numerator, -2 * advantage * cut * (texts.written_at >= 0).sum(), rtol=1e-4)


@pytest.mark.parametrize("normalize", ["all_tokens", "sequences", "target_tokens"])
def test_texts_without_an_advantage_inputs_and_padding_have_no_gradient(normalize):
    params, _, texts = rollout("trajectory")
    run = program(PolicyGradient(SIZE, normalize=normalize))
    assert (flat(run(params, texts.replace(advantage=np.zeros(16, np.float32)), KEY)[0]) == 0).all()
    rows = np.arange(16) < 8
    some = texts.replace(advantage=np.where(rows, texts.advantage, 0))
    others = np.where(rows[:, None] | texts.input_mask, texts.tokens, 2)
    padding = np.where(texts.segment_ids > 0, texts.tokens, 4)
    expected, of_others, of_padding = (
        flat(run(params, some.replace(tokens=tokens), KEY)[0]) for tokens in (some.tokens, others, padding)
    )
    np.testing.assert_allclose(of_others, expected, atol=1e-6)
    np.testing.assert_allclose(of_padding, expected, atol=1e-6)


def test_mistakes():
    params, objective, texts = rollout("trajectory")
    definition, _ = make_model()
    with pytest.raises(UserError, match="a reward judged"):
        objective.loss(definition.bind(params), texts.replace(advantage=None), KEY)
    for wrong, message in (
        ({"draws": 0}, "draws"),
        ({"clip": (0.0, 0.2)}, "clip"),
        ({"softmax": "all"}, "softmax"),
        ({"surrogate": "bound"}, "surrogate"),
        ({"kl_weight": -1.0}, "kl_weight"),
    ):
        with pytest.raises(UserError, match=message):
            PolicyGradient(SIZE, **wrong)
    with pytest.raises(UserError, match="Set INITIAL_CHECKPOINT_PATH"):
        PolicyGradient(SIZE, kl_weight=0.1).loss(definition.bind(params), texts, KEY)
    assert PolicyGradient().needs_samples and not PolicyGradient(surrogate="one_step", softmax="all").needs_samples
