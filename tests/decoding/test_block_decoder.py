"""Block decoding against the same without a cache, and where outputs end."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from variants import quick

from diffusion_t5x.decoding.block import BlockDecoder
from diffusion_t5x.decoding.canvas import Canvas
from diffusion_t5x.decoding.masked import MaskedDecoder
from diffusion_t5x.decoding.sundae import SundaeDecoder
from diffusion_t5x.errors import UserError
from diffusion_t5x.models.attention import KVCache
from diffusion_t5x.models.config import ModelConfig
from diffusion_t5x.models.layers import fold_in
from diffusion_t5x.models.masks import AttentionKind, Slots
from diffusion_t5x.models.reading import start_first
from diffusion_t5x.models.streams import row_keys, stream
from diffusion_t5x.models.transformer import ModelDefinition

VOCABULARY = tiny.VOCABULARY
MASK, EOS = VOCABULARY.mask_id, VOCABULARY.eos_id
# Inputs of many lengths, none in row 2; fewer targets than the others have in row 3; a filler row without anything.
SIZES = [(2, 7), (6, 7), (0, 7), (4, 3), (1, 7)]
BATCH = tiny.one_a_row([*tiny.random_examples(0, SIZES), ([], [])])
CONFIGS = {"relative": tiny.RELATIVE, "llama": tiny.LLAMA}
INNER = {
    "static": MaskedDecoder(num_steps=2),
    "one a step": MaskedDecoder(num_steps=None, order="margin"),
    "threshold": MaskedDecoder(num_steps=None, threshold=0.15),
    "sampled": MaskedDecoder(num_steps=2, temperature=1.0, order="random"),
}


@functools.cache
def make_model(name):
    """Random, and never at an end: the head knows no EOS and no pad, so that every block is written."""
    config = dataclasses.replace(CONFIGS[name], tie_embeddings=False)
    definition = ModelDefinition(config, dataclasses.replace(VOCABULARY, eos_id=31, pad_id=30))
    return definition, tiny.random_params(definition)


@functools.partial(jax.jit, static_argnums=(0, 1))  # compiled once, for all tests
def run(definition, decoder, params, batch):
    return decoder.decode(definition.bind(params), batch, jax.random.key(0), trace=True)


def decode(name, decoder, batch=BATCH):
    definition, params = make_model(name)
    return jax.device_get(run(definition, decoder, params, batch))


@functools.partial(jax.jit, static_argnums=(0, 1))  # one program for all that is written by its hidden states
def read(definition, attention, params, canvas, batch):
    return definition.bind(params)(
        start_first(canvas, batch.positions, definition.vocabulary), Slots.of(batch), attention
    ).hidden


@functools.partial(jax.jit, static_argnums=(0, 1))
def write(definition, inner, params, hidden, canvas, eligible, step, batch):
    keys = fold_in(stream(row_keys(jax.random.key(0), batch.example_ids), "steps"), step)
    before = Canvas.start(canvas, eligible)
    before = before.replace(step=jnp.full_like(before.step, step))
    return inner.write(definition.bind(params), hidden, before, eligible, batch.positions, keys)


def uncached(name, decoder, batch=BATCH):
    """Block after block from passes over whole rows."""
    definition, params = make_model(name)
    canvas = np.where(batch.target_mask, MASK, batch.tokens)
    index = batch.positions if decoder.blocks_from == "row" else np.cumsum(batch.target_mask, axis=1) - 1
    total = np.zeros(len(canvas))
    for block in range(-(-batch.tokens.shape[1] // decoder.block_size)):
        here = batch.target_mask & (index // decoder.block_size == block)
        step = 0
        while (eligible := here & (canvas == MASK)).any():
            hidden = read(definition, decoder.attention, params, canvas, batch)
            written = jax.device_get(write(definition, decoder.inner, params, hidden, canvas, eligible, step, batch))
            canvas, total, step = written.tokens, total + written.score, step + 1
    return canvas, total / np.maximum(batch.target_mask.sum(1), 1)


# Each compiles for a second: every inner decoder with both models and both origins, every size.
QUICK = [
    ("relative", 3, "targets", "sampled"),
    ("llama", 4, "targets", "threshold"),
    ("relative", 1, "targets", "one a step"),
    ("llama", 16, "targets", "static"),
    ("relative", 3, "row", "threshold"),
    ("llama", 4, "row", "one a step"),
]
CASES = [
    *QUICK,
    ("relative", 3, "targets", "static"),
    ("llama", 4, "targets", "one a step"),
    ("relative", 1, "targets", "threshold"),
    ("llama", 16, "targets", "sampled"),
    ("relative", 3, "row", "sampled"),
    ("llama", 4, "row", "static"),
]


@pytest.mark.parametrize(("name", "size", "origin", "inner"), quick(CASES, QUICK))
def test_the_cache_changes_nothing(name, size, origin, inner):
    decoder = BlockDecoder(size, INNER[inner], origin)
    decoded = decode(name, decoder)
    tokens, scores = uncached(name, decoder)
    np.testing.assert_array_equal(decoded.tokens, tokens)
    np.testing.assert_allclose(decoded.scores, scores, rtol=1e-4, atol=1e-5)
    assert not (decoded.tokens == MASK).any()
    assert len(np.unique(decoded.tokens[BATCH.target_mask])) > 1


def test_steps_and_trace():
    decoded = decode("relative", BlockDecoder(3, MaskedDecoder(num_steps=2)))
    assert decoded.steps == 3 * 2 + 2  # blocks of 3, 3 and 1 targets; the last in one step; one pass each for the cache
    trace = decoded.trace.tokens
    np.testing.assert_array_equal(trace[0], np.where(BATCH.target_mask, MASK, BATCH.tokens))
    np.testing.assert_array_equal(trace[-1], decoded.tokens)
    written = (trace != MASK) | ~BATCH.target_mask
    assert (written[1:] >= written[:-1]).all()
    changed = (trace[1:] != trace[:-1]) & written[:-1]
    assert not changed.any()  # what is written stays


@pytest.mark.parametrize(
    "inner", [INNER["sampled"], SundaeDecoder(num_steps=2, num_samples=1)], ids=["masked", "sundae"]
)
def test_confidences_are_the_probabilities_at_temperature_1(inner):
    """Whatever a step wrote, a pass over the whole row before it gives the probability of; its own block apart."""
    definition, params = make_model("llama")
    decoder = BlockDecoder(3, inner)
    decoded = decode("llama", decoder)

    @jax.jit
    def probabilities(tokens):
        model = definition.bind(params)
        read = start_first(tokens, jnp.asarray(BATCH.positions), definition.vocabulary)
        logits = model.logits(model(read, Slots.of(BATCH), decoder.attention).hidden)
        return jax.nn.softmax(logits.at[..., 23:].set(-np.inf))

    written_at = np.full(BATCH.tokens.shape, -1)
    tokens, confidence = decoded.trace.tokens, decoded.trace.confidence
    for step in range(decoded.steps):
        found = np.take_along_axis(np.asarray(probabilities(tokens[step])), tokens[step + 1][..., None], axis=-1)[
            ..., 0
        ]
        written = confidence[step + 1] != confidence[step]
        np.testing.assert_allclose(confidence[step + 1][written], found[written], rtol=1e-4)
        assert not (tokens[step + 1] != tokens[step])[~written].any()
        written_at[written] = step % 3  # two steps a block, and the pass for the cache
    assert not confidence[0].any()
    np.testing.assert_array_equal(confidence[-1] > 0, BATCH.target_mask)
    np.testing.assert_array_equal(written_at, decoded.written_at)


class Writes:
    """Stands in for a model that is sure of one text, whatever it reads."""

    def __init__(self, text, batch):
        self.vocabulary, self.config = VOCABULARY, tiny.RELATIVE
        self.text = jnp.where(batch.target_mask, text, 0)
        self.text = jnp.pad(self.text, ((0, 0), (0, 8)))

    def encode(self, batch):
        return None

    def extend(self, tokens, kind, cache, write_at, encoded=None):
        rows = jax.vmap(lambda row, start: jax.lax.dynamic_slice_in_dim(row, start, tokens.shape[1]))
        return 30.0 * jax.nn.one_hot(rows(self.text, write_at), 32), cache

    def map_logits(self, fn, hidden, *per_position):
        return fn(hidden, *per_position)


@jax.jit  # compiled once, for all texts
def written(text, batch):
    return BlockDecoder(4, MaskedDecoder(num_steps=2)).decode(Writes(text, batch), batch, jax.random.key(0))


@pytest.mark.parametrize(
    "text,output,blocks",
    [
        ([5, 6, 7, 8, 9, 10, 11, 12], [5, 6, 7, 8, 9, 10, 11, 12], 2),  # no EOS: the whole canvas
        ([EOS, 6, 7, 8, 9, 10, 11, 12], [EOS, 0, 0, 0, 0, 0, 0, 0], 1),  # EOS first: nothing, after one block
        ([5, 6, EOS, 8, 9, 10, 11, 12], [5, 6, EOS, 0, 0, 0, 0, 0], 1),  # EOS inside a block: the rest of it is dropped
        ([5, 6, 7, EOS, 9, 10, 11, 12], [5, 6, 7, EOS, 0, 0, 0, 0], 1),  # EOS ends a block: no other is begun
        ([5, 6, 7, 8, EOS, 0, 0, 0], [5, 6, 7, 8, EOS, 0, 0, 0], 2),
        ([5, 0, 7, 8, 9, 10, 11, 12], [5, 0, 0, 0, 0, 0, 0, 0], 1),  # pad ends an output as well
    ],
)
def test_where_an_output_ends(text, output, blocks):
    batch = tiny.one_a_row([([3, 4], [19] * 8)])
    decoded = jax.device_get(written(jnp.asarray([0, 0, *text]), batch))
    assert decoded.tokens[0].tolist() == [3, 4, *output]
    assert decoded.steps == 3 * blocks


def flops(step, *arguments):
    """FLOPs of the compiled program. Layers must be unrolled: XLA counts the body of a scan once."""
    return jax.jit(step).lower(*arguments).compile().cost_analysis()["flops"]


def test_a_step_costs_what_its_block_costs_and_a_pass_over_all_ten_times_more():
    """2 operations for each parameter, 4 times width for each layer and cached slot; per token of the block."""
    size, length, rows = 8, 1024, 2
    config = ModelConfig(
        embed_dim=128, num_layers=4, num_heads=4, head_dim=32, mlp_dim=512, vocab_size=512, scan_unroll=True
    )
    definition = ModelDefinition(config, VOCABULARY)
    batch = tiny.one_a_row([([3] * 100, [4] * (length - 100))] * rows)
    kind = AttentionKind("block_causal", size)

    def cached(params, cache):
        model = definition.bind(params)
        hidden, _ = model.extend(jnp.zeros((rows, size), jnp.int32), kind, cache, jnp.full(rows, 500))
        return model.logits(hidden)

    def uncached(params, batch):
        model = definition.bind(params)
        hidden = model(batch.tokens, Slots.of(batch), kind).hidden
        return model.logits(jax.lax.dynamic_slice_in_dim(hidden, 500, size, axis=1))

    params = definition.abstract()
    step = flops(cached, params, jax.eval_shape(lambda: KVCache.empty(config, Slots.of(batch))))
    per_token = 2 * definition.num_params() + 4 * config.num_layers * 128 * length
    assert 0.8 * rows * size * per_token < step < 1.1 * rows * size * per_token
    assert flops(uncached, params, batch) > 10 * step


def test_several_samples_of_a_block_are_refused():
    with pytest.raises(UserError, match="inner must have num_samples = 1"):
        BlockDecoder(4, SundaeDecoder(num_samples=2))
