"""Published models of block diffusion: their logits, and what they write by the published decoding, id for id."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from published_diffusion import DATA, generation, needs_data, reference, settings, to_write

from diffusion_t5x import api
from diffusion_t5x.convert import convert
from diffusion_t5x.decoding.block import BlockDecoder
from diffusion_t5x.decoding.masked import MaskedDecoder
from diffusion_t5x.models.masks import AttentionKind, Slots
from diffusion_t5x.objectives.blocks import clean_and_noisy

pytest.importorskip("seqio")
pytestmark = needs_data
A2D = ("a2d-qwen3", "a2d-qwen2", "a2d-llama")


@pytest.fixture(scope="module")
def load(tmp_path_factory):
    """Imports a family's model once, and opens it."""

    @functools.cache
    def once(family):
        flags = ["--mask_id=157", "--block_size=4"] if family in A2D else []
        folder = tmp_path_factory.mktemp("published") / family
        convert(["from_hf", str(DATA / family), "--output", str(folder), *flags])
        return api.load(folder)

    return once


def test_what_an_import_says_of_its_blocks(load):
    assert load("sdar").decoder == BlockDecoder(
        4, MaskedDecoder(num_steps=4, counts="index", threshold=0.85, softmax="all"), blocks_from="row"
    )
    assert load("a2d-qwen3").decoder == BlockDecoder(4, MaskedDecoder(num_steps=4, counts="linear", softmax="all"))


@pytest.mark.parametrize("size", [4, 8])
def test_sdars_training_layout(size, load):
    """Theirs has the prompt in the noisy half, too: here as far as it shares a block with targets."""
    opened, (_, arrays) = load("sdar"), reference("sdar")
    kind = AttentionKind("block_diffusion", size, "row")

    @jax.jit
    def logits(params, tokens, slots):
        model = opened.definition.bind(params)
        return model.logits(model(tokens, slots, kind).hidden)

    for row, there in enumerate(arrays["train_mask"] > 0):
        clean, noisy = arrays["train_clean"][row][there], arrays["train_noisy"][row][there]
        length, given = len(clean), int(np.argmax(clean != noisy))  # the first hidden token is the first target
        batch = to_write([clean[:given]], length - given, 0).replace(tokens=clean[None])
        tokens, slots = clean_and_noisy(batch, jnp.asarray(noisy)[None], kind)
        found = np.asarray(logits(opened.params, tokens, slots))[0]
        expected = arrays[f"train_logits_block{size}"][row]
        np.testing.assert_allclose(found[:length], expected[length : 2 * length], rtol=0, atol=2e-4)
        np.testing.assert_allclose(found[length + given :], expected[given:length], rtol=0, atol=2e-4)


@pytest.mark.parametrize("size", [4, 8])
@pytest.mark.parametrize("family", A2D)
def test_blocks_of_a_left_padded_row_are_counted_from_the_first_target(family, size, load):
    opened, (_, arrays) = load(family), reference(family)
    model, kind = opened.definition.bind(opened.params), AttentionKind("block_causal", size)
    there = arrays["attention_mask"] > 0
    positions = np.broadcast_to(np.arange(there.shape[1]), there.shape)
    # All are inputs, so the first target stands behind the row.
    slots = Slots(segment_ids=there.astype(np.int32), positions=positions, is_input=there)
    found = np.asarray(model.logits(model(jnp.asarray(arrays["input_ids"]), slots, kind).hidden))
    expected = arrays[f"logits_bd3lm_leftpad_block{size}"]
    np.testing.assert_allclose(found[there], expected[there], rtol=0, atol=2e-4)


def decoder_for(family, chosen):
    """The decoder that these published settings mean."""
    if family == "sdar":
        strategy = chosen["remasking_strategy"]
        inner = MaskedDecoder(
            num_steps=chosen["denoising_steps"],
            counts="index",
            threshold=chosen["confidence_threshold"] if strategy == "low_confidence_dynamic" else None,
            order="sequential" if strategy == "sequential" else "confidence",
            softmax="all",
        )
        return BlockDecoder(chosen["block_length"], inner, blocks_from="row")
    blocks = -(-chosen["max_new_tokens"] // chosen["block_size"])
    inner = MaskedDecoder(num_steps=-(-chosen["steps"] // blocks), counts="linear", softmax="all")
    return BlockDecoder(chosen["block_size"], inner)


CASES = [
    (family, name)
    for family in ("sdar", *A2D)
    for name, chosen in settings(family).items()
    if (family == "sdar" or chosen["sampler"] == "BD3LM") and "quirk" not in name
]


@pytest.mark.parametrize(("family", "name"), CASES)
def test_texts_are_the_published_ones_id_for_id(family, name, load):
    opened, chosen = load(family), settings(family)[name]
    definition = opened.definition
    if chosen.get("right_shift_logits"):
        definition = dataclasses.replace(definition, config=dataclasses.replace(definition.config, shifted=True))
    decoder, (prompts, outputs) = decoder_for(family, chosen), generation(family, name)
    vocabulary, mask = definition.vocabulary, 157
    # What ends their decoding; in that of SDAR it may be no end at all.
    ends = chosen.get("stopping_criteria_idx", [chosen["eos_id"]] if family in A2D else [mask])
    ids = dataclasses.replace(vocabulary, eos_id=ends[0], pad_id=chosen.get("pad_id", ends[0]))
    definition = dataclasses.replace(definition, vocabulary=ids)
    if family in A2D:  # padded on the left to whole blocks
        outputs = [row[-len(prompt) % decoder.block_size :] for row, prompt in zip(outputs, prompts, strict=True)]
    # All blocks that theirs writes are whole, beyond the length asked for.
    batch = to_write(prompts, max(len(row) - len(prompt) for row, prompt in zip(outputs, prompts, strict=True)), 0)
    decoded = jax.jit(lambda params: decoder.decode(definition.bind(params), batch, jax.random.key(0)))(opened.params)
    stopped = 0
    for canvas, prompt, output in zip(np.asarray(decoded.canvas), prompts, outputs, strict=True):
        found, expected = canvas[len(prompt) : len(output)], output[len(prompt) :]
        written = expected != mask
        np.testing.assert_array_equal(found[written], expected[written])
        assert (found[~written] == mask).all()
        stopped += len(expected) < batch.target_mask.sum(axis=1).max() or (~written).any()
    assert "eos" not in name or stopped
