"""Tokens that files beside a tokenizer add, and T5's sentinels: kept, with the ids that `transformers` gives them."""

import json
import pathlib

import numpy as np
import open_models
import pytest
import tokenizers

from diffusion_t5x.data import vocabularies, vocabulary_files
from diffusion_t5x.data.vocabularies import cells, encode_part, piece, token_ids
from diffusion_t5x.errors import UserError

seqio = pytest.importorskip("seqio")

import tensorflow as tf  # noqa: E402

from diffusion_t5x.tasks import preprocessors  # noqa: E402

PIECES = 330  # of the SentencePiece model, behind which stand 100 sentinels


def write(folder, **files):
    """Files of JSON, by name without the ending."""
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content))


def token(content, special=False):
    return {"content": content, "lstrip": False, "rstrip": False, "single_word": False, "special": special}


@pytest.fixture
def spiece(tmp_path):
    open_models.save_sentencepiece(tmp_path / "spiece.model", vocab_size=PIECES, hard_vocab_limit=True)
    return tmp_path


def in_decoder(tokens, special=()):
    return {"added_tokens_decoder": {str(number): token(text, text in special) for text, number in tokens.items()}}


TOKENS = {"\n": 430, "{": 431, "<sep>": 432}


@pytest.mark.parametrize(
    "files",
    [
        {"added_tokens": TOKENS, "special_tokens_map": {"additional_special_tokens": ["<sep>"]}},
        {"added_tokens": TOKENS, "tokenizer_config": {"extra_special_tokens": ["<sep>"], "extra_ids": 100}},
        {"tokenizer_config": in_decoder(TOKENS, ["<sep>"])},
        {"tokenizer_config": in_decoder(TOKENS, ["<sep>"]), "added_tokens": {"ignored": 5}},
        {"tokenizer_config": in_decoder({"<pad>": 0, "<extra_id_99>": 330, "<extra_id_0>": 429} | TOKENS, ["<sep>"])},
        {"tokenizer": {"added_tokens": [token(text, text == "<sep>") | {"id": i} for text, i in TOKENS.items()]}},
    ],
)
def test_tokens_behind_a_sentencepiece_models_sentinels(files, spiece):
    write(spiece, **files)
    vocabulary = vocabulary_files.vocabulary(str(spiece / "spiece.model"))
    ids = token_ids(vocabulary)
    assert (vocabulary.vocab_size, ids.mask_id, ids.size) == (433, 433, 434)
    text = "the\nfox {"
    tokens = vocabulary.encode(text)
    assert 430 in tokens and tokens[-1] == 431
    assert vocabulary.decode(tokens) == text and vocabulary.encode_tf(text).numpy().tolist() == tokens
    assert "".join(cells(vocabulary, tokens, {})) == text
    parts = [*encode_part(vocabulary, "the\n", True), *encode_part(vocabulary, "fox {", False)]
    assert vocabulary.decode(parts) == text and piece(vocabulary, 430) == b"\n"
    noise = set(ids.noise_ids().tolist())
    assert {430, 431} <= noise and not {432, 433, 429, 330} & noise
    assert list(vocabularies.sentinels(vocabulary)) == list(range(429, 329, -1))
    plain = token_ids(seqio.SentencePieceVocabulary(str(spiece / "spiece.model"), extra_ids=100))
    assert ids.fingerprint != plain.fingerprint and vocabulary != plain


@pytest.mark.slow
def test_span_corruption_takes_the_sentinels_before_added_tokens(spiece):
    write(spiece, added_tokens=TOKENS)
    vocabulary = vocabulary_files.vocabulary(str(spiece / "spiece.model"))
    features = {name: seqio.Feature(vocabulary, add_eos=True) for name in ("inputs", "targets")}
    ids = np.arange(3, 40, dtype=np.int32)
    dataset = tf.data.Dataset.from_tensors({"targets": ids})
    for objective in (preprocessors.span_corruption, preprocessors.ul2):
        for example in objective(dataset, {"inputs": 40, "targets": 30}, features).as_numpy_iterator():
            both = [*example["inputs"].tolist(), *example["targets"].tolist()]
            assert max(both) <= 429
    example, *_ = preprocessors.span_corruption(dataset, {"inputs": 40, "targets": 30}, features).as_numpy_iterator()
    assert 429 in example["inputs"] and 428 in example["targets"]


def test_without_added_tokens_nothing_is_different(spiece):
    plain = vocabulary_files.vocabulary(str(spiece / "spiece.model"))
    model = plain.tokenizer
    with_space = next(i for i in range(300, PIECES) if model.IdToPiece(i).startswith("▁"))
    write(spiece, tokenizer={"added_tokens": [token(model.IdToPiece(with_space)) | {"id": with_space}]})
    write(spiece, tokenizer_config=in_decoder({"<pad>": 0, "<extra_id_0>": 429}), added_tokens={"<extra_id_99>": 330})
    vocabulary = vocabulary_files.vocabulary(str(spiece / "spiece.model"))
    assert type(vocabulary) is type(plain) and vocabulary == plain
    assert token_ids(vocabulary) == token_ids(plain)


def test_tokens_where_sentinels_would_be_say_that_there_are_none(spiece):
    write(spiece, added_tokens={"<padding>": PIECES, "far": PIECES + 3})
    vocabulary = vocabulary_files.vocabulary(str(spiece / "spiece.model"))
    assert vocabulary.vocab_size == PIECES + 4 and not vocabularies.sentinels(vocabulary)
    assert piece(vocabulary, PIECES) == b"<padding>" and PIECES + 1 not in token_ids(vocabulary).noise_ids()


def test_an_added_token_comes_before_a_piece_of_its_text(spiece):
    model = vocabulary_files.vocabulary(str(spiece / "spiece.model")).tokenizer
    text = next(model.IdToPiece(i) for i in range(300, PIECES) if "▁" not in model.IdToPiece(i))
    write(spiece, added_tokens={text: 430})
    vocabulary = vocabulary_files.vocabulary(str(spiece / "spiece.model"))
    tokens = vocabulary.encode(f"x{text}")
    assert tokens[-1] == 430 and vocabulary.decode(tokens) == f"x{text}"
    assert model.PieceToId(text) not in token_ids(vocabulary).noise_ids()


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"added_tokens": {"<unk>": 430}}, r"added_tokens\.json: '<unk>' is a special piece of .* already"),
        ({"added_tokens": {"new": 7}}, r"added_tokens\.json: 'new' has the id 7, which is .* in .*spiece\.model"),
        ({"added_tokens": {"new": 2**31 - 1}}, "has the id 2147483647, which is more than .* bytes of tokens can hold"),
        ({"added_tokens": {"new": "430"}}, r"added_tokens\.json: '430' is not a token id"),
        ({"added_tokens": ["new"]}, r"added_tokens\.json should be a JSON object"),
        ({"tokenizer_config": {"added_tokens_decoder": [1]}}, "added_tokens_decoder should be an object of objects"),
        (
            {"tokenizer_config": {"added_tokens_decoder": {"430": {}}}},
            r"config\.json has an added token without a text",
        ),
        ({"tokenizer_config": {"added_tokens_decoder": {"-1": token("a")}}}, "'-1' is not a token id"),
        ({"tokenizer": {"added_tokens": 5}}, r"tokenizer\.json: added_tokens should be a list of objects"),
    ],
)
def test_files_that_are_refused(files, message, spiece):
    write(spiece, **files)
    with pytest.raises(UserError, match=message):
        vocabulary_files.vocabulary(str(spiece / "spiece.model"))


def test_tokens_beside_a_tokenizer_json(tmp_path):
    path = open_models.save_tokenizer(tmp_path, open_models.byte_level(), eos_token="<|end|>")
    plain = vocabulary_files.vocabulary(path)
    write(tmp_path, added_tokens={"<sep>": 300, "ab ab": 301}, special_tokens_map={"sep_token": "<sep>"})
    vocabulary = vocabulary_files.vocabulary(path)
    ids = token_ids(vocabulary)
    assert ids.mask_id == 302 and vocabulary.encode("a<sep>ab ab")[1:] == [300, 301]
    assert 301 in ids.noise_ids() and 300 not in ids.noise_ids()
    assert encode_part(vocabulary, "ab ab", begins=False) == [301] and vocabulary != plain
    assert vocabulary.encode_tf("a<sep>").numpy().tolist() == vocabulary.encode("a<sep>")
    config = {
        "eos_token": "<|end|>",
        "added_tokens_decoder": {"300": token("<sep>")},
    }  # counts before added_tokens.json
    write(tmp_path, tokenizer_config=config)
    assert token_ids(vocabulary_files.vocabulary(path)).mask_id == 301
    write(tmp_path, tokenizer_config={"eos_token": "<|end|>", "added_tokens_decoder": {"305": token("<sep>")}})
    with pytest.raises(UserError, match="'<sep>' should have the id 305, but has 300"):
        vocabulary_files.vocabulary(path)
    write(tmp_path, tokenizer_config={"eos_token": "<|end|>", "added_tokens_decoder": {"5": token("<|pad|>")}})
    with pytest.raises(UserError, match=r"'<\|pad\|>' should have the id 5, but has 1"):
        vocabulary_files.vocabulary(path)


def test_the_file_that_names_special_tokens_is_the_one_of_transformers(tmp_path):
    path = open_models.save_tokenizer(tmp_path, open_models.byte_level(), eos_token="<|end|>")
    write(tmp_path, special_tokens_map={"eos_token": "<|pad|>"})
    assert vocabulary_files.vocabulary(path).eos_id == 1
    write(tmp_path, tokenizer_config={"eos_token": "<|end|>", "added_tokens_decoder": {}})
    assert vocabulary_files.vocabulary(path).eos_id == 0


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"tokenizer_config": []}, r"tokenizer_config\.json should be a JSON object"),
        ({"tokenizer_config": {"eos_token": 5}}, r"tokenizer_config\.json: eos_token = 5 should be a text, or"),
        ({"tokenizer_config": {"eos_token": {"id": 0}}}, "eos_token = .* should be a text"),
        ({"tokenizer_config": {"eos_token": ["<|end|>"]}}, "eos_token = .* should be a text"),
        ({"special_tokens_map": "x"}, r"special_tokens_map\.json should be a JSON object"),
        ({"special_tokens_map": {"pad_token": {"content": 3}}}, "pad_token = .* should be a text"),
        ({"special_tokens_map": {"additional_special_tokens": 3}}, "additional_special_tokens should be a list"),
        ({"config": 7}, r"config\.json should be a JSON object"),
    ],
)
def test_files_of_another_form_beside_a_tokenizer_json(files, message, tmp_path):
    path = open_models.save_tokenizer(tmp_path, open_models.byte_level(), eos_token="<|end|>")
    write(tmp_path, **files)
    with pytest.raises(UserError, match=message):
        vocabulary_files.vocabulary(path)


def test_ids_beyond_what_a_tokenizer_json_can_hold(tmp_path):
    spec = json.loads(open_models.byte_level().to_str())
    spec["model"]["vocab"]["far"] = 2**31 - 1
    path = pathlib.Path(open_models.save_tokenizer(tmp_path, open_models.byte_level(), eos_token="<|end|>"))
    path.write_text(json.dumps(spec))
    with pytest.raises(UserError, match=r"tokenizer\.json has the id 2147483647, which is more than"):
        vocabulary_files.vocabulary(str(path))


def with_sentinels(folder, names):
    tokenizer = open_models.byte_level()
    tokenizer.add_special_tokens([*names, "<behind>"])
    return open_models.save_tokenizer(folder, tokenizer, eos_token="<|end|>", pad_token="<|pad|>")


def test_sentinels_of_a_tokenizer_json(tmp_path):
    names = [f"<extra_id_{number}>" for number in range(100)]
    vocabulary = vocabulary_files.vocabulary(with_sentinels(tmp_path / "t5", names[::-1]))
    assert list(vocabularies.sentinels(vocabulary)) == list(range(399, 299, -1))
    ids = token_ids(vocabulary)
    assert not {300, 399, 400} & set(ids.noise_ids().tolist()) and ids.mask_id == 401
    assert not vocabularies.sentinels(vocabulary_files.vocabulary(with_sentinels(tmp_path / "none", [])))
    ascending = vocabulary_files.vocabulary(with_sentinels(tmp_path / "ascending", names))
    assert not {300, 399} & set(token_ids(ascending).noise_ids().tolist())
    with pytest.raises(UserError, match=r"<extra_id_0> to <extra_id_99> with the ids 300, 301, 302, \.\.\.: T5's"):
        vocabularies.sentinels(ascending)


@pytest.mark.slow
def test_sentinels_are_those_behind_the_sentencepiece_model(tmp_path, spiece):
    """Span corruption is the same, id for id, for a T5 that transformers saves as tokenizer.json alone."""
    behind = vocabulary_files.vocabulary(str(spiece / "spiece.model"))
    model = behind.tokenizer
    pieces = [(model.IdToPiece(number).removeprefix("▁"), 0.0) for number in range(PIECES, PIECES + 100)]
    pieces = [(model.IdToPiece(number), model.GetScore(number)) for number in range(PIECES)] + pieces
    tokenizer = tokenizers.Tokenizer(tokenizers.models.Unigram(pieces, unk_id=2))
    tokenizer.add_special_tokens([name for name, _ in pieces[PIECES:]])
    path = open_models.save_tokenizer(tmp_path / "json", tokenizer, eos_token="</s>", pad_token="<pad>")
    made = []
    for vocabulary in (behind, vocabulary_files.vocabulary(path)):
        features = {name: seqio.Feature(vocabulary, add_eos=True) for name in ("inputs", "targets")}
        dataset = tf.data.Dataset.from_tensors({"targets": np.arange(3, 60, dtype=np.int32)})
        for objective in (preprocessors.span_corruption, preprocessors.ul2):
            with seqio.utils.map_seed_manager(3):
                made.append(objective(dataset, {"inputs": 60, "targets": 40}, features))
    made = [[{k: v.tolist() for k, v in x.items()} for x in dataset.as_numpy_iterator()] for dataset in made]
    assert made[0] == made[2] and made[1][0]["targets"][-1] == made[3][0]["targets"][-1]
