"""LLaDA2 and LLaDA2.1, mixtures of experts: what they write by their decoding in blocks, id for id."""

import dataclasses
import functools
import json

import jax
import numpy as np
import pytest
from published_diffusion import DATA, generation, needs_data, settings, to_write

from diffusion_t5x import api
from diffusion_t5x.convert import convert
from diffusion_t5x.decoding.block import BlockDecoder
from diffusion_t5x.decoding.editing import EditingDecoder
from diffusion_t5x.decoding.masked import MaskedDecoder

pytest.importorskip("seqio")
pytestmark = needs_data
FAMILIES = ("llada2_moe", "llada21_moe")


@pytest.fixture(scope="module")
def load(tmp_path_factory):
    """Imports a model once, and opens it. The name of LLaDA2.1's model_type is not known from its own files."""

    @functools.cache
    def once(family):
        source, folder = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("published") / family
        for file in ("config.json", "model.safetensors"):
            (source / file).write_bytes((DATA / family / file).read_bytes())
        said = json.loads((source / "config.json").read_text())
        (source / "config.json").write_text(json.dumps(said | {"model_type": family}))
        convert(["from_hf", str(source), "--output", str(folder), "--mask_id=155", "--block_size=8"])
        return api.load(folder)

    return once


def test_what_an_import_says_of_its_decoding(load):
    inner = MaskedDecoder(num_steps=8, counts="index", threshold=0.95, softmax="all")
    assert load("llada2_moe").decoder == BlockDecoder(8, inner, blocks_from="row")
    assert load("llada21_moe").decoder == BlockDecoder(8, EditingDecoder(softmax="all"), blocks_from="row")


def decoder_for(family, chosen):
    """The decoder that these published settings mean."""
    if family == "llada2_moe":
        inner = MaskedDecoder(num_steps=chosen["steps"], counts="index", threshold=chosen["threshold"], softmax="all")
        return BlockDecoder(chosen["block_length"], inner, blocks_from="row")
    editing = EditingDecoder(
        chosen["threshold"],
        min(chosen["editing_threshold"], 1.0),
        min_tokens=chosen.get("num_to_transfer", 1),
        extra_steps=chosen["max_post_steps"],
        softmax="all",
    )
    return BlockDecoder(chosen["block_length"], editing, "row")


@pytest.mark.parametrize(("family", "name"), [(family, name) for family in FAMILIES for name in settings(family)])
def test_texts_are_the_published_ones_id_for_id(family, name, load):
    opened, chosen = load(family), settings(family)[name]
    size, length, eos_id = chosen["block_length"], chosen["gen_length"], chosen["eos_id"]
    decoder, (prompts, outputs) = decoder_for(family, chosen), generation(family, name)
    ids = dataclasses.replace(opened.definition.vocabulary, eos_id=eos_id, pad_id=eos_id)
    definition = dataclasses.replace(opened.definition, vocabulary=ids)
    # The last block is whole there: targets up to its end, of which those of gen_length are kept.
    batches = [to_write([prompt], length + -(len(prompt) + length) % size, eos_id) for prompt in prompts]
    width = max(batch.tokens.shape[1] for batch in batches)
    batch = jax.tree.map(
        lambda *rows: np.concatenate([np.pad(x, ((0, 0), (0, width - x.shape[1]))) if x.ndim > 1 else x for x in rows]),
        *batches,
    )
    decode = jax.jit(lambda params: decoder.decode(definition.bind(params), batch, jax.random.key(0)))
    for row, prompt, output in zip(np.asarray(decode(opened.params).canvas), prompts, outputs, strict=True):
        np.testing.assert_array_equal(row[len(prompt) :][: len(output)], output)
        assert len(output) == length or output[-1] == eos_id
    assert "eos" not in name or min(map(len, outputs)) < length
