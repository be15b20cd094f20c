"""Preference pairs, against closed forms of models that are a table."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from variants import quick

from diffusion_t5x.errors import UserError
from diffusion_t5x.objectives.autoregressive import Autoregressive
from diffusion_t5x.objectives.block import Block
from diffusion_t5x.objectives.distillation import Distillation
from diffusion_t5x.objectives.masked import Masked
from diffusion_t5x.objectives.preferences import Preferences, texts_of_pairs

KEY = jax.random.key(0)
TABLE, START = (np.random.default_rng(seed).normal(size=(32, 32)).astype(np.float32) for seed in (0, 1))
# Inputs, chosen, rejected. Texts end at EOS; the last row fills up a batch.
PAIRS = [([5, 6], [7, 8, 1], [9, 1, 0]), ([5], [4, 1, 0], [4, 10, 11]), ([7, 7], [8, 8, 8], [3, 3, 3])]
LIKELIHOODS = {"exact": Autoregressive(), "masked": Masked(), "block": Block(2)}


def pairs_of(pairs, length=6):
    """Rows with one text in each half."""
    halves = [tiny.one_a_row([(inputs, pair[i]) for inputs, *pair in pairs], length) for i in (0, 1)]
    first, second = halves
    joined = {
        name: np.concatenate([getattr(first, name), getattr(second, name)], axis=1)
        for name in ("tokens", "target_mask", "segment_ids", "positions")
    }
    return first.replace(**joined)


@functools.partial(jax.jit, static_argnums=0)
def run(objective, batch, key=KEY, table=TABLE, start=START):
    """The loss's sums, and the gradients of its numerator by the logits of the table."""

    def loss(table):
        model, teacher = (tiny.TableModel(jnp.asarray(x)) for x in (table, start))
        sums = objective.loss(model, batch, key, teacher=teacher)
        return sums.loss.numerator, sums

    gradient, sums = jax.grad(loss, has_aux=True)(table)
    return sums, gradient


def log_softmax(table):
    """Log-probabilities of the ids that may be written, in float64."""
    allowed = np.arange(23)
    found = np.full(table.shape, -np.inf)
    logits = table[:, allowed].astype(np.float64)
    found[:, allowed] = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    return found


def log_likelihood(table, inputs, text):
    """The log-likelihood under a bigram model, up to the token that ends the text."""
    log_p, previous, total = log_softmax(table), inputs[-1], 0.0
    for token in text:
        total += log_p[previous, token]
        previous = token
        if token < 2:
            break
    return total


def gains(inputs, *texts):
    return [log_likelihood(TABLE, inputs, text) - log_likelihood(START, inputs, text) for text in texts]


def test_an_exact_likelihood_gives_the_loss_of_dpo():
    sums, _ = run(Preferences(Autoregressive(), beta=0.3, nll_weight=0.5), pairs_of(PAIRS))
    found = np.array([gains(*pair) for pair in PAIRS])
    margins = 0.3 * (found[:, 0] - found[:, 1])
    nll = [-log_likelihood(TABLE, inputs, text) / n for (inputs, text, _), n in zip(PAIRS, (3, 2, 3), strict=True)]
    np.testing.assert_allclose(sums.loss.mean(), np.mean(np.log1p(np.exp(-margins)) + 0.5 * np.array(nll)), rtol=1e-5)
    assert sums.loss.denominator == 3 and sums.metrics["accuracy"].mean() == np.float32((margins > 0).mean())
    for name, expected in (
        ("margin", margins), ("chosen_gain", found[:, 0]), ("rejected_gain", found[:, 1]), ("chosen_nll", nll)
    ):  # fmt: skip
        np.testing.assert_allclose(sums.metrics[name].mean(), np.mean(expected), rtol=1e-5, atol=1e-6)


def test_the_gradient_raises_the_chosen_text_and_lowers_the_rejected_one():
    """-beta sigmoid(-margin) (gradient of log p(chosen) - gradient of log p(rejected))."""
    pair = ([5], [7, 1, 0], [9, 1, 0])
    _, gradient = run(Preferences(Autoregressive(), beta=0.3), pairs_of([pair]))
    chosen, rejected = gains(*pair)
    scale = 0.3 / (1 + np.exp(0.3 * (chosen - rejected)))
    p = np.exp(log_softmax(TABLE))
    expected = np.zeros((32, 32))
    expected[5, 7] -= scale  # both texts read the row of 5, and their softmax cancels out
    expected[5, 9] += scale
    for token, sign in ((7, 1), (9, -1)):  # then EOS
        expected[token] += sign * scale * p[token]
        expected[token, 1] -= sign * scale
    np.testing.assert_allclose(gradient, expected, atol=1e-6)


@pytest.mark.parametrize("name", quick(list(LIKELIHOODS), ["exact", "block"]))
def test_equal_texts_and_an_equal_model_have_the_loss_log_2(name):
    objective = Preferences(LIKELIHOODS[name])
    sums, gradient = run(objective, pairs_of([(inputs, text, text) for inputs, text, _ in PAIRS]))
    np.testing.assert_allclose(sums.loss.mean(), np.log(2), rtol=1e-6)
    np.testing.assert_allclose(gradient, 0, atol=1e-7)
    sums, gradient = run(objective, pairs_of(PAIRS), table=START)
    np.testing.assert_allclose(sums.loss.mean(), np.log(2), rtol=1e-6)
    assert np.abs(gradient).max() > 1e-3 and sums.metrics["accuracy"].mean() == 0


def test_a_bound_has_the_mean_of_the_exact_margin():
    """A masked token's logits are MASK's row, whatever else is read: the bound is the sum over the canvas."""
    pairs = PAIRS[:2]
    expected = []
    for _, *texts in pairs:
        gain = [sum(log_softmax(TABLE)[23, t] - log_softmax(START)[23, t] for t in text) for text in texts]
        expected.append(gain[0] - gain[1])
    draw = functools.partial(run, Preferences(Masked(), beta=1.0), pairs_of(pairs))
    found = np.array([draw(key)[0].metrics["margin"].mean() for key in jax.random.split(KEY, 300)])
    assert found.std() > 0.1
    assert abs(found.mean() - np.mean(expected)) < 3 * found.std() / np.sqrt(300)


@pytest.mark.slow
def test_shared_noise_varies_less():
    """The difference of the two gains, with shared noise and with noise of its own for each of the four terms."""
    model, start = (tiny.TableModel(jnp.asarray(x)) for x in (TABLE, 0.8 * TABLE))
    texts = texts_of_pairs(pairs_of([([5, 6], [7, 8, 9, 10, 1], [7, 8, 9, 12, 1])], length=7))
    apart = texts.replace(example_ids=np.array([0, 1]))

    @jax.jit
    @jax.vmap
    def margins(key):
        of = functools.partial(Masked().log_likelihood, num_draws=2)
        ours, theirs = of(model, texts, key).log_likelihood, of(start, texts, key).log_likelihood
        other = jax.random.fold_in(key, 1)
        own = of(model, apart, key).log_likelihood, of(start, apart, other).log_likelihood
        by_policy = of(start, apart, key).log_likelihood
        return jnp.stack([jnp.diff(ours - theirs)[0], jnp.diff(own[0] - by_policy)[0], jnp.diff(own[0] - own[1])[0]])

    shared, by_model, independent = np.std(margins(jax.random.split(KEY, 400)), axis=0)
    assert 1.5 * shared < by_model < independent / 2, (shared, by_model, independent)


@pytest.mark.slow
def test_padding_and_rows_without_a_pair_are_not_read():
    batch = pairs_of(PAIRS)
    filled = pairs_of([*PAIRS, ([], [], [])], length=6)
    objective = Preferences(Block(2), nll_weight=0.1)
    sums, gradient = run(objective, batch)
    again, same = run(objective, filled.replace(tokens=np.where(filled.segment_ids > 0, filled.tokens, 7)))
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-6), again, sums)
    np.testing.assert_allclose(same, gradient, atol=1e-7)


def test_the_passes_are_those_of_all_draws_and_of_the_reference():
    assert len(Preferences(Masked(), num_draws=4).passes) == 8 and len(Preferences(Autoregressive()).passes) == 2
    assert sum(each.by_teacher for each in Preferences(Block(2), num_draws=2).passes) == 2
    assert Preferences(Autoregressive()).autoregressive and not Preferences(Block(2)).autoregressive


def test_mistakes():
    for wrong, message in (
        ({"beta": 0.0}, "beta"),
        ({"nll_weight": -1.0}, "nll_weight"),
        ({"num_draws": 3}, "even number"),
        ({"likelihood": Distillation(2)}, "without a teacher"),
    ):
        with pytest.raises(UserError, match=message):
            Preferences(**{"likelihood": Masked(), **wrong})
    with pytest.raises(UserError, match="Set INITIAL_CHECKPOINT_PATH"):
        Preferences(Masked()).loss(tiny.TableModel(jnp.asarray(TABLE)), pairs_of(PAIRS), KEY)
