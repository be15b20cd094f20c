"""Published diffusion models: their logits, and what they write by the published decoding, id for id."""

import dataclasses
import functools
import json
import pathlib
import shutil

import gin
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from published_diffusion import (
    DATA,
    FAMILIES,
    IN_BLOCKS,
    UNNAMED_MASKS,
    generation,
    mask_flags,
    needs_data,
    reference,
    settings,
    to_write,
)

from diffusion_t5x import api
from diffusion_t5x.command_line import config
from diffusion_t5x.convert import convert
from diffusion_t5x.data.batch import Batch
from diffusion_t5x.decoding import commit
from diffusion_t5x.decoding.ancestral import AncestralDecoder
from diffusion_t5x.decoding.counts import counts_table
from diffusion_t5x.decoding.masked import MaskedDecoder
from diffusion_t5x.errors import UserError
from diffusion_t5x.models.masks import BIDIRECTIONAL, AttentionKind, Slots
from diffusion_t5x.models.streams import row_keys, stream

pytest.importorskip("seqio")
pytestmark = needs_data


@pytest.fixture(scope="module")
def load(tmp_path_factory):
    """Imports a family's model once, and opens it."""

    @functools.cache
    def once(family):
        folder = tmp_path_factory.mktemp("published") / family
        convert(["from_hf", str(DATA / family), "--output", str(folder), *mask_flags(family)])
        return api.load(folder)

    return once


def left_padded(rows, lengths):
    """The rows, each with its tokens at the end."""
    width = rows.shape[1]
    source = np.arange(width) - (width - lengths[:, None])
    return np.where(source >= 0, np.take_along_axis(rows, np.maximum(source, 0), axis=1), 0)


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_the_published_ones_whatever_the_padding(family, side, load):
    opened, (_, arrays) = load(family), reference(family)
    tokens, there = arrays["input_ids"], arrays["attention_mask"] > 0
    positions = np.broadcast_to(np.arange(there.shape[1]), there.shape)
    if side == "left":
        lengths = there.sum(axis=1)
        tokens, positions, there = (left_padded(x, lengths) for x in (tokens, positions, there))
    model = opened.definition.bind(opened.params)
    slots = Slots(segment_ids=there.astype(np.int32), positions=positions, is_input=np.zeros_like(there, bool))
    sizes = {name: name.removeprefix("logits_block") for name in arrays if name.startswith("logits_block")}
    blocks = {name: AttentionKind("block_causal", int(size)) for name, size in sizes.items()}
    kinds = blocks or {"logits_bidirectional" if "logits" not in arrays else "logits": BIDIRECTIONAL}
    for name, kind in kinds.items():
        found = np.asarray(model.logits(model(jnp.asarray(tokens), slots, kind).hidden))
        expected = arrays[name][arrays["attention_mask"] > 0]
        assert expected.std() > 1
        np.testing.assert_allclose(found[there > 0], expected, rtol=0, atol=2e-4)


def decoder_for(family, chosen):
    """The decoder that these published settings mean."""
    if "threshold" in chosen:
        threshold = chosen["threshold"]
        return MaskedDecoder(None, threshold=threshold, threshold_included=True, window=8, softmax="all")
    if "llada" in family:
        windows = chosen["gen_length"] // chosen["block_length"]
        ends = {(True, False): "never", (False, True): "last"}.get(
            (chosen.get("logits_eos_inf", False), chosen.get("confidence_eos_eot_inf", False)), "free"
        )
        return MaskedDecoder(
            num_steps=chosen["steps"] // windows,
            window=chosen["block_length"],
            softmax="all",
            ends=ends,
            end_ids=(chosen["eot_id"],) if ends == "last" else (),
            guidance=chosen.get("cfg_scale", 0.0),
        )
    if family == "dream":
        order = {"maskgit_plus": "confidence", "entropy": "entropy", "topk_margin": "margin"}[chosen["alg"]]
        return MaskedDecoder(num_steps=chosen["steps"], counts="times", order=order, softmax="filtered")
    windows = -(-chosen["max_new_tokens"] // chosen["block_size"])
    return MaskedDecoder(
        num_steps=-(-chosen["steps"] // windows), window=chosen["block_size"], counts="linear", softmax="all"
    )


def on_whole_rows(family):
    """The names of a family's generations that have no blocks, and no uniform numbers of their own."""
    return [
        (family, name)
        for name, chosen in settings(family).items()
        if chosen.get("sampler") != "BD3LM"
        and chosen.get("alg") != "origin"
        and "cache" not in chosen.get("function", "")
    ]


WHOLE_ROWS = [case for family in FAMILIES if family not in IN_BLOCKS for case in on_whole_rows(family)]
WHOLE_ROWS += on_whole_rows("fastdllm_llada")  # without its caches, which are not exact


@pytest.mark.parametrize(("family", "name"), WHOLE_ROWS)
def test_texts_are_the_published_ones_id_for_id(family, name, load):
    opened, chosen = load(family), settings(family)[name]
    definition = opened.definition
    if chosen.get("right_shift_logits"):
        definition = dataclasses.replace(definition, config=dataclasses.replace(definition.config, shifted=True))
    prompts, outputs = generation(family, name)
    batch = to_write(prompts, len(outputs[0]) - len(prompts[0]), definition.vocabulary.pad_id)
    decoder = decoder_for(family, chosen)
    decoded = jax.jit(lambda params: decoder.decode(definition.bind(params), batch, jax.random.key(0)))(opened.params)
    for row, output in zip(np.asarray(decoded.canvas), outputs, strict=True):
        np.testing.assert_array_equal(row[: len(output)], output)


def test_dreams_origin_with_the_published_random_numbers(load, monkeypatch):
    opened, (_, arrays), name = load("dream"), reference("dream"), "origin_g24_s12"
    chosen = settings("dream")[name]
    prompts, outputs = generation("dream", name)
    batch = to_write(prompts, chosen["max_new_tokens"], opened.definition.vocabulary.pad_id)
    given = np.nan_to_num(arrays[f"gen_{name}_uniforms"], nan=1.0)  # [row, step, new token]
    key, lengths = jax.random.key(0), jnp.array([len(prompt) for prompt in prompts])
    steps = stream(row_keys(key, batch.example_ids), "steps")
    keys_of = [stream(jax.vmap(jax.random.fold_in, (0, None))(steps, n), "order") for n in range(chosen["steps"])]
    known = jnp.stack([jax.random.key_data(keys) for keys in keys_of], axis=1)  # [row, step, 2]

    def theirs(keys, positions):
        step = jnp.argmax(jnp.all(jax.random.key_data(keys)[:, None] == known, axis=-1), axis=-1)
        of_step = jnp.asarray(given)[jnp.arange(len(step)), step]
        return jnp.take_along_axis(of_step, jnp.clip(positions - lengths[:, None], 0, given.shape[2] - 1), axis=1)

    monkeypatch.setattr(commit, "uniform", theirs)
    decoder = AncestralDecoder(num_steps=chosen["steps"], temperature=0.0)
    decoded = decoder.decode(opened.definition.bind(opened.params), batch, key)
    for row, output in zip(np.asarray(decoded.canvas), outputs, strict=True):
        np.testing.assert_array_equal(row[: len(output)], output)


def test_counts_are_the_published_ones():
    _, arrays = reference("a2d-qwen3")
    table = arrays["schedule_table"]  # [masked tokens, steps, step]
    for steps in range(1, 33):
        found = counts_table("linear", 32, steps)
        expected = np.maximum(table[:, steps, : found.shape[1]], 0)
        np.testing.assert_array_equal(found[1:], expected[1:], err_msg=f"{steps} steps")
        assert (table[:, steps, found.shape[1] :] <= 0).all()
    dream = reference("dream")[0]["counts_32_tokens_12_steps"]
    assert counts_table("times", 32, 12)[32].tolist() == dream


@pytest.mark.parametrize("family", FAMILIES)
def test_the_record_and_the_gin_file_say_how_it_was_trained_and_is_decoded(family, load):
    opened = load(family)
    assert opened.objective is not None and opened.objective.modes == opened.record.modes == opened.decoder.modes
    config.load([f"{opened.name}/model.gin"])
    assert gin.query_parameter("%OBJECTIVE").scoped_configurable_fn() == opened.objective
    assert gin.query_parameter("%DECODER").scoped_configurable_fn() == opened.decoder
    assert opened.definition.vocabulary.mask_id == reference(family)[0]["mask_id"]
    unwritten = opened if family in UNNAMED_MASKS else api.load(DATA / family)
    assert unwritten.decoder == opened.decoder and unwritten.config == opened.config
    assert opened.generate("5 6 7", length=4) == unwritten.generate("5 6 7", length=4)


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_training_goes_on(family, load):
    opened, (_, arrays) = load(family), reference(family)
    definition, objective = opened.definition, opened.objective
    tokens = arrays["input_ids"][:, :24]
    tokens = np.where(tokens == definition.vocabulary.mask_id, 5, tokens)  # clean texts have no MASK
    place = np.arange(24)
    batch = Batch(
        tokens=tokens,
        target_mask=np.broadcast_to(place >= 5, tokens.shape) & (arrays["attention_mask"][:, :24] > 0),
        segment_ids=arrays["attention_mask"][:, :24],
        positions=np.broadcast_to(place.astype(np.int32), tokens.shape),
        example_ids=np.arange(len(tokens), dtype=np.int32),
    )
    optimizer = optax.adam(3e-3)

    def loss(params, key):
        sums = objective.loss(definition.bind(params), batch, key)
        return sums.loss.mean()

    @jax.jit
    def train(params):
        def step(carry, key):
            params, state = carry
            value, gradients = jax.value_and_grad(loss)(params, key)
            updates, state = optimizer.update(gradients, state)
            return (optax.apply_updates(params, updates), state), value

        keys = jax.random.split(jax.random.key(0), 20)
        (after, _), _ = jax.lax.scan(step, (params, optimizer.init(params)), keys)
        held_out = jax.random.split(jax.random.key(1), 8)
        return tuple(jax.lax.map(lambda key: loss(each, key), held_out).mean() for each in (params, after))  # noqa: B023

    before, after = train(opened.params)
    assert after < 0.7 * before


def test_models_that_are_refused(tmp_path):
    def refuses(message, *arguments):
        with pytest.raises(UserError, match=message):
            convert(["from_hf", *map(str, arguments), "--output", str(tmp_path / "out")])
        assert not (tmp_path / "out").exists()

    refuses("neither config.json nor the tokenizer names MASK's id.*--mask_id=ID", DATA / "a2d-llama")
    refuses("MASK = 170, but the model has the ids 0 to 159", DATA / "a2d-llama", "--mask_id=170")
    refuses("--block_size: .* is not a block diffusion model", DATA / "llada", "--block_size=4")
    refuses("--config_only writes no weights", DATA / "llada", "--config_only", "--frozen_dtype=nf4")
    refuses("DiffusionGemma is not supported: its layers differ in the width of their heads", DATA / "diffusion_gemma")


@pytest.mark.parametrize("family", ["sdar", "llada"])
def test_config_json_alone_gives_the_gin_file(family, load, tmp_path):
    (tmp_path / "source").mkdir()
    shutil.copyfile(DATA / family / "config.json", tmp_path / "source" / "config.json")
    convert(["from_hf", str(tmp_path / "source"), "--config_only", "--output", str(tmp_path / "out")])
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["config.json", "model.gin"]
    folders = (load(family).name, tmp_path / "out")
    whole, alone = (pathlib.Path(folder, "model.gin").read_text().splitlines() for folder in folders)
    differ = {one.partition(" ")[0] for one, other in zip(whole, alone, strict=True) if one != other}
    assert differ == {"#", "VOCABULARY_FILE"}  # the title and the path name the folder


def test_a_model_of_blocks_that_does_not_say_so(tmp_path, capsys):
    convert(["from_hf", str(DATA / "a2d-qwen3"), "--mask_id=157", "--block_size=8", "--output", str(tmp_path / "out")])
    assert "MDLM" not in capsys.readouterr().out
    opened = api.load(tmp_path / "out")
    assert opened.objective.block_size == opened.decoder.block_size == 8
    said = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (said["mask_token_id"], said["block_size"]) == (157, 8)
