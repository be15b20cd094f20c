"""Masked decoding against a plain numpy loop, and what its outputs may depend on."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from diffusion_t5x.decoding.commit import choose
from diffusion_t5x.decoding.masked import MaskedDecoder
from diffusion_t5x.errors import UserError
from diffusion_t5x.models.output import Output

MASK, START = 23, 21  # a start token that is not pad, so that one cannot stand for the other
VOCABULARY = dataclasses.replace(tiny.VOCABULARY, start_id=START)
# Inputs and targets of many lengths, and a filler row without anything.
SIZES = [(2, 7), (6, 3), (0, 8), (4, 1), (1, 5)]
BATCH = tiny.one_a_row([*tiny.random_examples(0, SIZES), ([], [])], length=10, first_id=40)

RNG = np.random.default_rng(22)
PLACES, BEFORE, AFTER = (RNG.standard_normal(shape).astype(np.float32) for shape in ((10, 32), (32, 32), (32, 32)))
PLACES[:, MASK:] = 9.0  # MASK and what is no id would come first
PLACES[:, 1] += 0.5  # EOS comes now and then


class Neighbours(tiny.TableModel):
    """A position's logits are a sum of what the place and the tokens beside it say."""

    def __call__(self, tokens, slots, kind, encoded=None, dropout_keys=None):
        super().__call__(tokens, slots, kind, encoded, dropout_keys)
        before, after = jnp.asarray(BEFORE)[jnp.roll(tokens, 1, -1)], self.table[jnp.roll(tokens, -1, -1)]
        return Output(jnp.asarray(PLACES) + before + after)


@functools.cache
def table_decoder(**settings):
    decoder = MaskedDecoder(**settings)
    return jax.jit(
        lambda batch, key: decoder.decode(Neighbours(jnp.asarray(AFTER), VOCABULARY), batch, key, trace=True)
    )


def decode_table(batch=BATCH, seed=0, **settings):
    return jax.device_get(table_decoder(**settings)(batch, jax.random.key(seed)))


def masks_left(trace):
    return (trace == MASK).sum(axis=-1)


def log_probabilities(canvas):
    """Log-probabilities of a row in float64, by NumPy; MASK and ids outside the vocabulary are left out."""
    read = np.where((canvas == MASK) & (np.arange(10) == 0), START, canvas)
    logits = (PLACES + BEFORE[np.roll(read, 1)] + AFTER[np.roll(read, -1)]).astype(np.float64)[:, :MASK]
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def certainty(found, order):
    ordered = np.sort(np.exp(found), axis=-1)
    return {
        "confidence": ordered[:, -1],
        "entropy": (np.exp(found) * found).sum(-1),
        "margin": ordered[:, -1] - ordered[:, -2],
    }[order]


def shares(number, steps):
    """A number shared out over steps as equally as can be, the greater shares first."""
    return [len(part) for part in np.array_split(np.arange(number), steps)]


def written_greedily(tokens, targets, order, num_steps, threshold):
    """A row's canvases with their confidences, and its score: one position after another, in Python."""
    canvas, confidence = np.where(targets, MASK, tokens), np.zeros(len(tokens))
    canvases, total, step = [(canvas.copy(), confidence.copy())], 0.0, 0
    while left := [place for place in np.flatnonzero(targets) if canvas[place] == MASK]:
        found = log_probabilities(canvas)
        sure = certainty(found, order)
        count = 1 if num_steps is None else shares(len(left), num_steps - step)[0]
        best_first = sorted(left, key=lambda place: -sure[place])
        chosen = set(best_first[:count])
        if threshold is not None:
            chosen |= {place for place in left if sure[place] > threshold}
        for place in chosen:
            canvas[place] = found[place].argmax()
            confidence[place] = np.exp(found[place].max())
            total += found[place].max()
        canvases.append((canvas.copy(), confidence.copy()))
        step += 1
    return canvases, total / max(targets.sum(), 1)


def ended(tokens):
    """The tokens of a canvas up to its first EOS or pad, and pad after it."""
    ends = [place for place, token in enumerate(tokens) if token in (0, 1)]
    return [token if not ends or place <= ends[0] else 0 for place, token in enumerate(tokens)]


@pytest.mark.parametrize(
    "settings",
    [
        {"order": "confidence", "num_steps": 3},
        {"order": "entropy", "num_steps": 3},
        {"order": "margin", "num_steps": 3},
        {"order": "margin", "num_steps": None},
        {"num_steps": 1},
        {"num_steps": 20},
        {"threshold": 0.4, "num_steps": None},
        {"threshold": 0.4, "num_steps": 3},
        {"threshold": 0.0, "num_steps": None},
        {"threshold": 1.0, "num_steps": None},
    ],
    ids=str,
)
def test_steps_scores_and_tokens_are_those_of_a_plain_loop(settings):
    settings = {"order": "confidence", "threshold": None} | settings
    decoded = decode_table(**settings)
    expected = [written_greedily(*row, **settings) for row in zip(BATCH.tokens, BATCH.target_mask, strict=True)]
    assert decoded.steps == max(len(canvases) for canvases, _ in expected) - 1
    assert len(decoded.trace.tokens) == min(settings["num_steps"] or 10, 10) + 1
    for step in range(len(decoded.trace.tokens)):  # a row that is done stays as it is
        rows, confidences = zip(*[canvases[min(step, len(canvases) - 1)] for canvases, _ in expected], strict=True)
        np.testing.assert_array_equal(decoded.trace.tokens[step], rows)
        np.testing.assert_allclose(decoded.trace.confidence[step], confidences, rtol=1e-5)
    np.testing.assert_allclose(decoded.scores, [score for _, score in expected], rtol=1e-5)
    for row, mask, (canvases, _), clean in zip(decoded.tokens, BATCH.target_mask, expected, BATCH.tokens, strict=True):
        assert row[mask].tolist() == ended(canvases[-1][0][mask].tolist())
        np.testing.assert_array_equal(row[~mask], clean[~mask])


def test_the_examples_tell_the_settings_apart():
    """Else the plain loop would show nothing: orders differ, a threshold finds one, several and none; outputs end."""
    traces = [
        decode_table(order=order, num_steps=3).trace.tokens.tobytes() for order in ("confidence", "entropy", "margin")
    ]
    assert len(set(traces)) == 3
    decoded = decode_table(threshold=0.4, num_steps=None)
    assert set((masks_left(decoded.trace.tokens[:-1]) - masks_left(decoded.trace.tokens[1:])).reshape(-1)) == {
        0,
        1,
        2,
        3,
    }
    assert 2 < decoded.steps < 8
    assert (decoded.tokens != decoded.trace.tokens[-1]).any()


@pytest.mark.parametrize("settings", [{"order": "random"}, {"temperature": 1.5}, {"temperature": 0.8, "top_k": 3}])
def test_rows_of_all_lengths_follow_their_own_plan_and_keep_what_is_written(settings):
    decoded = decode_table(num_steps=4, **settings)
    assert decoded.steps == 4
    for column, number in zip(-np.diff(masks_left(decoded.trace.tokens), axis=0).T, [7, 3, 8, 1, 5, 0], strict=True):
        assert column.tolist() == shares(number, 4)
    for before, after in zip(decoded.trace.tokens, decoded.trace.tokens[1:], strict=False):
        np.testing.assert_array_equal(after[before != MASK], before[before != MASK])
    assert (decoded.trace.tokens[-1] < MASK).all() and (decoded.tokens < MASK).all()
    other = decode_table(num_steps=4, seed=1, **settings)
    assert (other.trace.tokens != decoded.trace.tokens).any(axis=(0, 2)).sum() >= 3


def test_the_random_order_is_uniform():
    batch = tiny.one_a_row([([5], [6, 7, 8])] * 600, length=10)
    trace = decode_table(batch, order="random", num_steps=None).trace.tokens
    first = (trace[1] != MASK)[:, 1:4].argmax(axis=1)
    last = (trace[2] == MASK)[:, 1:4].argmax(axis=1)
    orders = np.bincount(3 * first + last, minlength=9).reshape(3, 3)
    assert (np.diag(orders) == 0).all()
    assert np.abs(orders[~np.eye(3, dtype=bool)] - 100).max() < 5 * np.sqrt(600 * 5 / 36)


def test_tokens_come_as_often_as_their_probability_and_score_as_the_model_has_them():
    rows = 3000
    batch = tiny.one_a_row([([5], [6])] * rows, length=10)
    decoded = decode_table(batch, num_steps=1, temperature=0.7, top_k=5)
    found = log_probabilities(np.array([5, MASK] + [0] * 8))[1]
    weights = np.where(found >= np.sort(found)[-5], np.exp(found / 0.7), 0)
    expected = weights / weights.sum()
    share = np.bincount(decoded.tokens[:, 1], minlength=MASK) / rows
    assert (np.abs(share - expected) <= 5 * np.sqrt(expected * (1 - expected) / rows)).all()
    np.testing.assert_allclose(decoded.scores, found[decoded.tokens[:, 1]], rtol=1e-5)


def test_choose_takes_the_surest_whatever_the_numbers_are():
    nan, inf = np.nan, np.inf
    sure = np.array([[0.5, 0.9, 0.5, 0.7], [-5.0, -inf, -9.0, 0.0], [nan, nan, nan, nan], [0.9, 0.9, 0.9, 0.9]])
    eligible = np.array([[1, 0, 1, 1], [1, 1, 1, 0], [0, 1, 1, 0], [0, 0, 0, 0]], bool)
    for count, expected in (
        ([0, 0, 0, 0], [[0, 0, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]]),
        ([2, 1, 1, 1], [[1, 0, 0, 1], [1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 0, 0]]),
        ([3, 2, 9, 9], [[1, 0, 1, 1], [1, 0, 1, 0], [0, 1, 1, 0], [0, 0, 0, 0]]),
    ):
        np.testing.assert_array_equal(choose(sure, eligible, jnp.array(count)), np.array(expected, bool))
    sure_enough = choose(sure, eligible, jnp.array([0, 1, 1, 1]), threshold=0.6)
    np.testing.assert_array_equal(sure_enough, np.array([[0, 0, 0, 1], [1, 0, 0, 0], [0, 1, 0, 0], [0] * 4], bool))


@functools.cache
def decoder(**settings):
    definition, _ = tiny.make_model(tiny.LLAMA)
    settings = MaskedDecoder(**settings)
    return jax.jit(lambda params, batch, key: settings.decode(definition.bind(params), batch, key, trace=True))


def decode(batch, **settings):
    return jax.device_get(decoder(**settings)(tiny.make_model(tiny.LLAMA)[1], batch, jax.random.key(0)))


def test_an_output_depends_on_its_own_inputs_alone():
    settings = {"num_steps": 4, "threshold": 0.3, "temperature": 0.7}
    whole = decode(BATCH, **settings)
    assert len(np.unique(masks_left(whole.trace.tokens[1]))) > 2

    def assert_same(batch, rows):
        found = decode(batch, **settings)
        np.testing.assert_array_equal(found.trace.tokens[..., :10], whole.trace.tokens[:, rows])
        np.testing.assert_array_equal(found.tokens[:, :10], whole.tokens[rows])
        np.testing.assert_allclose(found.scores, whole.scores[rows], rtol=1e-5)

    garbage = np.random.default_rng(1).integers(0, 24, BATCH.tokens.shape)
    assert_same(BATCH.replace(tokens=np.where(BATCH.target_mask, garbage, BATCH.tokens)), [0, 1, 2, 3, 4, 5])
    assert_same(tiny.rows_of(BATCH, [3, 4, 1, 0, 2, 5]), [3, 4, 1, 0, 2, 5])
    alone = tiny.rows_of(BATCH, [1])
    assert_same(jax.tree.map(lambda x: np.pad(x, ((0, 0), (0, 4))) if x.ndim == 2 else x, alone), [1])


def test_a_random_order_is_a_row_s_own():
    whole, part = (decode_table(b, order="random", num_steps=4) for b in (BATCH, tiny.rows_of(BATCH, [2, 0])))
    np.testing.assert_array_equal(part.trace.tokens, whole.trace.tokens[:, [2, 0]])


def test_nothing_to_write_takes_no_step():
    empty = tiny.rows_of(BATCH, [5] * len(BATCH.tokens))
    decoded = decode_table(empty, order="confidence", threshold=None, num_steps=3)
    assert decoded.steps == 0 and not decoded.scores.any()
    np.testing.assert_array_equal(decoded.tokens, empty.tokens)


@pytest.mark.parametrize(
    "bad",
    [
        {"num_steps": 0},
        {"order": "left"},
        {"threshold": 1.5},
        {"threshold": 0.5, "order": "entropy"},
        {"temperature": -1.0},
        {"top_p": 2.0},
    ],
    ids=str,
)
def test_bad_settings_are_refused(bad):
    with pytest.raises(UserError):
        MaskedDecoder(**bad)
