"""Autoregressive decoding against a loop without a cache."""

import dataclasses
import functools

import jax
import numpy as np
import pytest
import tiny

from diffusion_t5x.decoding.autoregressive import AutoregressiveDecoder
from diffusion_t5x.errors import UserError
from diffusion_t5x.models.reading import shift_right, shifted_slots

# A start token that is not pad; inputs of many lengths, none in row 2, and a filler row without anything.
VOCABULARY = dataclasses.replace(tiny.VOCABULARY, start_id=21)
SIZES = [(2, 7), (6, 7), (0, 7), (4, 7), (1, 7), (3, 7)]
BATCH = tiny.one_a_row([*tiny.random_examples(0, SIZES), ([], [])])


CONFIGS = {
    "relative": tiny.RELATIVE,
    "rotary": tiny.LLAMA,
    "no start token": dataclasses.replace(tiny.GPT2, reads_start=False),
}


@functools.cache
def make_model(name):
    """A random model that ends its outputs now and then: EOS is likely enough."""
    definition, params = tiny.make_model(CONFIGS[name])
    if name == "rotary":
        params["head"] = params["head"].at[:, 1].multiply(2.0)
    else:
        params["embedding"] = params["embedding"].at[1].multiply(4.0)
    return dataclasses.replace(definition, vocabulary=VOCABULARY), params


@functools.partial(jax.jit, static_argnums=(0, 1))
def run(definition, decoder, params, batch, key):
    return decoder.decode(definition.bind(params), batch, key, trace=True)


def decode(name, batch=BATCH, seed=0, **settings):
    definition, params = make_model(name)
    return jax.device_get(run(definition, AutoregressiveDecoder(**settings), params, batch, jax.random.key(seed)))


@functools.cache
def log_probabilities(name, prefix):
    """Jitted, of a batch: of every position, without any cache; MASK and what is no id cannot come."""
    definition, _ = make_model(name)
    kind = AutoregressiveDecoder(prefix=prefix).attention

    @jax.jit
    def of(params, batch):
        model = definition.bind(params)
        logits = model.logits(
            model(shift_right(batch.tokens, batch.positions, 21), shifted_slots(batch, model.vocabulary), kind).hidden
        )
        return jax.nn.log_softmax(logits.at[..., 23:].set(-np.inf))

    return lambda batch: np.asarray(of(make_model(name)[1], batch))


def greedy_loop(name, prefix):
    """Tokens and scores, one token at a time from whole forward passes."""
    tokens, scores = np.where(BATCH.target_mask, 0, BATCH.tokens), np.zeros(len(BATCH.tokens))
    done = ~BATCH.target_mask.any(axis=1)
    for slot in range(BATCH.tokens.shape[1]):
        found = log_probabilities(name, prefix)(BATCH.replace(tokens=tokens))[:, slot]
        for row in np.flatnonzero(BATCH.target_mask[:, slot] & ~done):
            tokens[row, slot] = found[row].argmax()
            scores[row] += found[row].max()
            done[row] = tokens[row, slot] in (0, 1)
    return tokens, scores


@pytest.mark.parametrize("prefix", [False, True])
@pytest.mark.parametrize("name", CONFIGS)
def test_cached_decoding_gives_the_tokens_of_a_loop_without_cache(name, prefix):
    tokens, scores = greedy_loop(name, prefix)
    decoded = decode(name, prefix=prefix)
    np.testing.assert_array_equal(decoded.tokens, tokens)
    np.testing.assert_allclose(decoded.scores, scores, rtol=1e-5, atol=1e-6)
    ends = (tokens == 1).any(axis=1)
    assert 0 < ends[:-1].sum() < 6  # some outputs end before their canvas does, some do not
    assert len(np.unique(tokens)) > 5
    assert decoded.steps == 7


@pytest.mark.parametrize("name,settings", [("rotary", {}), ("relative", {"temperature": 1.0})])
def test_outputs_end_at_eos(name, settings):
    tokens = decode(name, **settings).tokens
    targets = [row[mask].tolist() for row, mask in zip(tokens, BATCH.target_mask, strict=True)]
    ended = [target for target in targets if 1 in target]
    assert ended and all(set(target[target.index(1) + 1 :]) <= {0} for target in ended)


def test_sampled_tokens_come_as_often_as_their_probability():
    rows = 4000
    batch = tiny.one_a_row([([5, 6, 7], [0])] * rows)
    weights = np.exp(log_probabilities("relative", False)(tiny.rows_of(batch, [0]))[0, 3] / 0.7)
    kept = weights >= np.sort(weights)[-5]
    expected = np.where(kept, weights, 0) / weights[kept].sum()
    tokens = decode("relative", batch, temperature=0.7, top_k=5).tokens[:, 3]
    share = np.bincount(tokens, minlength=32) / rows
    assert (np.abs(share - expected) <= 5 * np.sqrt(expected * (1 - expected) / rows)).all()


def test_other_seeds_give_other_samples():
    first, again, other = (decode("relative", seed=seed, temperature=1.0).tokens for seed in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert (first != other).any()


def test_trace_shows_the_rows_before_and_after_each_step():
    decoded = decode("relative")
    canvases = decoded.trace.tokens
    np.testing.assert_array_equal(canvases[0], np.where(BATCH.target_mask, 0, BATCH.tokens))
    np.testing.assert_array_equal(canvases[-1], decoded.tokens)
    written = np.cumsum(BATCH.target_mask, axis=1) * BATCH.target_mask
    for step, canvas in enumerate(canvases):
        expected = np.where(written <= step, decoded.tokens, 0)
        np.testing.assert_array_equal(canvas, np.where(BATCH.target_mask, expected, BATCH.tokens))


@pytest.mark.parametrize("settings", [{}, {"temperature": 0.5, "top_k": 3}], ids=str)
def test_confidences_are_the_probabilities_at_temperature_1(settings):
    """One pass over the finished rows says them all. What stands behind an end was never written."""
    decoded = decode("rotary", **settings)
    found = log_probabilities("rotary", False)(BATCH.replace(tokens=decoded.tokens))
    found = np.exp(np.take_along_axis(found, decoded.tokens[..., None], axis=-1)[..., 0])
    for step, confidence in enumerate(decoded.trace.confidence):
        written = (decoded.written_at >= 0) & (decoded.written_at < step)
        np.testing.assert_allclose(confidence, np.where(written, found, 0), rtol=1e-4)
    assert (confidence[BATCH.target_mask] == 0).any()


def test_nothing_to_write_takes_no_step():
    empty = tiny.rows_of(BATCH, [6] * len(BATCH.tokens))
    decoded = decode("relative", empty)
    assert decoded.steps == 0 and not decoded.scores.any()
    np.testing.assert_array_equal(decoded.tokens, empty.tokens)


@pytest.mark.parametrize("bad", [{"temperature": -1.0}, {"top_k": 0}, {"top_p": 2.0}])
def test_bad_settings_are_refused(bad):
    with pytest.raises(UserError):
        AutoregressiveDecoder(**bad)
