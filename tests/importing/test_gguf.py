"""GGUF files: the same model as in Hugging Face's format, every quantization, tokenizers, and what is refused."""

import dataclasses
import io
import json

import gguf
import gguf_files
import jax
import numpy as np
import open_models
import pytest
import sentencepiece
import tokenizers
from in_torch import load_ours

from diffusion_t5x.checkpointing import checkpoints
from diffusion_t5x.command_line import recorded
from diffusion_t5x.convert import convert
from diffusion_t5x.errors import UserError
from diffusion_t5x.importing import from_hf, gguf_tokenizer
from diffusion_t5x.importing.gguf_file import GgufFile
from diffusion_t5x.models.masks import CAUSAL, Slots

TEXTS = ("Once upon a time", "It's 12345 o'clock,  isn't it?\n\n\tYes: é ☃ ñ!", " a  b ", "<|end|>x<|pad|>", "")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def read(path):
    """Model settings and parameters as they would be imported."""
    _, definition, streams = from_hf.in_memory(str(path))
    return definition, {name: stream.whole() for name, stream in streams.items()}


@pytest.mark.parametrize("family", gguf_files.FAMILIES)
def test_a_model_is_that_of_the_same_tensors_in_hugging_faces_format(family, tmp_path):
    gguf_files.write(tmp_path / "model.gguf", family)
    gguf_files.write_folder(tmp_path / "folder", family)
    (found, params), (expected, expected_params) = read(tmp_path / "model.gguf"), read(tmp_path / "folder")
    assert found.config == expected.config
    kept = ("size", "pad_id", "eos_id", "mask_id", "noise_ranges")
    assert all(getattr(found.vocabulary, name) == getattr(expected.vocabulary, name) for name in kept)
    assert params.keys() == expected_params.keys()
    for name, values in expected_params.items():
        np.testing.assert_allclose(params[name], values, rtol=0, atol=3e-7, err_msg=name)  # (an offset of 1 rounds)

    tokens = np.random.default_rng(1).integers(2, 300, (2, 40))
    places = np.broadcast_to(np.arange(40, dtype=np.int32), tokens.shape)
    slots = Slots(np.ones_like(places), places, np.ones(tokens.shape, bool))

    @jax.jit
    def logits(params):
        model = expected.bind(params)
        return model.logits(model(tokens, slots, CAUSAL, None).hidden)

    said, ours = (np.asarray(logits(unflat(each))) for each in (expected_params, params))
    assert said.std() > 0.1
    np.testing.assert_allclose(ours, said, rtol=0, atol=1e-6 if family[:5] != "gemma" else 1e-5)


def unflat(params):
    from flax import traverse_util

    return traverse_util.unflatten_dict(params, sep="/")


def quantizations():
    """The types that the package dequantizes."""
    for kind in gguf.GGMLQuantizationType:
        block, size = gguf.GGML_QUANT_SIZES[kind]
        try:
            gguf.dequantize(np.zeros((1, size), np.uint8), kind)
        except NotImplementedError:
            continue
        yield pytest.param(kind, block, size, id=kind.name)


@pytest.mark.parametrize(("kind", "block", "size"), list(quantizations()))
def test_rows_of_every_quantization(kind, block, size, tmp_path):
    """Any rows of a permuted matrix are those of the whole matrix, dequantized and permuted."""
    rng = np.random.default_rng(0)
    gguf_files.write(tmp_path / "model.gguf", "llama")
    opened = GgufFile.open_file(str(tmp_path / "model.gguf"))
    name = "model.layers.0.self_attn.k_proj.weight"
    rows, _ = opened.tensors[name].shape
    stored = rng.integers(0, 60, (rows, 4 * size), np.uint8)
    tensor = opened.stored[name]._replace(data=stored, tensor_type=kind)
    changed = dataclasses.replace(opened, stored={**opened.stored, name: tensor})
    whole = gguf.dequantize(stored, kind)
    assert whole.shape == (rows, 4 * block)
    heads = gguf_files.KV_HEADS
    expected = whole.reshape(heads, -1, 2, 4 * block).swapaxes(1, 2).reshape(whole.shape)
    for start, stop in ((0, None), (3, 17)):
        np.testing.assert_array_equal(changed.read(name, start, stop), expected[start:stop])
    np.testing.assert_array_equal(changed.read(name, 1, 5, axis=1), expected[:, 1:5])


def test_a_quantized_file_is_imported_and_exported_as_what_it_stands_for(tmp_path, capsys):
    gguf_files.write(tmp_path / "model.gguf", "llama", quantization=gguf.GGMLQuantizationType.Q4_1)
    convert(["from_gguf", str(tmp_path / "model.gguf"), "--output", str(tmp_path / "here")])
    assert "320 rows, MASK is 300\n" in capsys.readouterr().out
    convert(["to_hf", str(tmp_path / "here"), "--output", str(tmp_path / "back")])
    found = open_models.read_shards(tmp_path / "back")
    for name, (ours, values) in gguf_files.random_tensors("llama").items():
        stored = gguf_files.as_stored("llama", name, values)
        if stored.ndim > 1:
            kind = gguf.GGMLQuantizationType.Q4_1
            stored = gguf.dequantize(gguf.quantize(stored, kind), kind)
            if name.endswith(("attn_q.weight", "attn_k.weight")):
                heads = gguf_files.HEADS if "attn_q" in name else gguf_files.KV_HEADS
                stored = stored.reshape(heads, -1, 2, stored.shape[-1]).swapaxes(1, 2).reshape(stored.shape)
        np.testing.assert_array_equal(found[ours], stored, err_msg=name)
    assert (tmp_path / "back" / "chat_template.jinja").read_text() == "{{ messages[0]['content'] }}"


def rebuilt(keys):
    values = {f"tokenizer.ggml.{name}": value for name, value in keys.items()}
    files = gguf_tokenizer.files(values, "file.gguf")
    return tokenizers.Tokenizer.from_str(files["tokenizer.json"]), json.loads(files["tokenizer_config.json"])


def test_byte_level_tokenizer_has_the_same_ids():
    tokenizer, config = rebuilt(gguf_files.byte_level_keys("gpt-2"))
    expected = open_models.byte_level(300)
    for text in TEXTS:
        assert tokenizer.encode(text).ids == expected.encode(text).ids
        assert tokenizer.decode(tokenizer.encode(text).ids, skip_special_tokens=False) == text
    assert tokenizer.get_vocab_size() == 300
    assert (config["eos_token"], config["pad_token"], config["add_bos_token"]) == ("<|end|>", "<|pad|>", False)


@pytest.mark.parametrize(
    ("pre", "words"),
    [
        ("gpt-2", ["It", "'s", "Ġ12345", "Ġo", "'", "clock", "ĊĊ", "ĠÃ©", "!"]),
        ("smollm", ["It", "'s", "Ġ", "1", "2", "3", "4", "5", "Ġo", "'", "clock", "ĊĊ", "ĠÃ©", "!"]),
        ("qwen2", ["It", "'s", "Ġ", "1", "2", "3", "4", "5", "Ġo", "'clock", "ĊĊ", "ĠÃ©", "!"]),
        ("llama-bpe", ["It", "'s", "Ġ", "123", "45", "Ġo", "'clock", "ĊĊ", "ĠÃ©", "!"]),
    ],
)
def test_where_words_are_cut(pre, words):
    tokenizer, config = rebuilt({k: v for k, v in gguf_files.byte_level_keys(pre).items() if k != "add_bos_token"})
    assert [word for word, _ in tokenizer.pre_tokenizer.pre_tokenize_str("It's 12345 o'clock\n\n é!")] == words
    assert config["add_bos_token"] == (pre == "llama-bpe")


@pytest.fixture(scope="module")
def trained():
    """A SentencePiece model that falls back to bytes, as Llama 2's and Gemma's do, as GGUF's keys."""
    text = ["once upon a time there was a small model", "it learned to write: some words, and 1,234 numbers!"] * 20

    def train(**settings):
        model = io.BytesIO()
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(text), model_writer=model, model_type="bpe", vocab_size=340, byte_fallback=True,
            minloglevel=2, normalization_rule_name="identity", remove_extra_whitespaces=False, **settings,
        )  # fmt: skip
        model = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
        ids = list(range(model.GetPieceSize()))
        kinds = [
            2 if model.IsUnknown(i) else 3 if model.IsControl(i) else 6 if model.IsByte(i) else 1 for i in ids
        ]  # fmt: skip
        return model, {
            "model": "llama", "tokens": [model.IdToPiece(i) for i in ids], "token_type": kinds,
            "scores": [model.GetScore(i) for i in ids], "bos_token_id": 1, "eos_token_id": 2, "unknown_token_id": 0,
        }  # fmt: skip

    return train


@pytest.mark.parametrize("prefix", [True, False])
def test_sentencepiece_tokenizer_has_the_same_ids(prefix, trained):
    model, keys = trained(add_dummy_prefix=prefix)
    tokenizer, config = rebuilt(keys | {"add_space_prefix": prefix})
    for text in ("once upon a time", "there was  a model, and 1,234 wörds ☃", "it learned", " it", "x"):
        assert tokenizer.encode(text, add_special_tokens=False).ids == model.EncodeAsIds(text), text
        assert tokenizer.encode(text).ids == [1, *model.EncodeAsIds(text)]
        assert tokenizer.decode(model.EncodeAsIds(text)) == text
    assert config["add_bos_token"] and config["bos_token"] == "<s>"


@pytest.mark.parametrize(
    ("family", "keys", "message"),
    [
        ("llama", {"general.architecture": "falcon"}, "general.architecture = 'falcon' is not supported, only llama"),
        ("llama", {"llama.expert_count": 8}, "llama.expert_count = 8 is not known here.*--ignore_keys=llama.expert"),
        ("llama", {"llama.block_count": None}, "lacks the key llama.block_count"),
        ("llama", {"llama.attention.causal": False}, "llama.attention.causal = False is not supported, only True"),
        ("qwen3", {"qwen3.rope.scaling.type": "su"}, "qwen3.rope.scaling.type = 'su' is not supported, only.*yarn"),
        (
            "qwen2_yarn",
            {"qwen2.rope.scaling.attn_factor": 2.0},
            "qwen2.rope.scaling.attn_factor = 2.0 is not known here",
        ),
        ("llama", {"split.count": 3}, "is piece 1 of 3, so its name has to end in -00001-of-00003.gguf"),
        ("llama", {"tokenizer.ggml.pre": "viking"}, "tokenizer.ggml.pre = 'viking' is not supported, only llama-bpe"),
        ("llama", {"tokenizer.ggml.model": "t5"}, "tokenizer.ggml.model = 't5' is not supported"),
        ("llama3", {"llama.rope.freq_base": 1e4}, "stretches rotary wavelengths differently from Llama 3"),
    ],
)
def test_refusals(family, keys, message, tmp_path):
    gguf_files.write(tmp_path / "model.gguf", family, **keys)
    with pytest.raises(UserError, match=message):
        GgufFile.open_file(str(tmp_path / "model.gguf"))


def test_a_model_in_several_files(tmp_path):
    gguf_files.write(tmp_path / "whole.gguf", "llama3")
    gguf_files.write(tmp_path / "cut.gguf", "llama3", tensors_per_file=7)
    pieces = sorted(tmp_path.glob("cut-*.gguf"))
    assert [piece.name for piece in pieces] == [f"cut-0000{i}-of-00003.gguf" for i in range(1, 4)]
    (found, params), (expected, expected_params) = read(pieces[0]), read(tmp_path / "whole.gguf")
    assert found.config == expected.config
    assert params.keys() == expected_params.keys()
    for name, values in expected_params.items():
        np.testing.assert_array_equal(params[name], values, err_msg=name)
    with pytest.raises(UserError, match=r"is piece 2 of 3: give the first one, cut-00001-of-00003\.gguf"):
        GgufFile.open_file(str(pieces[1]))
    pieces[2].unlink()
    with pytest.raises(UserError, match=r"is one of 3 pieces; missing beside it: cut-00003-of-00003\.gguf"):
        GgufFile.open_file(str(pieces[0]))


def test_broken_files_and_ignored_keys(tmp_path):
    file = tmp_path / "model.gguf"
    gguf_files.write(file, "llama", **{"llama.expert_count": 8})
    assert GgufFile.open_file(str(file), ["llama.expert_count"]).config["model_type"] == "llama"
    with pytest.raises(UserError, match=r"has no key 'llama.expert'\."):
        GgufFile.open_file(str(file), ["llama.expert"])
    contents = file.read_bytes()
    for broken in (b"", b"GGUF", contents[:200], contents[:-5000], b"PK" + contents[2:]):
        file.write_bytes(broken)
        with pytest.raises(UserError, match="is broken, or not a GGUF file"):
            GgufFile.open_file(str(file))
    with pytest.raises(UserError, match="There is no file"):
        GgufFile.open_file(str(tmp_path / "none.gguf"))


@pytest.mark.parametrize("adds", [False, True])
def test_the_model_reads_bos_if_the_tokenizer_adds_it(adds, tmp_path):
    gguf_files.write(
        tmp_path / "model.gguf", "llama", gguf_files.byte_level_keys() | {"bos_token_id": 5, "add_bos_token": adds}
    )
    convert(["from_gguf", str(tmp_path / "model.gguf"), "--output", str(tmp_path / "here")])
    definition, _ = load_ours(tmp_path / "here")
    assert (definition.config.reads_start, definition.vocabulary.start_id) == (adds, 5)
    checkpoint = checkpoints.open_checkpoint(str(tmp_path / "here"))
    assert checkpoint.record.model["reads_start"] == adds
    assert f"READS_START = {adds}" in recorded.gin_text(checkpoint)
    assert f"READS_START = {adds}" in (tmp_path / "here" / "model.gin").read_text()
