"""The encoder-decoder against a plain numpy one: packed rows, influence, the cache, and what it shares."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import plain
import pytest
import tiny

from diffusion_t5x.models.attention import KVCache
from diffusion_t5x.models.masks import BIDIRECTIONAL, CAUSAL, Slots
from diffusion_t5x.models.transformer import ModelDefinition

LLAMA = dataclasses.replace(tiny.LLAMA, architecture="encoder_decoder")
CONFIGS = {"t5": tiny.ENCODER_DECODER, "llama": LLAMA}
EXAMPLES = tiny.random_examples(0, [(5, 4), (3, 2)])
PACKED = tiny.pack_apart([EXAMPLES], 10, 8)  # two examples, and two slots of padding on either side
FOREIGN = 21  # a token that no example holds


def logits(config, kind):
    definition = ModelDefinition(config, tiny.VOCABULARY)

    @jax.jit
    def forward(params, batch):
        model = definition.bind(params)
        return model.logits(model(batch.tokens, Slots.of(batch), kind, model.encode(batch)).hidden)

    return forward


@pytest.mark.parametrize("kind", [CAUSAL, BIDIRECTIONAL], ids=lambda kind: kind.name)
@pytest.mark.parametrize("name", CONFIGS)
def test_packed_rows_against_a_plain_one(name, kind):
    config = CONFIGS[name]
    _, params = tiny.make_model(config)
    found = np.asarray(logits(config, kind)(params, PACKED))[0]
    for segment, (inputs, targets) in enumerate(EXAMPLES, start=1):
        mask = np.tri(len(targets), dtype=bool) if kind is CAUSAL else True
        expected = plain.transformer(config, params, np.array(targets), mask, np.array(inputs))
        np.testing.assert_allclose(found[PACKED.segment_ids[0] == segment], expected, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("name", CONFIGS)
def test_a_target_is_influenced_by_all_inputs_of_its_own_example_and_by_no_other(name):
    config = CONFIGS[name]
    _, params = tiny.make_model(config)
    slots = PACKED.encoder_tokens.shape[1]
    rows = jax.tree.map(lambda x: np.repeat(x, slots + 1, axis=0), PACKED)
    rows.encoder_tokens[np.arange(slots), np.arange(slots)] = FOREIGN  # row j has another token in encoder slot j
    found = np.asarray(logits(config, CAUSAL)(params, rows))
    change = np.abs(found[:-1] - found[-1]).max(axis=-1)  # [encoder slot, target slot]
    inputs, targets = PACKED.encoder_segment_ids[0], PACKED.segment_ids[0]
    same = (inputs[:, None] == targets) & (inputs[:, None] > 0)
    there = targets > 0
    assert (change[same] > 1e-5).all()
    assert (change[:, there][~same[:, there]] <= 1e-6).all()


@pytest.mark.parametrize("name", CONFIGS)
def test_token_by_token_over_the_cache_equals_one_pass(name):
    config = CONFIGS[name]
    definition, params = tiny.make_model(config)
    batch = tiny.pack_apart([[example] for example in tiny.random_examples(1, [(3, 6), (7, 6)])], 7, 6)

    @jax.jit
    def step_by_step(params):
        model = definition.bind(params)
        slots, encoded = Slots.of(batch), model.encode(batch)
        cache, found = KVCache.empty(config, slots), []
        for slot in range(6):
            at = jnp.full(2, slot)
            hidden, cache = model.extend(batch.tokens[:, slot, None], CAUSAL, cache, at, encoded)
            found.append(hidden)
        return model.logits(jnp.concatenate(found, axis=1))

    expected = logits(config, CAUSAL)(params, batch)
    np.testing.assert_allclose(step_by_step(params), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_dropout_reaches_the_encoder():
    config = dataclasses.replace(tiny.ENCODER_DECODER, dropout_rate=0.5)
    definition, params = tiny.make_model(config)
    model, keys = definition.bind(params), jax.random.split(jax.random.key(0), 1)
    clean, dropped = model.encode(PACKED), model.encode(PACKED, keys)
    assert not np.allclose(clean.keys, dropped.keys)
    np.testing.assert_array_equal(dropped.keys, model.encode(PACKED, keys).keys)


def test_layers_are_those_of_the_decoder_only_model():
    decoder_only = ModelDefinition(dataclasses.replace(tiny.RELATIVE, tie_embeddings=False), tiny.VOCABULARY).abstract()
    both = ModelDefinition(tiny.ENCODER_DECODER, tiny.VOCABULARY).abstract()
    assert both["encoder"] == decoder_only["decoder"]
    cross = ("cross_attention", "cross_attention_norm")
    shared = {name: value for name, value in both["decoder"]["blocks"].items() if name not in cross}
    assert shared == decoder_only["decoder"]["blocks"]
    assert both["decoder"]["blocks"]["cross_attention"] == decoder_only["decoder"]["blocks"]["attention"]
