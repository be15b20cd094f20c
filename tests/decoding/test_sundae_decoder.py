"""SUNDAE decoding: its steps, scores and choice among samples worked out anew, and what its outputs may depend on."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from diffusion_t5x.decoding.sundae import SundaeDecoder
from diffusion_t5x.errors import UserError
from diffusion_t5x.models.masks import BIDIRECTIONAL, Slots

# Inputs of many lengths, none in row 2, and a filler row without anything.
SIZES = [(2, 7), (6, 7), (0, 7), (4, 7)]
BATCH = tiny.one_a_row([*tiny.random_examples(0, SIZES), ([], [])], first_id=40)


@functools.cache
def decoder(name, **settings):
    definition, _ = make_model(name)
    settings = SundaeDecoder(**settings)
    return jax.jit(lambda params, batch, key: settings.decode(definition.bind(params), batch, key, trace=True))


@functools.cache
def make_model(name):
    return tiny.make_model({"relative": tiny.RELATIVE, "rotary": tiny.LLAMA}[name])


def decode(name, batch=BATCH, seed=0, **settings):
    return jax.device_get(decoder(name, **settings)(make_model(name)[1], batch, jax.random.key(seed)))


@functools.cache
def log_probabilities(name):
    """Jitted, of a canvas: of every position; MASK and what is no id cannot come."""
    definition, params = make_model(name)

    @jax.jit
    def of(params, tokens):
        model = definition.bind(params)
        logits = model.logits(model(tokens, Slots.of(BATCH), BIDIRECTIONAL))
        return jax.nn.log_softmax(logits.at[..., 23:].set(-np.inf))

    return lambda tokens: np.asarray(of(params, tokens))


def ended(tokens):
    """What stands on a canvas up to its first EOS or pad, and pad after."""
    ends = [place for place, token in enumerate(tokens) if token in (0, 1)]
    return [token if not ends or place <= ends[0] else 0 for place, token in enumerate(tokens)]


@pytest.mark.parametrize("name", ["relative", "rotary"])
def test_greedy_steps_and_score_follow_from_whole_passes(name):
    decoded = decode(name, num_steps=4, num_samples=3, temperature=0.0)
    assert decoded.steps == 4 and decoded.trace.tokens.shape == (5, *BATCH.tokens.shape)
    targets = BATCH.target_mask
    for before, after in zip(decoded.trace.tokens, decoded.trace.tokens[1:], strict=False):
        found = log_probabilities(name)(before)
        np.testing.assert_array_equal(after, np.where(targets, found.argmax(-1), BATCH.tokens))
    # `found` is what the last step's reading gives: the score is that reading's own cross-entropy.
    wish = -np.take_along_axis(found, decoded.trace.tokens[-2][..., None], axis=-1)[..., 0]
    expected = [row[mask].mean() if mask.any() else 0 for row, mask in zip(wish, targets, strict=True)]
    np.testing.assert_allclose(decoded.scores, expected, rtol=1e-5)
    for row, mask, last in zip(decoded.tokens, targets, decoded.trace.tokens[-1], strict=True):
        assert row[mask].tolist() == ended(last[mask].tolist())
    assert (decoded.trace.tokens[1:] != decoded.trace.tokens[:-1]).any()


@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_confidences_are_the_probabilities_at_temperature_1(temperature):
    decoded = decode("rotary", num_steps=3, num_samples=2, temperature=temperature)
    assert not decoded.trace.confidence[0].any()
    canvases = decoded.trace.tokens
    for before, after, confidence in zip(canvases, canvases[1:], decoded.trace.confidence[1:], strict=False):
        found = np.take_along_axis(log_probabilities("rotary")(before), after[..., None], axis=-1)[..., 0]
        np.testing.assert_allclose(confidence, np.where(BATCH.target_mask, np.exp(found), 0), rtol=1e-4)


def test_inputs_never_change_and_noise_is_of_the_noise_vocabulary():
    decoded = decode("relative", num_steps=3, num_samples=2, temperature=0.7)
    targets = BATCH.target_mask
    for canvas in [*decoded.trace.tokens, decoded.tokens]:
        np.testing.assert_array_equal(canvas[~targets], BATCH.tokens[~targets])
    assert np.isin(decoded.trace.tokens[0][targets], tiny.VOCABULARY.noise_ids()).all()
    assert len(np.unique(decoded.trace.tokens[0][targets])) > 10
    assert (decoded.trace.tokens < 23).all()


@pytest.mark.parametrize("name", ["rotary"])
def test_an_output_depends_on_its_own_inputs_alone(name):
    settings = {"num_steps": 3, "num_samples": 2, "temperature": 0.7}
    whole = decode(name, **settings)

    def assert_same(batch, rows):
        found = decode(name, batch, **settings)
        np.testing.assert_array_equal(found.trace.tokens[..., : BATCH.tokens.shape[1]], whole.trace.tokens[:, rows])
        np.testing.assert_array_equal(found.tokens[:, : BATCH.tokens.shape[1]], whole.tokens[rows])
        np.testing.assert_allclose(found.scores, whole.scores[rows], rtol=1e-5)

    garbage = np.random.default_rng(1).integers(0, 24, BATCH.tokens.shape)
    assert_same(BATCH.replace(tokens=np.where(BATCH.target_mask, garbage, BATCH.tokens)), [0, 1, 2, 3, 4])
    assert_same(tiny.rows_of(BATCH, [3, 4, 1, 0, 2]), [3, 4, 1, 0, 2])
    assert_same(tiny.rows_of(BATCH, [1]), [1])
    assert_same(jax.tree.map(lambda x: np.pad(x, ((0, 0), (0, 4))) if x.ndim == 2 else x, BATCH), [0, 1, 2, 3, 4])
    assert (decode(name, seed=1, **settings).tokens != whole.tokens).any()


TABLE = np.random.default_rng(0).standard_normal((32, 32)).astype(np.float32)
TABLE[:, 23:] = 9.0  # MASK and what is no id would come first


def decode_table(batch, **settings):
    decoder = SundaeDecoder(**settings)
    return jax.device_get(
        jax.jit(
            lambda batch: decoder.decode(tiny.TableModel(jnp.asarray(TABLE)), batch, jax.random.key(0), trace=True)
        )(batch)
    )


def test_the_best_of_the_samples_is_kept():
    """Sample n is the same however many there are: one more either has a lower score and wins, or changes nothing."""
    batch = tiny.one_a_row(tiny.random_examples(0, [(2, 5)] * 30))
    before = decode_table(batch, num_steps=2, num_samples=1)
    after = decode_table(batch, num_steps=2, num_samples=3)
    assert (after.scores <= before.scores).all()
    better = after.scores < before.scores
    assert 10 <= better.sum() <= 28  # about two thirds of 30
    np.testing.assert_array_equal(after.trace.tokens[:, ~better], before.trace.tokens[:, ~better])
    assert (after.trace.tokens != before.trace.tokens).any(axis=(0, 2))[better].all()
    read = after.trace.tokens[-2]
    wish = np.log(np.exp(TABLE[read, :23]).sum(-1)) - TABLE[read, read]
    np.testing.assert_allclose(after.scores, wish[:, 2:].mean(axis=1), rtol=1e-5)


def test_canvases_start_uniform_and_are_sampled_at_the_temperature():
    rows, length = 400, 40
    batch = tiny.one_a_row([([], [5] * length)] * rows)
    trace = decode_table(batch, num_steps=2, num_samples=1, temperature=0.5).trace.tokens
    noise, count = tiny.VOCABULARY.noise_ids(), rows * length
    share = np.bincount(trace[0].reshape(-1), minlength=32)[noise] / count
    assert share.sum() == 1
    assert np.abs(share - 1 / len(noise)).max() < 5 * np.sqrt(1 / len(noise) / count)

    weights = np.where(np.arange(32) < 23, np.exp(TABLE / 0.5), 0)
    expected = weights / weights.sum(axis=1, keepdims=True)
    for before, after in ((trace[0], trace[1]), (trace[1], trace[2])):
        for token in (4, 15):
            written = after[before == token]
            share = np.bincount(written, minlength=32) / len(written)
            assert (np.abs(share - expected[token]) <= 6 * np.sqrt(expected[token] / len(written))).all()


@pytest.mark.parametrize("bad", [{"num_steps": 0}, {"num_samples": 0}, {"temperature": -0.1}])
def test_bad_settings_are_refused(bad):
    with pytest.raises(UserError):
        SundaeDecoder(**bad)
