"""Promises of every decoder, the project's and the one of docs/extending.md."""

import dataclasses
import functools

import jax
import numpy as np
import pytest
import tiny
from my_remasking import RemaskingDecoder
from variants import quick

from diffusion_t5x.decoding.ancestral import AncestralDecoder
from diffusion_t5x.decoding.autoregressive import AutoregressiveDecoder
from diffusion_t5x.decoding.beam_search import BeamSearchDecoder
from diffusion_t5x.decoding.block import BlockDecoder
from diffusion_t5x.decoding.canvas import StepRule
from diffusion_t5x.decoding.credit import CreditDecoder
from diffusion_t5x.decoding.decoder import Decoder
from diffusion_t5x.decoding.drafts import DraftingDecoder
from diffusion_t5x.decoding.editing import EditingDecoder
from diffusion_t5x.decoding.entropy_bounded import EntropyBoundedDecoder
from diffusion_t5x.decoding.masked import MaskedDecoder
from diffusion_t5x.decoding.remasking import RemaskingDecoder as Remasking
from diffusion_t5x.decoding.resizing import ResizingDecoder
from diffusion_t5x.decoding.self_speculation import SelfSpeculationDecoder
from diffusion_t5x.decoding.sundae import SundaeDecoder
from diffusion_t5x.decoding.windows import WindowDecoder

RULES = {
    "masked": MaskedDecoder(num_steps=3),
    "masked by threshold": MaskedDecoder(num_steps=None, threshold=0.3),
    "masked in windows": MaskedDecoder(num_steps=3, window=4, counts="linear", softmax="all", ends="last"),
    "masked by margin": MaskedDecoder(num_steps=None, threshold=0.2, order="margin"),
    "entropy bounded": EntropyBoundedDecoder(bound=2.0, temperature=1.0),
    "credit": CreditDecoder(0.3),
    "editing": EditingDecoder(0.3, 0.1, extra_steps=3),
    "ancestral": AncestralDecoder(num_steps=3),
    "sundae": SundaeDecoder(num_steps=3, num_samples=1),
    "sundae, a share": SundaeDecoder(num_steps=4, num_samples=1, update_share=0.5, stop_when_unchanged=True),
    "argmax unrolled": SundaeDecoder(4, 1, 0.0, "argmax_unrolled", 0.5),
    "remasking": RemaskingDecoder(num_steps=6, cap=0.3),
    "remasking in a loop": Remasking(6, eta=0.5, loop=(0.7, 0.3, 0.6), by_confidence=True),
}
DECODERS = {
    **RULES,
    **{f"blocks, {name}": BlockDecoder(3, rule) for name, rule in RULES.items()},
    **{f"windows, {name}": WindowDecoder(3, RULES[name]) for name in ("masked", "editing", "sundae", "remasking")},
    "windows, the rest read on": WindowDecoder(3, RULES["masked by threshold"], "prefix", first_alone=True),
    "windows, guided": WindowDecoder(3, MaskedDecoder(2, guidance=0.5), refresh_every=2, refresh_drift=0.01),
    "masked, guided": MaskedDecoder(num_steps=3, guidance=0.5, ends="never", counts="times", softmax="filtered"),
    "blocks of the row": BlockDecoder(3, MaskedDecoder(num_steps=2), "row"),
    "sundae, samples": SundaeDecoder(num_steps=3, num_samples=2),
    "resizing": ResizingDecoder(threshold=0.5),
    "autoregressive": AutoregressiveDecoder(temperature=1.0),
    "beam search": BeamSearchDecoder(num_beams=2),
    "drafts": DraftingDecoder(3, temperature=1.0),
    "self-speculation": SelfSpeculationDecoder(),
    "self-speculation, blocks of the row": SelfSpeculationDecoder(BlockDecoder(4, MaskedDecoder(), "row")),
    "self-speculation, remasking": SelfSpeculationDecoder(BlockDecoder(3, RemaskingDecoder(num_steps=2))),
}
SMALL = dataclasses.replace(tiny.RELATIVE, num_layers=1)
CONFIGS = {
    "decoder_only": SMALL,
    "shifted": dataclasses.replace(SMALL, shifted=True),
    "encoder_decoder": dataclasses.replace(SMALL, architecture="encoder_decoder"),
}
CASES = [("decoder_only", name) for name in DECODERS]
CASES += [
    (config, name)
    for config in ("shifted", "encoder_decoder")
    for name in (
        "remasking",
        "blocks, remasking",
        "masked",
        "masked, guided",
        "windows, the rest read on",
        "windows, guided",
    )
]
SIZES = [(2, 7), (0, 5), (5, 6), (3, 0)]  # the last is a filler row
MASK = tiny.VOCABULARY.mask_id


def make_batch(config, seed=0):
    """One example a row, the same inputs whatever the seed of the targets."""
    inputs, targets = tiny.random_examples(0, SIZES), tiny.random_examples(seed, SIZES)
    examples = [(given, wanted) for (given, _), (_, wanted) in zip(inputs, targets, strict=True)]
    if config == "encoder_decoder":
        return tiny.pack_apart([[example] for example in examples], 5, 7)
    return tiny.one_a_row(examples, 11)


@functools.cache
def program(config, name):
    definition, params = tiny.make_model(CONFIGS[config])
    decoder = DECODERS[name]

    def decode(batch, key):
        return decoder.decode(definition.bind(params), batch, key, trace=True)

    return jax.jit(decode)


def decode(config, name, batch):
    return jax.device_get(program(config, name)(batch, jax.random.key(0)))


@pytest.mark.parametrize("name", DECODERS)
def test_it_is_a_setting_that_says_what_it_can(name):
    decoder = DECODERS[name]
    bases = type(decoder).__mro__
    assert Decoder in bases and decoder == dataclasses.replace(decoder) and hash(decoder) is not None
    assert not (decoder.left_to_right and decoder.fills_holes)
    assert decoder.fills_holes == (StepRule in bases or WindowDecoder in bases)
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(decoder, dataclasses.fields(decoder)[0].name, None)


SLOW = ("remasking in a loop", "blocks, remasking in a loop")  # almost as the example
QUICK = [case for case in CASES[: len(DECODERS)] if case[1] not in SLOW]
QUICK += [("shifted", "blocks, remasking"), ("encoder_decoder", "masked")]


@pytest.mark.parametrize(("config", "name"), quick(CASES, QUICK))
def test_it_writes_the_targets_and_nothing_else(config, name):
    batch = make_batch(config)
    decoded = decode(config, name, batch)
    kept = ~batch.target_mask
    np.testing.assert_array_equal(decoded.tokens[kept], batch.tokens[kept])
    written = batch.target_mask & (decoded.written_at >= 0)
    assert not (decoded.written_at[kept] >= 0).any()
    writable = [*range(0, 20), 20, 21, 22]
    assert np.isin(decoded.canvas[written], writable).all() and (decoded.tokens != MASK).all()
    # Behind the end there is padding; elsewhere a rule may leave what stood there, but never MASK.
    left = batch.target_mask & ~written
    assert ((decoded.tokens == 0) | (decoded.tokens == decoded.trace.tokens[0]))[left].all()
    # Where the text ends there is padding, and `num_tokens` counts up to there.
    for row, tokens in enumerate(decoded.tokens):
        text = tokens[batch.target_mask[row]]
        length = decoded.num_tokens[row]
        assert (text[length:] == 0).all() and not np.isin(text[: max(length - 1, 0)], [0, 1]).any()
    assert np.isfinite(decoded.scores).all()
    assert decoded.row_steps.max() <= decoded.steps and decoded.row_steps[-1] == decoded.num_tokens[-1] == 0
    trace = decoded.trace
    assert (trace.confidence >= 0).all() and (trace.confidence <= 1 + 1e-6).all()
    np.testing.assert_array_equal(
        trace.tokens[:, kept], np.broadcast_to(batch.tokens[kept], trace.tokens[:, kept].shape)
    )
    np.testing.assert_array_equal(trace.tokens[-1][written], decoded.canvas[written])


@pytest.mark.parametrize(("config", "name"), quick(CASES, QUICK))
def test_it_never_reads_the_targets(config, name):
    first, second = (decode(config, name, make_batch(config, seed)) for seed in (0, 1))
    targets = make_batch(config).target_mask
    np.testing.assert_array_equal(first.tokens[targets], second.tokens[targets])
    np.testing.assert_array_equal(first.scores, second.scores)


X64 = ("masked", "remasking", "blocks, sundae", "sundae, samples", "autoregressive", "beam search", "self-speculation")
X64 += ("windows, the rest read on", "windows, guided")


@pytest.mark.parametrize("name", quick(X64, ("masked", "autoregressive", "sundae, samples", "windows, guided")))
def test_64_bit_jax_changes_nothing(name):
    batch = make_batch("decoder_only")
    expected = decode("decoder_only", name, batch)
    definition, params = tiny.make_model(CONFIGS["decoder_only"])
    with jax.enable_x64(True):
        run = jax.jit(lambda batch, key: DECODERS[name].decode(definition.bind(params), batch, key, trace=True))
        found = jax.device_get(run(batch, jax.random.key(0)))
    for field in ("tokens", "canvas", "written_at", "row_steps", "steps", "num_tokens", "scores"):
        one, other = getattr(found, field), getattr(expected, field)
        assert one.dtype == other.dtype, field
        np.testing.assert_allclose(one, other, rtol=1e-4, err_msg=field)


@pytest.mark.parametrize("name", [name for name, decoder in DECODERS.items() if decoder.left_to_right])
def test_what_writes_from_left_to_right_writes_no_target_before_the_one_ahead_of_it(name):
    batch = make_batch("decoder_only")
    decoded = decode("decoder_only", name, batch)
    for row, at in enumerate(decoded.written_at):
        at = at[batch.target_mask[row]]
        count = np.sum(at >= 0)
        assert (at[:count] >= 0).all() and (np.diff(at[:count]) >= 0).all()


FILLERS = [name for name, decoder in DECODERS.items() if decoder.fills_holes]


@pytest.mark.parametrize("name", quick(FILLERS, [name for name in FILLERS if name not in SLOW]))
def test_what_fills_holes_writes_targets_that_stand_apart(name):
    batch = make_batch("decoder_only")
    holes = np.random.default_rng(0).random(batch.tokens.shape) < 0.5
    batch = batch.replace(target_mask=holes & (batch.segment_ids > 0))
    decoded = decode("decoder_only", name, batch)
    kept = ~batch.target_mask
    np.testing.assert_array_equal(decoded.canvas[kept], batch.tokens[kept])
    assert (decoded.canvas != MASK).all()


@pytest.mark.parametrize("name", [name for name, rule in RULES.items() if rule.keeps_written])
def test_a_rule_that_keeps_what_is_written_writes_mask_once(name):
    batch = make_batch("decoder_only")
    for how in (name, f"blocks, {name}"):
        tokens = decode("decoder_only", how, batch).trace.tokens
        assert ((tokens[1:] == tokens[:-1]) | (tokens[:-1] == MASK)).all()


def test_the_example_takes_back_what_it_wrote():
    batch = make_batch("decoder_only")
    for name in ("remasking", "blocks, remasking"):
        tokens = decode("decoder_only", name, batch).trace.tokens
        assert ((tokens[1:] == MASK) & (tokens[:-1] != MASK)).any()
