"""Ids as text, for models without a tokenizer; and Qwen2's tokenizer from its two files."""

import json

import numpy as np
import open_models
import pytest

from diffusion_t5x.data.vocabularies import cells, signs, to_text, token_ids
from diffusion_t5x.data.vocabulary_files import vocabulary
from diffusion_t5x.errors import UserError

pytest.importorskip("seqio")


def write_config(folder, **said):
    (folder / "config.json").write_text(json.dumps(said))
    return str(folder / "config.json")


def test_ids_are_texts(tmp_path):
    found = vocabulary(write_config(tmp_path, vocab_size=40, eos_token_id=[7, 8], pad_token_id=3, mask_token_id=38))
    ids = token_ids(found)
    assert (ids.size, ids.eos_id, ids.pad_id, ids.mask_id, ids.start_id) == (40, 7, 3, 38, 3)
    assert 38 not in ids.noise_ids() and len(ids.noise_ids()) == 39
    assert found.encode("12 0  39") == [12, 0, 39] and found.decode([12, 0, 39]) == "12 0 39"
    np.testing.assert_array_equal(found.encode_tf("4 5"), [4, 5])
    assert to_text(found, [12, 5, 7, 1]) == "12 5" and cells(found, [12, 38, 7], signs(found)) == ["12", "▢", "¶"]
    with pytest.raises(
        UserError, match=r"knows only ids from 0 to 39, .* and 'forty' is none: put the model's tokenizer"
    ):
        found.encode("4 forty")
    with pytest.raises(UserError, match="and '40' is none"):
        found.encode("40")


def test_mask_may_be_given_and_lie_behind_the_ids(tmp_path):
    file = write_config(tmp_path, vocab_size=40, eos_token_id=7)
    assert token_ids(vocabulary(file)).mask_id == 40 and token_ids(vocabulary(file)).size == 41
    given = token_ids(vocabulary(file, mask_id=12))
    assert (given.mask_id, given.size, given.pad_id) == (12, 40, 7)
    # What is given once and what the file says since are the same vocabulary.
    file = write_config(tmp_path, vocab_size=40, eos_token_id=7, mask_token_id=12)
    assert token_ids(vocabulary(file)) == given
    with pytest.raises(UserError, match="needs vocab_size and eos_token_id"):
        vocabulary(write_config(tmp_path, vocab_size=40))


def test_a_tokenizers_own_mask_is_mask(tmp_path):
    tokenizer = open_models.byte_level()
    names = {"eos_token": "<|end|>", "pad_token": "<|pad|>", "mask_token": tokenizer.id_to_token(290)}
    file = open_models.save_tokenizer(tmp_path, tokenizer, **names)
    ids = token_ids(vocabulary(file))
    assert (ids.mask_id, ids.size) == (290, 300) and 290 not in ids.noise_ids()
    # config.json comes first, and may name an id behind the tokenizer's.
    write_config(tmp_path, mask_token_id=311)
    ids = token_ids(vocabulary(file))
    assert (ids.mask_id, ids.size, ids.noise_ids()[-1]) == (311, 312, 299)
    assert token_ids(vocabulary(file, mask_id=305)).mask_id == 305


def test_qwen2s_two_files_make_a_tokenizer(tmp_path):
    trained = json.loads(open_models.byte_level().to_str())["model"]
    (tmp_path / "vocab.json").write_text(json.dumps(trained["vocab"]))
    merges = [" ".join(pair) for pair in trained["merges"]]
    (tmp_path / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|end|>"}))
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<|end|>": 0}))
    found = vocabulary(str(tmp_path / "merges.txt"))
    text = "I'm 12 small models.\n\n  é!"
    pieces = [found.piece(token) for token in found.encode(text)]
    assert b"".join(pieces).decode() == text == found.decode(found.encode(text))
    assert b"1" in pieces and b"2" in pieces  # digits stand alone
    (tmp_path / "vocab.json").unlink()
    with pytest.raises(UserError, match="are not a BPE tokenizer"):
        vocabulary(str(tmp_path / "merges.txt"))
