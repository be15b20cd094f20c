"""LLaDA2.1's token editing, id for id. Its model is not imported: the tests have their own."""

import functools

import jax
import numpy as np
import pytest
from llada2_moe import Llada2Moe
from published_diffusion import DATA, generation, needs_data, reference, settings, to_write

from diffusion_t5x.decoding.block import BlockDecoder
from diffusion_t5x.decoding.editing import EditingDecoder
from diffusion_t5x.models.masks import AttentionKind, Slots

FAMILY = "llada21_moe"
pytestmark = needs_data


@functools.cache
def model():
    said, _ = reference(FAMILY)
    return Llada2Moe(DATA / FAMILY, said["mask_id"], said["eos_id"])


def test_the_logits_of_this_model_are_the_published_ones():
    _, arrays = reference(FAMILY)
    there = arrays["attention_mask"] > 0
    positions = np.broadcast_to(np.arange(there.shape[1]), there.shape)
    slots = Slots(segment_ids=there.astype(np.int32), positions=positions, is_input=np.zeros_like(there))
    mask = AttentionKind("block_causal", 8, "row").mask(slots, slots)
    found = np.asarray(jax.jit(model().logits)(arrays["input_ids"], positions, mask))
    np.testing.assert_allclose(found[there], arrays["logits_block8"][there], rtol=0, atol=2e-4)


@pytest.mark.parametrize("name", settings(FAMILY))
def test_texts_are_the_published_ones_id_for_id(name):
    chosen = settings(FAMILY)[name]
    size, length = chosen["block_length"], chosen["gen_length"]
    prompts, outputs = generation(FAMILY, name)
    decoder = BlockDecoder(
        size,
        EditingDecoder(
            chosen["threshold"],
            min(chosen["editing_threshold"], 1.0),
            min_tokens=chosen.get("num_to_transfer", 1),
            extra_steps=chosen["max_post_steps"],
            softmax="all",
        ),
        "row",
    )
    # The last block is whole there: targets up to its end, of which those of gen_length are kept.
    batches = [
        to_write([prompt], length + -(len(prompt) + length) % size, model().vocabulary.pad_id) for prompt in prompts
    ]
    width = max(batch.tokens.shape[1] for batch in batches)
    batch = jax.tree.map(
        lambda *rows: np.concatenate([np.pad(x, ((0, 0), (0, width - x.shape[1]))) if x.ndim > 1 else x for x in rows]),
        *batches,
    )
    decoded = jax.device_get(jax.jit(lambda batch: decoder.decode(model(), batch, jax.random.key(0)))(batch))
    for row, prompt, output in zip(decoded.canvas, prompts, outputs, strict=True):
        np.testing.assert_array_equal(row[len(prompt) :][: len(output)], output)
        assert len(output) == length or output[-1] == model().vocabulary.eos_id
