"""The autoregressive loss against sums over separate forward passes, token by token."""

import dataclasses
import functools

import jax
import numpy as np
import pytest
import tiny

from diffusion_t5x.models.masks import CAUSAL, Slots
from diffusion_t5x.models.reading import shift_right, shifted_slots
from diffusion_t5x.objectives.autoregressive import Autoregressive

EXAMPLES = tiny.random_examples(0, [(2, 3), (1, 4), (3, 1), (0, 2)])
PADDED = tiny.one_a_row(EXAMPLES, length=11)
PACKED = tiny.pack([EXAMPLES[:2], EXAMPLES[2:]], 11)
# A start token that is not pad, so that one cannot stand for the other.
VOCABULARY = dataclasses.replace(tiny.VOCABULARY, start_id=21)


@functools.cache
def make_model(name):
    config = {"relative": tiny.RELATIVE, "rotary": tiny.LLAMA}[name]
    definition, params = tiny.make_model(config)
    return dataclasses.replace(definition, vocabulary=VOCABULARY), params


@functools.cache
def negative_log_likelihoods(name):
    """Negative log-likelihoods of each example's target tokens, by one forward pass per token over just its past."""
    definition, params = make_model(name)

    @jax.jit
    def last_log_probabilities(tokens):
        model = definition.bind(params)
        here = np.ones(tokens.shape, np.int32)
        slots = Slots(here, np.arange(tokens.shape[1])[None], here == 0)
        return jax.nn.log_softmax(model.logits(model(tokens, slots, CAUSAL).hidden))[0, -1]

    def of(inputs, targets):
        row = np.array([[21, *inputs, *targets]])
        return [-float(last_log_probabilities(row[:, : len(inputs) + 1 + n])[token]) for n, token in enumerate(targets)]

    return [of(*example) for example in EXAMPLES]


@pytest.mark.parametrize("batch", [PADDED, PACKED], ids=["padded", "packed"])
@pytest.mark.parametrize("name", ["relative", "rotary"])
def test_loss_is_the_sum_over_target_tokens(name, batch):
    definition, params = make_model(name)
    expected = negative_log_likelihoods(name)
    for normalize, total, count in (
        ("target_tokens", sum(map(sum, expected)), 10),
        ("sequences", sum(map(np.mean, expected)), 4),
    ):
        objective = Autoregressive(normalize=normalize)
        sums = jax.jit(lambda p: objective.loss(definition.bind(p), batch, None, train=False))(params)  # noqa: B023
        assert float(sums.loss.numerator) == pytest.approx(total, rel=1e-5)
        assert float(sums.loss.denominator) == pytest.approx(count)
        assert float(sums.metrics["nll"].mean()) == pytest.approx(sum(map(sum, expected)) / 10, rel=1e-5)


def test_smoothing_and_z_loss_change_the_loss_and_not_the_likelihood():
    definition, params = make_model("relative")

    @functools.partial(jax.jit, static_argnums=0)
    def loss(objective):
        return objective.loss(definition.bind(params), PADDED, None, train=False)

    plain, smooth, z = (loss(Autoregressive(**settings)) for settings in ({}, {"label_smoothing": 0.1}, {"z_loss": 1}))
    assert float(plain.metrics["nll"].mean()) == float(smooth.metrics["nll"].mean()) == float(z.metrics["nll"].mean())
    assert float(plain.loss.mean()) == float(plain.metrics["nll"].mean())
    assert abs(smooth.loss.mean() - plain.loss.mean()) > 1e-3 and z.loss.mean() > plain.loss.mean() + 1e-3


def test_shift_starts_anew_in_each_segment():
    batch = tiny.pack([[([5, 6], [7, 8]), ([], [9, 10, 11])]], 9)
    tokens = shift_right(batch.tokens, batch.positions, start_id=21)
    assert tokens[0, :7].tolist() == [21, 5, 6, 7, 21, 9, 10]
    # Slot 2 holds the last input and predicts the first target.
    assert shifted_slots(batch, VOCABULARY).is_input[0].tolist() == [
        True,
        True,
        True,
        False,
        True,
        False,
        False,
        False,
        False,
    ]


@pytest.mark.parametrize("config", [tiny.RELATIVE, tiny.LLAMA, tiny.GPT2])
def test_without_a_start_token_a_text_is_read_from_its_first_token(config):
    """Packed texts against each text alone, read as it is; only its first token is predicted from the start token."""
    definition, params = tiny.make_model(dataclasses.replace(config, reads_start=False))
    definition = dataclasses.replace(definition, vocabulary=VOCABULARY)
    found = jax.jit(lambda params: Autoregressive().output(definition.bind(params), PACKED).hidden)(params)

    @jax.jit
    def run(params, tokens, slots):
        return definition.bind(params)(tokens, slots, CAUSAL).hidden[0]

    def alone(tokens):
        places = np.arange(len(tokens), dtype=np.int32)[None]
        slots = Slots(np.ones_like(places), places, np.ones(places.shape, bool))
        return run(params, np.array([tokens], np.int32), slots)

    for row, segment in {(0, 1), (0, 2)}:
        here = PACKED.segment_ids[row] == segment
        states = np.asarray(found[row])[here]
        np.testing.assert_allclose(states[1:], alone(PACKED.tokens[row][here])[:-1], rtol=0, atol=2e-5)
        np.testing.assert_allclose(states[:1], alone([VOCABULARY.start_id]), rtol=0, atol=2e-5)


def test_a_start_token_that_the_inputs_hold_is_not_read_twice():
    definition, params = tiny.make_model(tiny.GPT2)
    definition = dataclasses.replace(definition, vocabulary=VOCABULARY)
    held, plain = ([21, 5, 6], [7, 8]), ([5, 6], [7, 8])
    read = jax.jit(lambda params, batch: Autoregressive().output(definition.bind(params), batch).hidden)
    found, expected = (read(params, tiny.one_a_row([example], 6)) for example in (held, plain))
    np.testing.assert_allclose(found[0, 1:5], expected[0, :4], rtol=0, atol=2e-5)


@functools.cache
def influence(prefix):
    """`[i, j]`: whether token j changes the loss of token i, in a packed row of (2 + 3) and (1 + 4) tokens."""
    definition, params = make_model("relative")
    row = tiny.rows_of(PACKED, [0])
    length = row.tokens.shape[1]
    batch = jax.tree.map(lambda x: np.repeat(x, length + 1, axis=0), row)
    batch.tokens[np.arange(length), np.arange(length)] = 22  # the last row is as it was

    @jax.jit
    def logits():
        model = definition.bind(params)
        tokens = shift_right(batch.tokens, batch.positions, 21)
        return model.logits(
            model(tokens, shifted_slots(batch, VOCABULARY), Autoregressive(prefix=prefix).attention).hidden
        )

    found = np.asarray(logits())
    return np.abs(found[:-1] - found[-1]).max(-1).T > 1e-6


@pytest.mark.parametrize("prefix", [False, True])
def test_a_token_is_predicted_from_what_is_before_it(prefix):
    targets, segments = PACKED.target_mask[0], PACKED.segment_ids[0]
    before = np.tri(11, k=-1, dtype=bool) & (segments[:, None] == segments)
    np.testing.assert_array_equal(influence(prefix)[targets], before[targets])


def test_inputs_see_each_other_both_ways_in_a_prefix():
    inputs = np.flatnonzero((~PACKED.target_mask & (PACKED.segment_ids == 1))[0])
    assert influence(True)[np.ix_(inputs, inputs)].all()
    assert not np.triu(influence(False)).any()
    assert not influence(True)[np.ix_(inputs, np.flatnonzero(PACKED.target_mask[0]))].any()


def test_accuracy_counts_the_likeliest_tokens():
    definition, params = make_model("relative")
    model = definition.bind(params)
    tokens = shift_right(PADDED.tokens, PADDED.positions, 21)
    best = np.argmax(model.logits(model(tokens, shifted_slots(PADDED, VOCABULARY), CAUSAL).hidden), axis=-1)
    half_right = np.where(np.arange(11) % 2 == 0, best, PADDED.tokens)
    # Only the labels change: the model goes on reading what it read.
    batch = PADDED.replace(tokens=np.where(PADDED.target_mask, half_right, PADDED.tokens))

    class SameReading:
        vocabulary, map_logits, encode = model.vocabulary, model.map_logits, model.encode

        def __call__(self, _, *args):
            return model(tokens, *args)

    accuracy = Autoregressive().loss(SameReading(), batch, None, train=False).metrics["accuracy"]
    correct = (best == batch.tokens)[PADDED.target_mask]
    assert 0.3 < correct.mean() < 1
    assert float(accuracy.mean()) == pytest.approx(correct.mean())


def test_dropout_runs_in_training_only():
    definition, params = tiny.make_model(dataclasses.replace(tiny.RELATIVE, dropout_rate=0.3))

    @functools.partial(jax.jit, static_argnums=1)
    def loss(seed, train):
        return Autoregressive().loss(definition.bind(params), PADDED, jax.random.key(seed), train).loss.mean()

    assert loss(0, False) == loss(1, False)
    assert len({float(x) for x in (loss(0, True), loss(1, True), loss(0, False))}) == 3
    assert loss(0, True) == loss(0, True)
