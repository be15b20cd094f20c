"""Hugging Face's tokenizers as vocabularies: the library's own ids, and texts back."""

import gzip
import json

import numpy as np
import open_models
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import processors

from diffusion_t5x.data import vocabulary_files
from diffusion_t5x.data.vocabularies import cells, encode_part, piece, token_ids
from diffusion_t5x.errors import UserError

pytest.importorskip("seqio")
import tensorflow as tf

from diffusion_t5x.data.huggingface_vocabulary import HuggingFaceVocabulary

NUM_RANDOM = 10_000


@pytest.fixture(scope="module")
def gpt2(test_data, tmp_path_factory):
    """GPT-2's own vocabulary in a tokenizer.json, and the library's tokenizer."""
    with gzip.open(test_data / "gpt2_bpe" / "encoder.json.gz") as file:
        vocabulary = json.load(file)
    with gzip.open(test_data / "gpt2_bpe" / "vocab.bpe.gz", "rt", encoding="utf-8") as file:
        merges = [tuple(line.split(" ")) for line in file.read().split("\n")[1:-1]]
    tokenizer = tokenizers.ByteLevelBPETokenizer(vocabulary, merges)
    tokenizer.add_special_tokens(["<|endoftext|>"])
    tokenizer.enable_truncation(5)
    end = "<|endoftext|>"
    path = open_models.save_tokenizer(
        tmp_path_factory.mktemp("gpt2"), tokenizers.Tokenizer.from_str(tokenizer.to_str()), eos_token=end, bos_token=end
    )
    tokenizer.no_truncation()
    return HuggingFaceVocabulary(path), tokenizer


@pytest.fixture(scope="module")
def vocabularies(tmp_path_factory):
    """Vocabularies by name."""
    folder = tmp_path_factory.mktemp("vocabularies")
    ends = {"eos_token": {"content": "</s>", "special": True}, "bos_token": "<s>", "unk_token": "<unk>"}
    paths = {
        "byte_level": open_models.save_tokenizer(
            folder / "b", open_models.byte_level(), eos_token="<|end|>", pad_token="<|pad|>", bos_token=None
        ),
        "sentencepiece": open_models.save_tokenizer(folder / "s", open_models.sentencepiece_like(), **ends),
        "metaspace": open_models.save_tokenizer(folder / "m", open_models.metaspace(), **ends),
    }
    return {name: vocabulary_files.vocabulary(path) for name, path in paths.items()}


def random_texts(number):
    """Strings of 0 to 30 characters: ASCII, Latin, any of the basic plane, and beyond; no surrogates."""
    rng = np.random.default_rng(0)
    ends = np.array([0x7F, 0x250, 0xD800, 0x110000])
    for size in rng.integers(0, 31, number):
        codes = rng.integers(0, ends[rng.integers(0, len(ends), size)])
        yield "".join(chr(code) for code in codes if not 0xD800 <= code < 0xE000)


def test_ids_are_the_librarys_and_decode_back(gpt2):
    vocabulary, tokenizer = gpt2
    texts = list(random_texts(NUM_RANDOM))
    assert len(set(texts)) > 0.9 * NUM_RANDOM
    for text in texts:
        ids = vocabulary.encode(text)
        assert ids == tokenizer.encode(text).ids and vocabulary.decode(ids) == text
    # Published by GPT-2's authors' own encoder.
    assert vocabulary.encode("Hello, world!") == [15496, 11, 995, 0]


@pytest.mark.parametrize("name", ["byte_level", "sentencepiece", "metaspace"])
@settings(max_examples=50, deadline=None)
@given(text=st.text(max_size=30))
def test_other_kinds_decode_back(name, vocabularies, text):
    text = text.replace("▁", "").lstrip(" ")  # "▁" is a space there, and a space in front may be dropped
    assert vocabularies[name].decode(vocabularies[name].encode(text)) == text


@pytest.mark.parametrize("text", ["", "a  th", "é☃\n\x00"])
def test_tensorflow_gives_the_same(vocabularies, text):
    for vocabulary in vocabularies.values():
        ids = tf.function(vocabulary.encode_tf)(tf.constant(text))
        assert ids.dtype == tf.int32 and ids.numpy().tolist() == vocabulary.encode(text)
        assert tf.function(vocabulary.decode_tf)(ids).numpy().decode() == text
        padded = [[*ids.numpy(), vocabulary.eos_id, 70]]
        assert vocabulary.decode_tf(tf.constant(padded)).numpy()[0].decode() == text


@pytest.mark.parametrize("name", ["byte_level", "sentencepiece", "metaspace"])
@settings(max_examples=50, deadline=None)
@given(words=st.lists(st.text("athé12.(", min_size=1, max_size=6), min_size=1), data=st.data())
def test_parts_and_cells_of_a_text_read_as_the_text(name, vocabularies, words, data):
    vocabulary, text = vocabularies[name], " ".join(words)
    cut = data.draw(st.integers(1, len(text)))
    tokens = [*encode_part(vocabulary, text[:cut], True), *encode_part(vocabulary, text[cut:], False)]
    assert vocabulary.decode(tokens) == text
    assert "".join(cells(vocabulary, tokens, {})) == text


def test_what_diffusion_knows_of_them(gpt2, vocabularies):
    ids = token_ids(gpt2[0])
    assert (ids.size, ids.mask_id, ids.eos_id, ids.pad_id, ids.start_id) == (50258, 50257, 50256, 50256, 50256)
    assert ids.noise_ranges == ((0, 50257),)
    ids = token_ids(vocabularies["byte_level"])
    assert (ids.size, ids.mask_id, ids.eos_id, ids.pad_id, ids.start_id) == (301, 300, 0, 1, 1)
    assert ids.noise_ranges == ((0, 300),)
    ids = token_ids(vocabularies["sentencepiece"])
    assert (ids.eos_id, ids.pad_id, ids.start_id) == (2, 2, 1) and ids.noise_ranges == ((2, 300),)
    assert [piece(vocabularies["sentencepiece"], i) for i in (1, 3, 258, 259)] == [b"<s>", b"\0", b"\xff", b" "]
    assert piece(vocabularies["byte_level"], vocabularies["byte_level"].encode(" ☃")[-1]) == "☃".encode()[-1:]


@pytest.mark.parametrize(
    ("said", "in_tokenizer", "expected"),
    [
        ({}, False, False),
        ({}, True, True),
        ({"add_bos_token": True}, False, True),
        ({"add_bos_token": False}, True, False),
    ],
)
def test_whether_bos_is_put_before_a_text(said, in_tokenizer, expected, tmp_path):
    tokenizer = open_models.sentencepiece_like()
    if in_tokenizer:
        tokenizer.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    path = open_models.save_tokenizer(tmp_path, tokenizer, bos_token="<s>", eos_token="</s>", **said)
    assert HuggingFaceVocabulary(path).adds_bos == expected
    without = open_models.save_tokenizer(tmp_path / "none", open_models.byte_level(), eos_token="<|end|>", **said)
    assert not HuggingFaceVocabulary(without).adds_bos


def test_ids_that_stand_for_nothing_are_no_text(tmp_path):
    spec = json.loads(open_models.byte_level().to_str())
    spec["model"]["vocab"]["far"] = 400
    (tmp_path / "config.json").write_text('{"eos_token_id": [400, 0], "pad_token_id": 999}')
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(spec))
    ids = token_ids(HuggingFaceVocabulary(str(path)))
    assert (ids.eos_id, ids.pad_id, ids.mask_id) == (400, 400, 401)
    assert 400 in ids.noise_ids() and 399 not in ids.noise_ids()


def test_fingerprints_and_equality(tmp_path):
    tokenizer = open_models.byte_level()
    one, other = (
        HuggingFaceVocabulary(open_models.save_tokenizer(tmp_path / end, tokenizer, eos_token=f"<|{end}|>"))
        for end in ("end", "pad")
    )
    assert one == HuggingFaceVocabulary(str(tmp_path / "end" / "tokenizer.json")) and one != other
    assert token_ids(one).fingerprint != token_ids(other).fingerprint


def test_files_that_are_no_tokenizer(tmp_path):
    with pytest.raises(UserError, match=r"There is no vocabulary file .*nowhere\.json"):
        vocabulary_files.vocabulary(str(tmp_path / "nowhere.json"))
    (tmp_path / "bad.json").write_text("{}")
    with pytest.raises(UserError, match=r"bad\.json is not a tokenizer\.json"):
        HuggingFaceVocabulary(str(tmp_path / "bad.json"))
    path = open_models.save_tokenizer(tmp_path / "t", open_models.byte_level(), eos_token="<|other|>")
    with pytest.raises(UserError, match="which token ends a text"):
        HuggingFaceVocabulary(path)
