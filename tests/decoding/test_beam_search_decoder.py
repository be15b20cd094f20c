"""Beam search against all texts there are, and against the same search over plain lists."""

import dataclasses
import functools
import itertools

import jax
import numpy as np
import pytest
import tiny

from diffusion_t5x.data.vocabularies import TokenIds
from diffusion_t5x.decoding.autoregressive import AutoregressiveDecoder
from diffusion_t5x.decoding.beam_search import BeamSearchDecoder
from diffusion_t5x.errors import UserError
from diffusion_t5x.models.transformer import ModelDefinition
from diffusion_t5x.objectives.autoregressive import Autoregressive

PAD, EOS, MASK = 0, 1, 5
VOCABULARY = TokenIds(size=6, pad_id=PAD, eos_id=EOS, mask_id=MASK, start_id=PAD, noise_ranges=((0, 5),))
PIECES = range(2, 5)
# Inputs and canvases of many lengths, no inputs in row 2, one target in row 3, and a filler row without anything.
EXAMPLES = [([2, 4], [2] * 4), ([3, 3, 2], [2] * 3), ([], [2] * 4), ([4], [2]), ([2, 3, 4, 4], [2] * 4), ([], [])]
CONFIGS = {"relative": (tiny.RELATIVE, False), "llama": (tiny.LLAMA, True), "apart": (tiny.ENCODER_DECODER, False)}


def batch_of(examples, name):
    rows = [[example] for example in examples]
    return tiny.pack_apart(rows, 5, 5) if name == "apart" else tiny.pack(rows, 9)


@functools.cache
def make_model(name):
    """A random model for which no text need end soon, nor go on to the end of its canvas."""
    definition = ModelDefinition(CONFIGS[name][0], VOCABULARY)
    params = tiny.random_params(definition, seed=1)
    if "head" in params:
        params["head"] = params["head"].at[:, :2].multiply(0.3)
    else:
        params["embedding"] = params["embedding"].at[:2].multiply(0.3)
    return definition, params


@functools.cache
def decoder(name, decoder):
    definition, _ = make_model(name)
    return jax.jit(lambda params, batch: decoder.decode(definition.bind(params), batch, jax.random.key(0), trace=True))


def decode(name, batch=None, **settings):
    beam_search = BeamSearchDecoder(prefix=CONFIGS[name][1], **settings)
    batch = batch_of(EXAMPLES, name) if batch is None else batch
    return jax.device_get(decoder(name, beam_search)(make_model(name)[1], batch))


@functools.cache
def lattices(name):
    """Log-probabilities `[V]` of the next token by unended text, for each example: no cache, no beams."""
    definition, params = make_model(name)
    objective = Autoregressive(prefix=CONFIGS[name][1])

    @jax.jit
    def of(batch):
        model = definition.bind(params)
        logits = model.logits(objective.output(model, batch).hidden)
        return jax.nn.log_softmax(logits.at[..., MASK:].set(-np.inf))

    texts = list(itertools.product(PIECES, repeat=4))
    after = []
    for inputs, targets in EXAMPLES:
        batch = batch_of([(inputs, text) for text in texts], name)
        found = np.asarray(of(batch))
        after.append({})
        for row, text in enumerate(texts):
            values = found[row, batch.target_mask[row]]
            after[-1] |= {text[:number]: values[number] for number in range(len(targets))}
    return after


def penalty(length, alpha):
    return ((5 + length) / 6) ** alpha


def best_of_all(after, alpha):
    """The score and the text of the best of all that end, enumerated."""
    ended = []
    for text in after:
        total = sum(after[text[:number]][token] for number, token in enumerate(text))
        ended += [((total + after[text][end]) / penalty(len(text) + 1, alpha), (*text, end)) for end in (EOS, PAD)]
    return max(ended)


def searched(after, length, num_beams, alpha):
    """The score and the text of a beam search over lists; and the best live beam of each step."""
    number, live, finished, lived = 0, [(0.0, ())], [], []
    for number in range(1, length + 1):
        extended = [(total + after[text][token], (*text, token)) for total, text in live for token in range(MASK)]
        likeliest = sorted(extended, reverse=True)[: 2 * num_beams]
        finished += [(total / penalty(number, alpha), text) for total, text in likeliest if text[-1] in (EOS, PAD)]
        finished = sorted(finished, reverse=True)[:num_beams]
        live = [(total, text) for total, text in likeliest if text[-1] not in (EOS, PAD)][:num_beams]
        lived.append(live[0][1] if live else None)
        full = len(finished) == num_beams
        if not live or (full and finished[-1][0] >= live[0][0] / penalty(length, alpha)):
            break
    ways = finished or [(total / penalty(number, alpha), text) for total, text in live]
    return (*max(ways), lived)


def assert_texts(decoded, expected, batch):
    """Outputs and scores are the expected, with padding behind; inputs are as they were."""
    for row, (score, text) in enumerate(expected):
        targets = batch.target_mask[row]
        assert decoded.canvas[row, targets].tolist() == [*text, *[PAD] * (targets.sum() - len(text))]
        assert decoded.scores[row] == pytest.approx(score, rel=1e-4)
        assert (decoded.written_at[row, targets] >= 0).sum() == decoded.num_tokens[row] == len(text)
    np.testing.assert_array_equal(decoded.tokens, decoded.canvas)
    np.testing.assert_array_equal(decoded.tokens[~batch.target_mask], batch.tokens[~batch.target_mask])


@pytest.mark.parametrize(
    "name,alpha", [("relative", 0.0), ("relative", 0.6), ("relative", 4.0), ("llama", 0.6), ("apart", 0.6)]
)
def test_with_enough_beams_no_text_is_better(name, alpha):
    expected = [best_of_all(after, alpha) if after else (0.0, ()) for after in lattices(name)]
    assert_texts(decode(name, num_beams=70, length_penalty=alpha), expected, batch_of(EXAMPLES, name))
    if alpha == 4.0:  # long enough to choose between
        assert len({len(text) for _, text in expected}) > 2


@pytest.mark.parametrize(
    "name,num_beams,alpha",
    [
        ("relative", 1, 0.0),
        ("relative", 2, 0.6),
        ("relative", 3, 2.0),
        ("llama", 2, 0.6),
        ("apart", 3, 2.0),
    ],
)
def test_few_beams_find_what_a_search_over_lists_finds(name, num_beams, alpha):
    batch = batch_of(EXAMPLES, name)
    decoded = decode(name, num_beams=num_beams, length_penalty=alpha)
    found = [
        searched(after, len(targets), num_beams, alpha)
        for after, (_, targets) in zip(lattices(name), EXAMPLES, strict=True)
    ]
    assert_texts(decoded, [(score, text) for score, text, _ in found], batch)
    assert decoded.row_steps.tolist() == [len(lived) for *_, lived in found]
    assert decoded.steps == max(decoded.row_steps)
    for row, (_, text, lived) in enumerate(found):
        targets = batch.target_mask[row]
        for step, confidence in enumerate(decoded.trace.confidence[: len(lived) + 1, row, targets]):
            shown = text if step == len(lived) else lived[step - 1] if step else ()
            canvas = decoded.trace.tokens[step, row, targets]
            assert canvas.tolist() == [*shown, *[PAD] * (len(canvas) - len(shown))]
            expected = [np.exp(lattices(name)[row][shown[:n]][token]) for n, token in enumerate(shown)]
            np.testing.assert_allclose(confidence, [*expected, *[0] * (len(canvas) - len(shown))], rtol=1e-4)


def test_without_an_end_the_likeliest_live_beam_is_the_output():
    """EOS and pad are no ids that can be written: a single beam is greedy then."""
    definition, params = make_model("llama")
    definition = dataclasses.replace(definition, vocabulary=dataclasses.replace(VOCABULARY, eos_id=31, pad_id=30))
    batch = batch_of(EXAMPLES, "llama")

    @jax.jit
    def both(params, batch):
        model, key = definition.bind(params), jax.random.key(0)
        decoders = AutoregressiveDecoder(prefix=True), BeamSearchDecoder(1, 0.0, prefix=True)
        return [decoder.decode(model, batch, key) for decoder in decoders]

    greedy, searched = both(params, batch)
    for name in ("canvas", "row_steps", "num_tokens", "written_at"):
        np.testing.assert_array_equal(getattr(searched, name), getattr(greedy, name))
    np.testing.assert_allclose(searched.scores, greedy.scores, rtol=1e-5, atol=1e-6)
    assert (greedy.row_steps == batch.target_mask.sum(axis=1)).all()


def test_an_output_depends_on_its_own_inputs_alone():
    batch = batch_of(EXAMPLES, "relative")
    whole = decode("relative", num_beams=3)
    garbage = np.random.default_rng(1).integers(0, 5, batch.tokens.shape)
    for changed, rows in (
        (batch.replace(tokens=np.where(batch.target_mask, garbage, batch.tokens)), range(6)),
        (
            jax.tree.map(lambda x: np.pad(x, ((0, 0), (0, 3))) if x.ndim == 2 else x, tiny.rows_of(batch, [3, 0])),
            [3, 0],
        ),
    ):
        found = decode("relative", changed, num_beams=3)
        np.testing.assert_array_equal(found.tokens[:, :9], whole.tokens[list(rows)])
        np.testing.assert_allclose(found.scores, whole.scores[list(rows)], rtol=1e-5)
        np.testing.assert_array_equal(found.row_steps, whole.row_steps[list(rows)])


@pytest.mark.parametrize("bad", [{"num_beams": 0}, {"length_penalty": -0.1}])
def test_bad_settings_are_refused(bad):
    with pytest.raises(UserError):
        BeamSearchDecoder(**bad)
