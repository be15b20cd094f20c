"""Drafting and checking in one pass against token-by-token decoding: the same text, at any temperature."""

import dataclasses
import functools

import jax
import numpy as np
import pytest
import tiny
from plain_decoding import PlainDecoding, is_tie
from variants import quick

from diffusion_t5x.decoding.autoregressive import AutoregressiveDecoder
from diffusion_t5x.decoding.drafts import DraftingDecoder
from diffusion_t5x.models.low_rank import LowRank
from diffusion_t5x.training.lora import Lora, LoraDefinition

CONFIGS = {
    "relative": tiny.RELATIVE,
    "llama": tiny.LLAMA,
    "encoder_decoder": tiny.ENCODER_DECODER,
    "no start token": dataclasses.replace(tiny.LLAMA, reads_start=False),
}
CASES = [  # model, block size, temperature, top_k, top_p
    ("relative", 4, 0.0, None, None),
    ("relative", 2, 0.8, None, None),
    ("llama", 4, 0.8, None, 0.9),
    ("encoder_decoder", 3, 0.6, 3, None),
    ("no start token", 3, 0.0, None, None),
]
LIKELY = 7
SIZES = [(6, 9), (0, 9), (3, 5), (4, 1), (2, 0), (5, 8), (1, 9), (2, 7)]


def make_batch(name, seed=0):
    examples = tiny.random_examples(seed, SIZES)
    if name == "encoder_decoder":
        return tiny.pack_apart([[example] for example in examples], 6, 9)
    return tiny.one_a_row(examples, 15)


@functools.cache
def make_model(name):
    """A random model, with random updates that only drafts read; one token is likely, so drafts are right at times."""
    definition = LoraDefinition(CONFIGS[name], tiny.VOCABULARY, Lora(4, drafts_only=True))
    params = dict(tiny.make_model(CONFIGS[name])[1])
    if "head" in params:
        params["head"] = params["head"].at[:, LIKELY].multiply(5.0)
    else:
        params["embedding"] = params["embedding"].at[LIKELY].multiply(5.0)
    params = definition.adapt(params, jax.random.key(0))

    def trained(leaf):
        up = 0.03 * jax.random.normal(jax.random.key(1), leaf.up.shape) if isinstance(leaf, LowRank) else None
        return leaf if up is None else leaf.replace(up=up)

    return definition, jax.tree.map(trained, params, is_leaf=lambda leaf: isinstance(leaf, LowRank))


@functools.cache
def program(name, decoder):
    definition, params = make_model(name)
    return jax.jit(lambda batch, key: decoder.decode(definition.bind(params), batch, key, trace=True))


@pytest.mark.parametrize(("name", "size", "temperature", "top_k", "top_p"), quick(CASES, CASES[2:3]))
def test_the_text_is_that_of_decoding_token_by_token(name, size, temperature, top_k, top_p):
    plainly = AutoregressiveDecoder(temperature, top_k, top_p)
    drafting = DraftingDecoder(size, temperature, top_k, top_p)
    accepted = different = 0
    for seed in range(4):
        batch, key = make_batch(name, seed), jax.random.key(seed)
        found, expected = (jax.device_get(program(name, decoder)(batch, key)) for decoder in (drafting, plainly))
        for row in range(len(SIZES)):
            if (found.tokens[row] != expected.tokens[row]).any():
                assert temperature == 0
                definition, params = make_model(name)
                plain = PlainDecoding(definition, params, plainly, tiny.rows_of(batch, [row]), 0)
                assert is_tie(found.tokens[row], plain)
                different += 1
                continue
            np.testing.assert_allclose(found.scores[row], expected.scores[row], rtol=1e-4, atol=1e-5)
            written = expected.written_at[row] >= 0
            np.testing.assert_array_equal(found.written_at[row] >= 0, written)
            # Each pass writes one token of its own, and as many as it accepts.
            assert found.row_steps[row] == len(np.unique(found.written_at[row][written]))
            assert written.sum() - found.row_steps[row] <= found.num_accepted[row] <= written.sum()
        accepted += found.num_accepted.sum()
        assert found.steps == found.row_steps.max()
    assert accepted > 0 and different <= 1
