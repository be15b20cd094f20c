"""The distribution that decoders sample, by enumeration: every proposal of every step goes through their own steps.

The model has the exact conditionals of a second-order chain of three symbols. Decoding at temperature 1, one token per
step, then samples the chain itself in every order but that of confidence. The second part decodes with the optima of
SFT, off-policy and on-policy distillation instead.
"""

import functools
import itertools
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from diffusion_t5x.decoding import commit
from diffusion_t5x.decoding.canvas import Canvas
from diffusion_t5x.decoding.masked import MaskedDecoder
from diffusion_t5x.models.streams import row_keys

MASK = tiny.VOCABULARY.mask_id
SYMBOLS = np.array([3, 4, 5])
RNG = np.random.default_rng(0)
START = RNG.dirichlet([1.0] * 3)
SECOND = RNG.dirichlet([0.5] * 3, 3)
THIRD = RNG.dirichlet([0.3] * 3, (3, 3))


def next_symbol(before):
    """The chain's distribution of the symbol after these."""
    return START if not before else SECOND[before[0]] if len(before) == 1 else THIRD[before[-2], before[-1]]


@functools.cache
def chain(length):
    """Texts, their probabilities, and at each place the distribution given the symbols before it."""
    texts = list(itertools.product(range(3), repeat=length))
    given_before = np.array([[next_symbol(text[:i]) for i in range(length)] for text in texts])
    symbols = np.array(texts)
    probability = np.take_along_axis(given_before, symbols[..., None], axis=2)[..., 0].prod(axis=1)
    return symbols, probability, given_before


@functools.cache
def canvases(length):
    """All canvases, 3 for MASK: `number` is their place in the list."""
    found = np.array(list(itertools.product(range(4), repeat=length)))
    return found, 4 ** np.arange(length)[::-1]


def posterior(length):
    """`[canvas, place, symbol]`: the chain's distribution given all that is written."""
    states, _ = canvases(length)
    symbols, probability, _ = chain(length)
    agrees = ((states[:, None] == symbols) | (states[:, None] == 3)).all(axis=-1)
    joint = np.einsum("st,tiv->siv", agrees * probability, np.eye(3)[symbols])
    return joint / joint.sum(axis=-1, keepdims=True)


def left_to_right_averaged(length, weights):
    """The optimum of distillation: the chain given what is before, averaged over texts by weights `[canvas, text]`."""
    return np.einsum("st,tiv->siv", weights / weights.sum(axis=1, keepdims=True), chain(length)[2])


class Given:
    """A model whose hidden states are its logits."""

    config, vocabulary = tiny.RELATIVE, tiny.VOCABULARY

    def map_logits(self, fn, hidden, *per_position):
        return fn(hidden, *per_position)


@functools.partial(jax.jit, static_argnums=0)
def step_of(decoder, logits, tokens, step, proposals, draws):
    """The rows after a step of the decoder in which it draws these tokens and, for a random order, these numbers."""
    canvas = Canvas.start(tokens, jnp.ones(tokens.shape, bool))
    canvas = canvas.replace(step=jnp.full_like(canvas.step, step))
    eligible = decoder.eligible(tokens, canvas.target_mask, tiny.VOCABULARY, canvas.step)
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    keys = row_keys(jax.random.key(0), jnp.arange(len(tokens)))
    with (
        mock.patch.object(commit, "sample", lambda *_: proposals),
        mock.patch.object(commit, "uniform", lambda *_: draws),
    ):
        return decoder.write(Given(), logits, canvas, eligible, positions, keys).tokens


@functools.cache
def rows_of(length, masked, any_order):
    """Numbers of the canvases with so many masks, once for each proposal (and each place that may come first)."""
    states, place = canvases(length)
    rows = []
    for number in np.flatnonzero((states == 3).sum(axis=1) == masked):
        open_places = np.flatnonzero(states[number] == 3)
        for drawn in itertools.product(range(3), repeat=masked):
            proposal = states[number].copy()
            proposal[open_places] = drawn
            rows += [(number, proposal, first) for first in (open_places if any_order else [0])]
    numbers, proposals, first = (np.array(x) for x in zip(*rows, strict=True))
    return numbers, proposals, first, place


def transitions(decoder, model, length, masked, step):
    """Numbers of canvases with so many masks, of those after the step, and the probability of each such pair."""
    states, _ = canvases(length)
    numbers, proposals, first, place = rows_of(length, masked, decoder.order == "random")
    logits = np.full((len(numbers), length, 32), -np.inf, np.float32)
    with np.errstate(divide="ignore"):
        logits[..., SYMBOLS] = np.log(model[numbers])
    tokens, drawn = (np.append(SYMBOLS, MASK)[x].astype(np.int32) for x in (states[numbers], proposals))
    draws = np.eye(length, dtype=np.float32)[first]
    after = np.asarray(step_of(decoder, logits, tokens, np.int32(step), drawn, draws))
    chances = np.take_along_axis(model[numbers], np.minimum(proposals, 2)[..., None], axis=2)[..., 0]
    chances = np.where(states[numbers] == 3, chances, 1).prod(axis=1)
    if decoder.order == "random":
        chances = chances / masked
    return numbers, np.where(after == MASK, 3, after - SYMBOLS[0]) @ place, chances


def sampled(decoder, model, length):
    """The probability of each text."""
    mass = np.zeros(4**length)
    mass[-1], step = 1, 0
    states, place = canvases(length)
    while (masked := (states[mass > 0] == 3).sum(axis=1).max()) > 0:
        numbers, after, chances = transitions(decoder, model, length, masked, step)
        mass = np.bincount(after, chances * mass[numbers], 4**length)
        step += 1
    texts = mass[chain(length)[0] @ place]
    assert texts.sum() == pytest.approx(1)
    return texts


def entropy(probability):
    return -np.sum(probability * np.log(np.where(probability > 0, probability, 1)))


def one_a_step(order):
    return MaskedDecoder(num_steps=None, order=order, temperature=1.0)


@pytest.mark.parametrize("order", ["sequential", "random", "entropy", "margin"])
def test_one_token_a_step_samples_the_model_where_the_draw_does_not_choose_the_place(order):
    _, probability, _ = chain(5)
    found = sampled(one_a_step(order), posterior(5), 5)
    np.testing.assert_allclose(found, probability, atol=2e-6)


def test_the_order_of_confidence_does_not_sample_the_model():
    """A likely token wins twice: once as it is drawn, once as its place is chosen."""
    _, probability, _ = chain(5)
    found = sampled(one_a_step("confidence"), posterior(5), 5)
    assert entropy(probability) == pytest.approx(2.525, abs=1e-3)
    assert entropy(found) == pytest.approx(1.009, abs=1e-3)
    assert np.abs(found - probability).sum() / 2 == pytest.approx(0.568, abs=1e-3)  # total variation


def test_two_tokens_a_step_are_independent_of_each_other():
    """From left to right: pairs of symbols, each drawn given the pairs before, as if apart."""
    _, probability, _ = chain(4)
    found = sampled(MaskedDecoder(num_steps=2, order="sequential", temperature=1.0), posterior(4), 4)
    pair = probability.reshape(9, 9)
    first = pair.sum(axis=1).reshape(3, 3)
    expected = np.outer(first.sum(axis=1), first.sum(axis=0)).reshape(9, 1)
    given = (pair / pair.sum(axis=1, keepdims=True)).reshape(9, 3, 3)
    expected = expected * (given.sum(axis=2)[:, :, None] * given.sum(axis=1)[:, None, :]).reshape(9, 9)
    np.testing.assert_allclose(found, expected.reshape(-1), atol=2e-6)
    assert np.abs(found - probability).sum() / 2 > 0.05


def off_policy(length):
    """Optimum of distillation on the chain's own texts, whatever the law of the masks."""
    states, _ = canvases(length)
    symbols, probability, _ = chain(length)
    agrees = ((states[:, None] == symbols) | (states[:, None] == 3)).all(axis=-1)
    return left_to_right_averaged(length, agrees * probability)


def on_policy(decoder, length):
    """Optimum of distillation on the decoder's own texts, in the states that it visits: its model is the result.

    A state with fewer masks comes first. Where a state's model decides which text comes out, it is iterated.
    """
    states, place = canvases(length)
    symbols, _, _ = chain(length)
    model, texts = posterior(length), np.zeros((4**length, 3**length))
    texts[symbols @ place, np.arange(3**length)] = 1
    for masked in range(1, length + 1):
        here = np.flatnonzero((states == 3).sum(axis=1) == masked)
        for _ in range(300):
            numbers, after, chances = transitions(decoder, model, length, masked, length - masked)
            texts[here] = 0
            np.add.at(texts, numbers, chances[:, None] * texts[after])
            new = left_to_right_averaged(length, texts[here])
            change = np.abs(new - model[here]).max()
            model[here] = (new + model[here]) / 2
            if change < 1e-6:
                break
    return model


def nats_per_token(found, length=4):
    """The cross-entropy of sampled texts under the chain."""
    return -np.sum(found * np.log(chain(length)[1])) / length


@functools.cache
def optima(order):
    """Nats per token of texts written at the optimum: by SFT, off-policy and on-policy distillation."""
    decoder = one_a_step(order)
    models = (posterior(4), off_policy(4), on_policy(decoder, 4))
    return [nats_per_token(sampled(decoder, model, 4)) for model in models]


def test_distillation_has_the_models_conditionals_only_from_left_to_right():
    """The teacher ignores what is already written to the right. SFT learns the posterior, in any order."""
    truth = entropy(chain(4)[1]) / 4
    assert truth == pytest.approx(0.508, abs=5e-4)
    np.testing.assert_allclose(optima("sequential"), [truth] * 3, rtol=1e-5)
    np.testing.assert_allclose(optima("random"), [truth, 1.406, 1.458], atol=1e-3)


def test_by_confidence_sft_writes_what_is_too_likely():
    np.testing.assert_allclose(optima("confidence"), [0.392, 0.968, 0.826], atol=1e-3)
