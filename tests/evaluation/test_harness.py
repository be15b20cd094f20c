"""Requests in token ids get the objective's likelihoods and the decoder's texts, whatever the batch."""

import dataclasses
import itertools

import jax
import numpy as np
import pytest
import tiny

from diffusion_t5x.decoding.autoregressive import AutoregressiveDecoder
from diffusion_t5x.decoding.masked import MaskedDecoder
from diffusion_t5x.errors import UserError
from diffusion_t5x.evaluation.harness import Harness, Rows
from diffusion_t5x.models.masks import CAUSAL, Slots
from diffusion_t5x.objectives.autoregressive import Autoregressive
from diffusion_t5x.objectives.masked import Masked
from diffusion_t5x.partitioning import MeshConfig

MESH = MeshConfig().make()
EOS, PAD = tiny.VOCABULARY.eos_id, tiny.VOCABULARY.pad_id
LENGTHS = {"inputs": 40, "targets": 24}
FREE = Rows(LENGTHS, context_eos=False, canvas=False, batch_size=4)
CANVAS = Rows(LENGTHS, context_eos=True, canvas=True, batch_size=4)
PAIRS = tiny.random_examples(0, [(3, 2), (0, 4), (30, 9), (1, 1), (3, 7), (12, 3), (2, 20)])
# Each once: of equal ones, the second one draws something else.
CONTEXTS = [*map(list, {tuple(x): None for x, _ in tiny.random_examples(1, [(1 + i % 9, 0) for i in range(40)])})]


@pytest.fixture(scope="module")
def made():
    return tiny.make_model(tiny.ROTARY)


def harness(made, objective, decoder, rows, **options):
    return Harness(MESH, *made, objective, decoder, rows, **options)


def alone(made, ask, inputs, targets):
    """The result of `ask(model, batch)` on the one row of an example, no longer than it is."""
    definition, params = made
    batch = tiny.one_a_row([(inputs, targets)])
    return jax.jit(lambda params: ask(definition.bind(params), batch))(params)


def likelihood(objective, key, draws):
    return lambda model, batch: objective.log_likelihood(model, batch, key, draws)


@pytest.mark.slow
def test_an_autoregressive_model(made):
    asked = harness(made, Autoregressive(), AutoregressiveDecoder(), FREE)
    expected = []
    for context, continuation in PAIRS:
        direct = alone(made, likelihood(Autoregressive(), None, 0), context, continuation)
        expected.append(float(direct.log_likelihood[0]))
        decoded = alone(made, lambda *x: AutoregressiveDecoder().decode(*x, jax.random.key(0)), context, continuation)
        written = decoded.tokens[0, len(context) :].tolist()
        text = list(itertools.takewhile(lambda token: token not in (EOS, PAD), written))
        assert asked.write([(context, len(continuation))]) == [text]
    np.testing.assert_allclose(asked.log_likelihoods(PAIRS), expected, rtol=1e-5)
    assert asked._likelihood._cache_size() == 2  # rows of 32 and 64 tokens
    texts = [(c, text) for c, text in zip(CONTEXTS, asked.write([(c, 3) for c in CONTEXTS]), strict=True) if text]
    assert texts and all(asked.are_greedy(texts)) and not any(asked.are_greedy(changed(texts)))


@pytest.mark.slow
def test_an_empty_context_is_the_start_token_of_a_model_that_reads_none():
    """As in the harness's own models, whose tokens all see it."""
    definition, params = tiny.make_model(dataclasses.replace(tiny.ROTARY, reads_start=False))
    definition = dataclasses.replace(definition, vocabulary=dataclasses.replace(tiny.VOCABULARY, start_id=21))
    asked = harness((definition, params), Autoregressive(), AutoregressiveDecoder(), FREE)
    text = [5, 7, 5, 9]
    tokens, places = np.array([[21, *text]], np.int32), np.arange(5, dtype=np.int32)[None]

    @jax.jit
    def predict(params):
        model = definition.bind(params)
        return model.logits(model(tokens, Slots(np.ones_like(places), places, places >= 0), CAUSAL, None).hidden)

    logits = predict(params)
    expected = jax.nn.log_softmax(logits[0, :-1].at[:, 23:].set(-np.inf))[np.arange(4), text].sum()
    found = asked.log_likelihoods([([], text), ([21], text)])
    np.testing.assert_allclose(found, [expected] * 2, rtol=1e-5)
    (written,) = asked.write([([], 1)])
    first = int(logits[0, 0, :23].argmax())
    assert written == ([] if first in (EOS, PAD) else [first])


def changed(pairs):
    return [(context, [*text[:-1], 3 + text[-1] % 16]) for context, text in pairs]


@pytest.mark.slow
@pytest.mark.parametrize("rows", [FREE, CANVAS])
def test_neighbours_and_padding_change_nothing(made, rows):
    objective, decoder = Masked(), MaskedDecoder(num_steps=4, temperature=1.0)
    asked = harness(made, objective, decoder, rows, num_draws=8)
    others = harness(made, objective, decoder, dataclasses.replace(rows, batch_size=3), num_draws=8)
    backwards = PAIRS[::-1]
    np.testing.assert_allclose(asked.log_likelihoods(PAIRS), others.log_likelihoods(backwards)[::-1], rtol=1e-5)
    contexts = [(context, 9) for context in CONTEXTS]
    texts = asked.write(contexts)
    assert texts == others.write(contexts[::-1])[::-1] and texts[2:3] == asked.write(contexts[2:3])
    longest = max(range(len(texts)), key=lambda i: len(texts[i]))
    again = asked.write([contexts[longest]] * 6)
    assert again[0] == texts[longest] and len({tuple(text) for text in again}) > 1  # asked twice: another sample
    greedy = harness(made, objective, dataclasses.replace(decoder, temperature=0.0), rows, num_draws=8)
    size = 24 if rows.canvas else 3
    found = list(zip(CONTEXTS, greedy.write([(context, size) for context in CONTEXTS]), strict=True))
    fitting = [(context, text) for context, text in found if (0 < len(text) < 24 if rows.canvas else len(text) == 3)]
    assert fitting and all(greedy.are_greedy(fitting)) and not any(greedy.are_greedy(changed(fitting)))


@pytest.mark.slow
def test_a_canvas_counts_as_a_whole(made):
    """The bound of continuation, EOS and padding, after the context and its EOS; a canvas of one token is exact."""
    context, continuation = PAIRS[0]
    asked = harness(made, Masked(), MaskedDecoder(), CANVAS, num_draws=512)
    canvas = [*continuation, EOS, *[PAD] * (24 - len(continuation) - 1)]
    direct = alone(made, likelihood(Masked(), jax.random.key(1), 512), [*context, EOS], canvas)
    assert abs(asked.log_likelihoods([PAIRS[0]])[0] - direct.log_likelihood[0]) < 6 * direct.standard_error[0]
    one = harness(made, Masked(), MaskedDecoder(), FREE, num_draws=2)
    exact = alone(made, likelihood(Masked(), jax.random.key(1), 2), context, continuation[:1]).log_likelihood[0]
    np.testing.assert_allclose(one.log_likelihoods([(context, continuation[:1])]), [exact], rtol=1e-5)


def test_what_is_too_long(made, caplog):
    asked = harness(made, Autoregressive(), AutoregressiveDecoder(), FREE)
    context, continuation = tiny.random_examples(1, [(100, 10)])[0]
    with caplog.at_level("WARNING", logger="diffusion_t5x"):
        (found,) = asked.log_likelihoods([(context, continuation)])
    assert "1 of 1 contexts are too long; their beginnings are cut off" in caplog.text
    assert found == asked.log_likelihoods([(context[-54:], continuation)])[0]
    with caplog.at_level("WARNING", logger="diffusion_t5x"):
        assert len(asked.write([(context, 50)])[0]) <= 24
    assert "1 of 1 texts may be longer than 24 tokens" in caplog.text
    with pytest.raises(UserError, match="A continuation of 65 tokens does not fit"):
        asked.log_likelihoods([([], [3] * 65)])
    with pytest.raises(UserError, match="A continuation of 25 tokens does not fit"):  # its EOS, too
        harness(made, Masked(), MaskedDecoder(), CANVAS, num_draws=2).log_likelihoods([([], [3] * 24)])
    with pytest.raises(UserError, match="must name inputs and targets"):
        Rows({"targets": 8}, context_eos=True, canvas=True)
    with pytest.raises(UserError, match="An encoder's inputs end with EOS"):
        Rows(LENGTHS, context_eos=False, canvas=False, architecture="encoder_decoder")


@pytest.mark.slow
def test_an_encoder_decoder():
    made = tiny.make_model(tiny.ENCODER_DECODER)
    rows = dataclasses.replace(FREE, context_eos=True, architecture="encoder_decoder")
    asked = harness(made, Autoregressive(), AutoregressiveDecoder(), rows)
    pairs = PAIRS[:3]
    for (context, continuation), found in zip(pairs, asked.log_likelihoods(pairs), strict=True):
        batch = tiny.pack_apart([[([*context, EOS], continuation)]], len(context) + 1, len(continuation))
        model = made[0].bind(made[1])
        expected = Autoregressive().log_likelihood(model, batch, None, 0).log_likelihood[0]
        np.testing.assert_allclose(found, expected, rtol=1e-5)
