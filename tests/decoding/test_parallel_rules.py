"""The tokens that a step writes: by entropy, by margin, by credit."""

import gin
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from diffusion_t5x.command_line import config
from diffusion_t5x.decoding.block import BlockDecoder
from diffusion_t5x.decoding.canvas import Canvas
from diffusion_t5x.decoding.credit import CreditDecoder
from diffusion_t5x.decoding.editing import EditingDecoder
from diffusion_t5x.decoding.entropy_bounded import EntropyBoundedDecoder, within_bound
from diffusion_t5x.decoding.masked import MaskedDecoder
from diffusion_t5x.decoding.remasking import RemaskingDecoder
from diffusion_t5x.errors import UserError

MASK, NUM_IDS = tiny.VOCABULARY.mask_id, tiny.VOCABULARY.size
MODEL = tiny.TableModel(np.zeros((32, 32), np.float32))
KEYS = jax.random.split(jax.random.key(0), 1)


def logits_of(probabilities):
    """Logits of one row, whose positions give these ids these probabilities."""
    logits = np.full((1, len(probabilities), 32), -np.inf, np.float32)
    for place, of_place in enumerate(probabilities):
        for token, probability in of_place.items():
            logits[0, place, token] = np.log(probability)
    return jnp.asarray(logits)


def start(tokens):
    tokens = jnp.asarray([tokens])
    return Canvas.start(tokens, jnp.ones(tokens.shape, bool))


def step(rule, probabilities, canvas):
    positions = jnp.arange(canvas.tokens.shape[1])[None]
    eligible = rule.eligible(canvas.tokens, canvas.target_mask, tiny.VOCABULARY, canvas.step)
    written = rule.write(MODEL, logits_of(probabilities), canvas, eligible, positions, KEYS)
    return written.tokens[0].tolist(), written


# Entropies: 0.325, 0.693, 0.056, 0.611 nats.
FOUR = [{3: 0.9, 4: 0.1}, {5: 0.51, 6: 0.49}, {7: 0.99, 8: 0.01}, {9: 0.7, 10: 0.3}]


@pytest.mark.parametrize(
    ("bound", "expected"),
    [
        (0.0, [MASK, MASK, 7, MASK]),
        (0.05, [MASK, MASK, 7, MASK]),
        (0.06, [3, MASK, 7, MASK]),  # 0.056 is the sum but for the largest
        (0.38, [3, MASK, 7, MASK]),
        (0.39, [3, MASK, 7, 9]),  # 0.056 + 0.325 = 0.381
        (1.0, [3, 5, 7, 9]),
    ],
)
def test_entropies_of_a_step_sum_to_the_bound_but_for_the_largest(bound, expected):
    assert step(EntropyBoundedDecoder(bound), FOUR, start([MASK] * 4))[0] == expected


@pytest.mark.parametrize(
    ("bound", "expected"),
    [
        (0.0, [MASK, MASK, 7, MASK]),
        (0.38, [MASK, MASK, 7, MASK]),
        (0.39, [3, MASK, 7, MASK]),  # 0.056 + 0.325 = 0.381
        (1.0, [3, MASK, 7, 9]),  # and 0.611: 0.992
        (1.7, [3, 5, 7, 9]),  # and 0.693: 1.685
    ],
)
def test_entropies_of_a_step_sum_to_the_bound_with_the_largest(bound, expected):
    assert step(EntropyBoundedDecoder(bound, counts_largest=True), FOUR, start([MASK] * 4))[0] == expected


def test_what_is_written_does_not_count():
    assert step(EntropyBoundedDecoder(0.06), FOUR, start([MASK, MASK, 4, MASK]))[0] == [3, MASK, 4, MASK]


def test_the_largest_set_within_the_bound_in_any_order():
    """Against all beginnings of the order, by NumPy."""
    rng = np.random.default_rng(0)
    certainty, entropy = rng.standard_normal((64, 9)), rng.gamma(0.5, size=(64, 9))
    eligible = rng.random((64, 9)) < 0.7
    for bound in (0.0, 0.3, 1.5):
        found = within_bound(jnp.asarray(certainty), jnp.asarray(entropy), jnp.asarray(eligible), bound)
        for row, count in enumerate(np.asarray(found)):
            places = [place for place in np.argsort(-certainty[row]) if eligible[row, place]]
            sums = [entropy[row, places[:n]] for n in range(1, len(places) + 1)]
            assert count == max([n for n, of in enumerate(sums, 1) if of.sum() - of.max() <= bound + 1e-6], default=1)


def test_a_margin_above_the_threshold_is_written():
    rule = MaskedDecoder(None, threshold=0.35, order="margin")
    assert step(rule, FOUR, start([MASK] * 4))[0] == [3, MASK, 7, 9]  # margins of 0.8, 0.02, 0.98 and 0.4
    assert step(rule, FOUR, start([1, MASK, 1, 1]))[0] == [1, 5, 1, 1]  # at least one


def test_credit_grows_with_the_steps_in_which_a_token_was_the_likeliest():
    """By NumPy, of four steps over the same logits; the first position is sure with credit alone, from the third on."""
    rule = CreditDecoder(0.68, alpha=1.0, beta=0.5, gamma=0.5)
    probabilities = [{3: 0.5, 4: 0.5 - 1e-3, 6: 1e-3}, {5: 0.6, 6: 0.4}, {7: 0.55, 8: 0.45}]
    canvas, credit, written = start([MASK] * 3), np.zeros(3), [None] * 3
    canvas = canvas.replace(memory=rule.start_memory(MODEL, canvas.tokens))
    firsts = np.array([max(of.values()) for of in probabilities])
    for number in range(3):
        left = np.array([at is None for at in written])
        credit = 0.5 * credit + np.where(left, firsts**0.5, 0)
        raised = firsts * (1 + credit) / (firsts * (1 + credit) + 1 - firsts)
        sure = np.where(left, raised, -1)
        for place in np.flatnonzero((sure > 0.68) | (np.arange(3) == sure.argmax())):
            written[place] = number if written[place] is None else written[place]
        tokens, result = step(rule, probabilities, canvas)
        canvas = canvas.after(result, jnp.ones(1, bool))
        np.testing.assert_allclose(canvas.memory[0, [0, 1, 2], [3, 5, 7]], credit, rtol=1e-5)
        assert float(canvas.memory[0].sum()) == pytest.approx(credit.sum(), rel=1e-5)
        if None not in written:
            break
    assert canvas.written_at[0].tolist() == written and tokens == [3, 5, 7] and len(set(written)) > 1
    np.testing.assert_allclose(canvas.log_probability[0], np.log(firsts), rtol=1e-5)  # the model's own


def test_no_credit_is_a_threshold():
    one, other = CreditDecoder(0.65, alpha=0.0), MaskedDecoder(None, threshold=0.65)
    canvas = start([MASK] * 4)
    with_memory = canvas.replace(memory=one.start_memory(MODEL, canvas.tokens))
    assert step(one, FOUR, with_memory)[0] == step(other, FOUR, canvas)[0] == [3, MASK, 7, 9]


@pytest.mark.parametrize(
    ("file", "expected"),
    [
        ("entropy_bounded", EntropyBoundedDecoder()),
        ("margin", MaskedDecoder(None, threshold=0.5, order="margin")),
        ("credit", CreditDecoder()),
        ("editing", EditingDecoder(0.8, 0.3, num_steps=8, extra_steps=2)),
        ("remasking", RemaskingDecoder()),
        ("published/llada21", BlockDecoder(32, EditingDecoder(softmax="all"), "row")),
    ],
)
def test_the_gin_files_are_these_decoders(file, expected):
    config.load([f"decoding/{file}.gin"])
    assert gin.query_parameter("%DECODER").scoped_configurable_fn() == expected


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: EntropyBoundedDecoder(-0.1), r"bound must be at least 0; got -0\.1"),
        (lambda: CreditDecoder(beta=1.5), "needs threshold and beta in"),
        (lambda: MaskedDecoder(None, threshold=0.5, order="entropy"), "belongs to the order of confidence or margin"),
    ],
)
def test_wrong_settings_are_refused(make, message):
    with pytest.raises(UserError, match=message):
        make()
