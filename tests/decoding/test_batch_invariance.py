"""A text depends on its own input alone: not on its neighbours, on padding, on the devices, or on a cache."""

import dataclasses
import functools
import json
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from hypothesis import given, settings
from hypothesis import strategies as st
from plain_decoding import TOLERANCE, PlainDecoding, is_tie, kind_of, reader
from variants import quick

from diffusion_t5x.decoding.autoregressive import AutoregressiveDecoder
from diffusion_t5x.decoding.block import BlockDecoder
from diffusion_t5x.decoding.masked import MaskedDecoder
from diffusion_t5x.decoding.sundae import SundaeDecoder
from diffusion_t5x.models.attention import KVCache
from diffusion_t5x.models.masks import Slots
from diffusion_t5x.models.reading import shift_right, shifted_slots, start_first

DECODERS = {
    "ar": AutoregressiveDecoder(),
    "ar, sampled": AutoregressiveDecoder(temperature=1.0),
    "sundae": SundaeDecoder(num_steps=3, num_samples=2, temperature=0.5),
    "masked": MaskedDecoder(num_steps=3, temperature=1.0),
    "masked by threshold": MaskedDecoder(num_steps=None, threshold=0.3),
    "block": BlockDecoder(3, MaskedDecoder(num_steps=2, temperature=1.0)),
    "uniform block": BlockDecoder(3, SundaeDecoder(num_steps=2, num_samples=1, temperature=0.5)),
}
CONFIGS = {
    "decoder_only": tiny.RELATIVE,
    "encoder_decoder": tiny.ENCODER_DECODER,
    "gpt2": tiny.GPT2,
    "shifted": dataclasses.replace(tiny.RELATIVE, shifted=True),
    "shifted encoder_decoder": dataclasses.replace(tiny.ENCODER_DECODER, shifted=True),
}
CASES = [("decoder_only", name) for name in DECODERS]
CASES += [("encoder_decoder", name) for name in ("ar, sampled", "sundae", "masked by threshold", "block")]
CASES += [("shifted", name) for name in ("sundae", "masked", "block")] + [("shifted encoder_decoder", "block")]
CASES += [("gpt2", name) for name in ("ar", "block")]
QUICK = [("decoder_only", name) for name in ("ar, sampled", "masked")]
QUICK += [("encoder_decoder", "masked by threshold"), ("shifted", "block"), ("gpt2", "ar")]
MOST = 6, 7  # tokens of input and of target
WIDER = 5
ON_EIGHT = ("ar, sampled", "sundae", "masked by threshold", "block", "uniform block")
EIGHT_ROWS = tiny.one_a_row(tiny.random_examples(5, [(n % 4, 7) for n in range(8)]), length=14, first_id=3)

# Every shape is a program to compile: texts alone have one shape, batches another.
some_rows = st.lists(
    st.tuples(st.integers(0, MOST[0]), st.integers(1, MOST[1]), st.integers(0, 99)), min_size=4, max_size=4
)


def make_batch(architecture, rows, wider=0):
    """One example a row, `(number of inputs, of targets, example id)`; `wider` adds padding."""
    examples = [tiny.random_examples(example_id, [size])[0] for *size, example_id in rows]
    if CONFIGS[architecture].architecture == "encoder_decoder":
        batch = tiny.pack_apart([[example] for example in examples], MOST[0] + wider, MOST[1] + wider)
    else:
        batch = tiny.one_a_row(examples, sum(MOST) + wider)
    return batch.replace(example_ids=np.array([example_id for *_, example_id in rows], np.int32))


@functools.cache
def make_model(architecture):
    return tiny.make_model(CONFIGS[architecture])


@functools.cache
def decode_step(architecture, decoder):
    definition, _ = make_model(architecture)
    return jax.jit(lambda params, batch, seed: decoder.decode(definition.bind(params), batch, jax.random.key(seed)))


def alone(architecture, decoder, row, seed):
    return PlainDecoding(*make_model(architecture), decoder, make_batch(architecture, [row]), seed)


@pytest.mark.parametrize(("architecture", "name"), quick(CASES, QUICK))
def test_a_text_alone_and_in_any_batch_with_any_padding(architecture, name):
    decoder, ties = DECODERS[name], []

    @settings(max_examples=6, deadline=None, derandomize=True, database=None)
    @given(some_rows, st.integers(0, 9))
    def check(rows, seed):
        _, params = make_model(architecture)
        batch = make_batch(architecture, rows, WIDER)
        decoded = jax.device_get(decode_step(architecture, decoder)(params, batch, seed))
        width = make_batch(architecture, rows[:1]).tokens.shape[1]
        for row, tokens in zip(rows, decoded.tokens, strict=True):
            ties.append(is_tie(tokens[:width], alone(architecture, decoder, row, seed)))
            assert (tokens[width:] == 0).all()

    check()
    print(f"{sum(ties)} ties in {len(ties)} texts")
    assert len(ties) >= 24 and sum(ties) <= 1


@pytest.mark.slow
def test_texts_on_eight_devices_are_those_of_one_alone(eight_devices):
    program = pathlib.Path(__file__).parents[1] / "helpers" / "decode_on_eight.py"
    done = subprocess.run(
        [sys.executable, program, pathlib.Path(__file__).parent],
        env=eight_devices,
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout)
    assert set(found) == {*ON_EIGHT, "ar, sampled, in slots", "block, in slots"}
    model, ties = make_model("decoder_only"), 0
    for name, texts in found.items():
        assert len(np.unique(texts)) > 5
        decoder = DECODERS[name.removesuffix(", in slots")]
        for row, tokens in enumerate(texts):
            plain = PlainDecoding(*model, decoder, tiny.rows_of(EIGHT_ROWS, [row]), seed=0)
            ties += is_tie(tokens, plain)
    print(f"{ties} ties in {8 * len(found)} texts")
    assert ties <= 1


def cached_logits(definition, decoder, params, batch):
    """Logits `[B, L, V]` of the targets' canvas, a block at a time over the cache; 0 where there is no target."""
    model, kind = definition.bind(params), kind_of(decoder)
    size = getattr(decoder, "block_size", 1)
    if isinstance(decoder, AutoregressiveDecoder):
        tokens, slots = (
            shift_right(batch.tokens, batch.positions, definition.vocabulary.start_id),
            shifted_slots(batch, definition.vocabulary),
        )
    else:
        tokens, slots = start_first(batch.tokens, batch.positions, definition.vocabulary), Slots.of(batch)
    tokens, slots = jax.tree.map(lambda x: jnp.pad(x, ((0, 0), (0, size))), (tokens, slots))
    length, rows = batch.tokens.shape[1], jnp.arange(len(tokens))[:, None]
    encoded = model.encode(batch)
    first = jnp.argmax(batch.target_mask, axis=1)
    _, cache = model.extend(tokens, kind, KVCache.empty(model.config, slots), jnp.zeros_like(first), encoded)

    def read_block(carry, block):
        found, cache = carry
        start = jnp.minimum(first + block * size, length)
        places = start[:, None] + jnp.arange(size)
        hidden, cache = model.extend(tokens[rows, places], kind, cache, start, encoded)
        return (found.at[rows, places].set(model.logits(hidden)), cache), None

    nothing = jnp.zeros((*tokens.shape, model.config.vocab_size))
    (found, _), _ = jax.lax.scan(read_block, (nothing, cache), jnp.arange(-(-MOST[1] // size)))
    return found[:, :length]


IN_PLACE = [case for case in CASES if case[1] in ("ar", "masked", "block") and not case[0].startswith("shifted")]


@pytest.mark.parametrize(("architecture", "name"), IN_PLACE)
def test_logits_alone_in_a_batch_and_cached_agree(architecture, name):
    definition, params = make_model(architecture)
    decoder = DECODERS[name]
    rows = [(0, 7, 1), (6, 7, 2), (3, 2, 3), (2, 5, 4)]
    batch = make_batch(architecture, rows, WIDER)
    read = reader(definition, type(decoder), kind_of(decoder))
    whole = {"in a batch": read(params, batch, batch.tokens)}
    if name != "masked":
        whole["cached"] = jax.jit(functools.partial(cached_logits, definition, decoder))(params, batch)
    for n, row in enumerate(rows):
        single = make_batch(architecture, [row])
        expected = np.asarray(read(params, single, single.tokens))[0][single.target_mask[0]]
        for how, found in whole.items():
            gap = np.abs(np.asarray(found)[n][batch.target_mask[n]] - expected).max()
            assert gap <= TOLERANCE * np.abs(expected).max(), how


def test_a_difference_is_a_tie_only_where_little_was_decided():
    plain = alone("decoder_only", DECODERS["ar"], (3, 5, 7), seed=0)
    other = plain.tokens.copy()
    assert not is_tie(other, plain)
    other[4] += 1
    assert plain.narrowest > 1e-3
    with pytest.raises(AssertionError, match="no gap is below"):
        is_tie(other, plain)
    definition, params = make_model("decoder_only")
    alike = params | {"embedding": jnp.broadcast_to(params["embedding"][3], params["embedding"].shape)}
    same = PlainDecoding(definition, alike, DECODERS["ar"], make_batch("decoder_only", [(3, 5, 7)]), 0)
    assert same.narrowest < TOLERANCE and is_tie(same.tokens + 1, same)
