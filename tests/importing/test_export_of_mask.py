"""A diffusion model that no published format holds: exported with MASK and its settings, and imported again."""

import dataclasses
import json

import gguf_files
import numpy as np
import open_models
import pytest
import tokenizers

from diffusion_t5x.checkpointing import checkpoints
from diffusion_t5x.checkpointing.record import Record
from diffusion_t5x.convert import convert
from diffusion_t5x.decoding.block import BlockDecoder
from diffusion_t5x.decoding.masked import MaskedDecoder
from diffusion_t5x.errors import UserError
from diffusion_t5x.importing import from_hf, output
from diffusion_t5x.objectives.block import Block
from diffusion_t5x.objectives.sundae import Sundae

pytest.importorskip("seqio")
DECODER = BlockDecoder(4, MaskedDecoder(num_steps=2))


def whole(streams):
    return {name: stream.whole() for name, stream in streams.items()}


def train(folder, run, objective, decoder, seed=1):
    """An import, and a run's folder as a training from it leaves it: every number is another, MASK's row too."""
    record, definition, streams = from_hf.in_memory(str(folder))
    rng = np.random.default_rng(seed)
    params = {name: rng.standard_normal(values.shape).astype(np.float32) for name, values in whole(streams).items()}
    config = dataclasses.replace(definition.config, shifted=True)
    source = record.vocabulary_source
    trained = Record.of(config, definition.vocabulary.describe(), objective, [decoder], vocabulary_source=source)
    output.save(run, trained, params, "")
    return config, definition.vocabulary, params


def write_gpt2(folder, rows, width=12):
    """Names without a prefix, as the published files have them."""
    vector = {"weight": (width,), "bias": (width,)}
    layer = {"ln_1": vector, "ln_2": vector}
    for name, into, out in (("attn.c_attn", 1, 3), ("attn.c_proj", 1, 1), ("mlp.c_fc", 1, 4), ("mlp.c_proj", 4, 1)):
        layer[name] = {"weight": (into * width, out * width), "bias": (out * width,)}
    modules = {f"h.{i}.{name}": parts for i in range(2) for name, parts in layer.items()} | {"ln_f": vector}
    modules |= {"wte": {"weight": (rows, width)}, "wpe": {"weight": (64, width)}}
    rng = np.random.default_rng(0)
    folder.mkdir()
    shapes = {f"{name}.{part}": shape for name, parts in modules.items() for part, shape in parts.items()}
    open_models.save_shards(folder, {n: rng.standard_normal(shape).astype(np.float32) for n, shape in shapes.items()})
    config = {"model_type": "gpt2", "n_embd": width, "n_head": 3, "n_layer": 2, "n_positions": 64, "vocab_size": rows}
    (folder / "config.json").write_text(json.dumps(config | {"eos_token_id": 0}))
    open_models.save_tokenizer(folder, open_models.byte_level(300))


def write(folder, family, rows):
    if family == "gpt2":
        write_gpt2(folder, rows)
    else:
        gguf_files.write_folder(folder, family, rows)


@pytest.mark.parametrize("rows", [300, 320], ids=["new row", "spare row"])
@pytest.mark.parametrize("family", ["gpt2", *gguf_files.FAMILIES])
def test_what_was_trained_comes_back_bit_for_bit(family, rows, tmp_path):
    write(tmp_path / "source", family, rows)
    convert(["from_hf", str(tmp_path / "source"), "--output", str(tmp_path / "here")])
    config, ids, params = train(tmp_path / "source", tmp_path / "run", Block(4), DECODER)
    like = ["--like", str(tmp_path / "here"), "--as", "diffusion"]
    convert(["to_hf", str(tmp_path / "run"), *like, "--output", str(tmp_path / "out")])

    again, definition, streams = from_hf.in_memory(str(tmp_path / "out"))
    assert definition.config == dataclasses.replace(config, vocab_size=definition.config.vocab_size)
    assert definition.config.num_embeddings == config.num_embeddings == (384 if rows == 300 else 320)
    found = definition.vocabulary
    assert found.mask_id == ids.mask_id == 300
    assert (found.eos_id, found.pad_id) == (ids.eos_id, ids.pad_id)
    assert found.noise_ranges == ids.noise_ranges
    back = whole(streams)
    assert back.keys() == params.keys()
    for name, values in params.items():
        assert back[name].tobytes() == values.tobytes(), name
    assert again.objective == checkpoints.open_checkpoint(str(tmp_path / "run")).record.objective
    assert again.modes == Block(4).modes and again.decoder["block_size"] == 4

    said = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (said["mask_token_id"], said["vocab_size"]) == (300, definition.config.num_embeddings)
    tokenizer = tokenizers.Tokenizer.from_file(str(tmp_path / "out" / "tokenizer.json"))
    assert tokenizer.encode("a<|mask|>a").ids[1:-1] == [300]


def test_what_auto_and_causal_write(tmp_path):
    """The autoregressive twin has neither MASK nor its row; uniform noise is written as diffusion, too."""
    gguf_files.write_folder(tmp_path / "source", "llama", 300)
    convert(["from_hf", str(tmp_path / "source"), "--output", str(tmp_path / "here")])
    for number, objective in enumerate((Block(4), Sundae())):
        train(tmp_path / "source", tmp_path / f"run{number}", objective, DECODER)
        for form, rows in (("auto", 384), ("causal", 300)):
            out = tmp_path / f"{form}{number}"
            convert(["to_hf", str(tmp_path / f"run{number}"), "--like", str(tmp_path / "here"), "--as", form,
                     "--output", str(out)])  # fmt: skip
            assert len(open_models.read_shards(out)["lm_head.weight"]) == rows
            assert ("diffusion" in json.loads((out / "config.json").read_text())) == (form == "auto")
    open_models.edit_config(tmp_path / "auto0", diffusion={"objective": {"class": "os.path"}})
    with pytest.raises(UserError, match="diffusion"):
        from_hf.in_memory(str(tmp_path / "auto0"))
