"""Decoders within a language, against the enumeration of all its texts."""

import dataclasses
import functools
import re

import jax
import numpy as np
import pytest
import spelled
import tiny
from scipy import stats
from variants import quick

from diffusion_t5x.decoding.allowed_texts import Span
from diffusion_t5x.decoding.autoregressive import AutoregressiveDecoder
from diffusion_t5x.decoding.beam_search import BeamSearchDecoder
from diffusion_t5x.decoding.block import BlockDecoder
from diffusion_t5x.decoding.drafts import DraftingDecoder
from diffusion_t5x.decoding.language import Language
from diffusion_t5x.decoding.masked import MaskedDecoder
from diffusion_t5x.decoding.self_speculation import SelfSpeculationDecoder
from diffusion_t5x.decoding.slots import SlotEngine
from diffusion_t5x.decoding.sundae import SundaeDecoder
from diffusion_t5x.decoding.windows import WindowDecoder
from diffusion_t5x.errors import UserError
from diffusion_t5x.models.masks import BIDIRECTIONAL
from diffusion_t5x.models.reading import Reading
from diffusion_t5x.models.sampling import forbid
from diffusion_t5x.partitioning import MeshConfig

pytest.importorskip("outlines_core")

PATTERNS = ["(a|b)*1?", "ab1|ba|ä+", "(ab){1,2}", "a*b[1ä]", ".*"]
LENGTH = 4
language = functools.cache(lambda pattern: Language(pattern, spelled.SHORT))
allowed = functools.cache(functools.partial(spelled.allowed, vocabulary=spelled.SHORT))


DEFINITION, PARAMS = spelled.make_model(spelled.SHORT, dataclasses.replace(tiny.RELATIVE, num_layers=1))
MODEL = DEFINITION.bind(PARAMS)
MASK = DEFINITION.vocabulary.mask_id


def make_batch(rows=3, length=LENGTH):
    """Rows with inputs of different lengths."""
    return tiny.one_a_row([([3 + row, 5] * (row % 3), [3] * length) for row in range(rows)], 4 + length)


def decode(decoder, batch, key=0, model=MODEL):
    run = jax.jit(lambda batch, key: decoder.decode(model, batch, key, trace=True))
    return jax.device_get(run(batch, jax.random.key(key)))


@jax.jit
def log_probabilities(tokens, batch):
    hidden = Reading.of(batch, MODEL.vocabulary, False).output(MODEL, tokens, BIDIRECTIONAL, None).hidden
    return jax.nn.log_softmax(forbid(MODEL.logits(hidden), MODEL.vocabulary))


def masked(batch):
    return np.where(batch.target_mask, MASK, batch.tokens)


def texts(decoded, batch):
    """The rows' tokens at their targets."""
    return [tokens[mask] for tokens, mask in zip(decoded.canvas, batch.target_mask, strict=True)]


def plain_decode(batch, row, pattern, num_steps):
    """Masked decoding by enumeration: the best text that has what is written, then its most confident tokens."""
    tokens, at = masked(batch), np.flatnonzero(batch.target_mask[row])
    candidates, left = allowed(pattern, length=len(at)), len(at)
    for step in range(num_steps):
        p = np.asarray(log_probabilities(tokens, batch))[row, at]
        open_ = tokens[row, at] == MASK
        fitting = candidates[(open_ | (candidates == tokens[row, at])).all(axis=1)]
        totals = np.where(open_, p[np.arange(len(at)), fitting], 0).sum(axis=1)
        best = fitting[np.argmax(totals)]
        assert np.sum(totals > totals.max() - 1e-4) == 1, "a tie"
        certainty = np.where(open_, p[np.arange(len(at)), best], -np.inf)
        count = -(-left // (num_steps - step))
        chosen = np.argsort(-certainty, kind="stable")[:count]
        tokens[row, at[chosen]] = best[chosen]
        left -= count
    return tokens[row, at]


slow = pytest.mark.slow


@pytest.mark.parametrize(
    ("pattern", "num_steps"),
    [
        (PATTERNS[0], 2),
        (PATTERNS[2], 1),
        *(pytest.param(pattern, steps, marks=slow) for pattern in PATTERNS for steps in (1, 2, 4)),
    ],
)
def test_masked_decoding_is_that_by_enumeration(pattern, num_steps):
    batch = make_batch()
    decoded = decode(MaskedDecoder(num_steps).within(language(pattern)), batch)
    for row, found in enumerate(texts(decoded, batch)):
        np.testing.assert_array_equal(found, plain_decode(batch, row, pattern, num_steps))


@pytest.mark.parametrize("pattern", [PATTERNS[0], *(pytest.param(pattern, marks=slow) for pattern in PATTERNS[1:3])])
def test_draws_are_in_proportion_to_the_products(pattern):
    """By a chi-square test with all texts that are expected five times, and the others together."""
    rows = 4000
    batch = tiny.one_a_row([([3, 4], [3] * LENGTH)] * rows)
    candidates = allowed(pattern, length=LENGTH)
    p = np.asarray(log_probabilities(masked(batch)[:1], tiny.rows_of(batch, [0])))[0, 2:]
    temperature = 0.7
    weights = np.exp(p[np.arange(LENGTH), candidates].sum(axis=1) / temperature)
    expected = rows * weights / weights.sum()
    decoder = MaskedDecoder(1, order="random", temperature=temperature).within(language(pattern))
    found = np.stack(texts(decode(decoder, batch), batch))
    counts = (found[:, None] == candidates).all(axis=-1).sum(axis=0)
    assert counts.sum() == rows
    common = expected >= 5
    counts, expected = (np.append(x[common], x[~common].sum()) for x in (counts, expected))
    if expected[-1] < 1e-6:
        counts, expected = counts[:-1], expected[:-1]
    assert len(expected) > 2 and stats.chisquare(counts, expected, sum_check=False).pvalue > 1e-4


DECODERS = {
    "masked": MaskedDecoder(3),
    "masked by threshold": MaskedDecoder(None, threshold=0.5),
    "masked, random order, drawn": MaskedDecoder(3, order="random", temperature=1.0),
    "masked by entropy": MaskedDecoder(2, order="entropy"),
    "masked in windows": MaskedDecoder(2, window=2),
    "masked, guided": MaskedDecoder(2, guidance=0.5),
    "blocks": BlockDecoder(3, MaskedDecoder(2)),
    "blocks, drawn": BlockDecoder(2, MaskedDecoder(2, temperature=1.0, order="sequential")),
    "blocks of the row": BlockDecoder(3, MaskedDecoder(2), "row"),
    "blocks of noise": BlockDecoder(3, SundaeDecoder(2, 1)),
    "sundae": SundaeDecoder(3, 2),
    "sundae, argmax": SundaeDecoder(4, 1, 0.0, "argmax_unrolled", stop_when_unchanged=True),
    "autoregressive": AutoregressiveDecoder(),
    "autoregressive, drawn": AutoregressiveDecoder(temperature=1.0, top_k=3),
}


@pytest.mark.parametrize("name", quick(DECODERS, ("masked", "blocks", "autoregressive, drawn")))
def test_all_decoders_write_only_texts_of_the_language(name):
    batch = make_batch(rows=12)
    decoder = DECODERS[name].within(language(PATTERNS[3]))
    decoded = decode(decoder, batch)
    possible = {tuple(row) for row in allowed(PATTERNS[3], length=LENGTH)}
    assert {tuple(row) for row in decoded.tokens[batch.target_mask].reshape(12, LENGTH)} <= possible
    assert np.isfinite(decoded.scores).all()
    alone = decode(decoder, tiny.rows_of(batch, [5]))
    np.testing.assert_array_equal(alone.tokens[0], decoded.tokens[5])


@pytest.mark.slow
@pytest.mark.parametrize("name", quick(DECODERS, ["autoregressive, drawn"]))
def test_rows_in_slots_write_what_each_does_alone(name):
    """Rows of different lengths, one of them with nothing to write; a row takes the slot of another."""
    sizes = [(2, 4), (0, 7), (1, 1), (3, 0), (0, 3), (2, 5), (1, 6)]
    rows = [tiny.one_a_row([([3] * inputs, [3] * size)], 8, first_id=n) for n, (inputs, size) in enumerate(sizes)]
    decoder = DECODERS[name].within(language(PATTERNS[3]))
    engine = SlotEngine(MeshConfig().make(), DEFINITION, PARAMS, decoder, num_slots=3, length=8)
    found = dict(engine.decode((number, row, 0) for number, row in enumerate(rows)))
    run = jax.jit(lambda batch: decoder.decode(MODEL, batch, jax.random.key(0)))
    for number, row in enumerate(rows):
        np.testing.assert_array_equal(found[number].tokens, run(row).tokens)
        (text,) = texts(found[number], row)
        assert not len(text) or tuple(found[number].tokens[row.target_mask]) in set(
            map(tuple, allowed(PATTERNS[3], length=len(text)))
        )


def test_sundae_writes_the_best_text_of_its_noise():
    batch = make_batch()
    decoded = decode(SundaeDecoder(1, 1, 0.0).within(language(PATTERNS[0])), batch)
    p, candidates = np.asarray(log_probabilities(decoded.trace.tokens[0], batch)), allowed(PATTERNS[0], length=LENGTH)
    for row, found in enumerate(texts(decoded, batch)):
        totals = p[row, batch.target_mask[row]][np.arange(LENGTH), candidates].sum(axis=1)
        np.testing.assert_array_equal(found, candidates[np.argmax(totals)])


def test_holes_are_texts_of_their_own_and_take_all_their_tokens():
    pattern = "a[ab1]*ä?"
    batch = tiny.one_a_row([([3, 4, 5, 6, 5, 4, 3, 6, 1, 0], [])])
    holes = np.isin(np.arange(10), [1, 2, 4, 5, 6])[None]
    batch = batch.replace(target_mask=holes)
    in_holes = DEFINITION.vocabulary.for_infilling()
    model = dataclasses.replace(DEFINITION, vocabulary=in_holes).bind(PARAMS)
    within = Language(pattern, spelled.SHORT, begins=False)
    for decoder in (MaskedDecoder(3), SundaeDecoder(2, 2)):
        decoded = decode(decoder.within(within), batch, model=model)
        for hole in ([1, 2], [4, 5, 6]):
            assert tuple(decoded.canvas[0, hole]) in set(map(tuple, allowed(pattern, length=len(hole), ends=False)))
        np.testing.assert_array_equal(decoded.canvas[~holes], batch.tokens[~holes])


def test_a_text_over_several_blocks_ends_within_the_row():
    # The model's own text would go on to the end of the row; only the last places have room for the end.
    pattern = "(ab1)+ba"
    batch = make_batch(rows=6, length=7)
    decoder = BlockDecoder(3, MaskedDecoder(2)).within(Language(pattern, spelled.SHORT))
    for tokens in decode(decoder, batch).tokens[batch.target_mask].reshape(6, 7):
        text = spelled.SHORT.decode([token for token in tokens if token > 1])
        assert re.fullmatch(pattern, text), text


def test_a_span_moves_on_over_targets_alone():
    within = language("ab1|ba|ä+")
    row, mask = np.array([[3, 7, 6]], np.int32), np.array([[True, False, False]])
    span = Span.whole(within, 1).advance(within, row, mask)
    assert (
        span.state[0] != within.start
        and span.state == Span.whole(within, 1).advance(within, row[:, :1], mask[:, :1]).state
    )


@pytest.mark.parametrize(
    ("decoder", "named"),
    [
        (MaskedDecoder(top_k=3), "top_k"),
        (MaskedDecoder(ends="last"), "ends"),
        (SundaeDecoder(temperature=0.5, update_share=0.5), "update_share"),
    ],
)
def test_settings_that_leave_no_text_are_refused(decoder, named):
    with pytest.raises(UserError, match=named):
        decoder.within(language("a"))


@pytest.mark.parametrize(
    "decoder", [WindowDecoder(4), SelfSpeculationDecoder(), DraftingDecoder(), BeamSearchDecoder()]
)
def test_decoders_that_keep_to_no_language_refuse_one(decoder):
    with pytest.raises(UserError, match=f"{type(decoder).__name__} takes neither --regex nor --json_schema"):
        decoder.within(language("a"))


def test_nor_do_they_take_an_inner_decoder_that_has_one():
    inner = MaskedDecoder(2).within(language("a"))
    for make in (lambda: WindowDecoder(4, inner), lambda: SelfSpeculationDecoder(BlockDecoder(4, inner))):
        with pytest.raises(UserError, match="an inner decoder that may write any text, not one within Language"):
            make()
