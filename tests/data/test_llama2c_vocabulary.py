"""llama2.c's tokenizer, against its algorithm written down plainly, and the text that its model is known to write."""

import struct

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from diffusion_t5x.data.seqio_source import SeqioDataset
from diffusion_t5x.data.vocabularies import piece, token_ids
from diffusion_t5x.errors import UserError

seqio = pytest.importorskip("seqio")
tf = pytest.importorskip("tensorflow")
from diffusion_t5x.data.llama2c_vocabulary import Llama2cVocabulary  # noqa: E402

BYTES = [(f"<0x{byte:02X}>", 0.0) for byte in range(256)]
# Two pairs of one score side by side, a piece of a character that has no piece, and one that no merge reaches.
PIECES = [(" ", -9.0), ("a", -8.0), ("b", -8.0), ("aa", -1.0), ("ab", -1.0), (" a", -2.0), ("aab", 0.0), ("é", -3.0),
          ("\n", -8.0), ("bé", -0.5), ("far away", 1.0)]  # fmt: skip


def write_tokenizer(path, pieces=PIECES):
    rows = [("<unk>", 0.0), ("\n<s>\n", 0.0), ("\n</s>\n", 0.0), *BYTES, *pieces]
    encoded = [(text.encode(), score) for text, score in rows]
    contents = struct.pack("<i", max(len(text) for text, _ in encoded))
    contents += b"".join(struct.pack("<fi", score, len(text)) + text for text, score in encoded)
    path.write_bytes(contents)
    return path


def plain_encode(pieces, text):
    """run.c's `encode`, step by step; `pieces` are all, by id."""
    ids = {text.encode(): (number, score) for number, (text, score) in enumerate(pieces, 259)}
    names = [None] * 3 + [text.encode() for text, _ in [*BYTES, *pieces]]
    tokens = []
    for character in [" ", *text] if text else "":
        known = ids.get(character.encode())
        tokens += [known[0]] if known else [byte + 3 for byte in character.encode()]
    while True:
        best = (-1e10, None, None)
        for i in range(len(tokens) - 1):
            joined = ids.get(names[tokens[i]] + names[tokens[i + 1]])
            if joined and joined[1] > best[0]:
                best = (joined[1], joined[0], i)
        if best[1] is None:
            return tokens
        tokens[best[2] : best[2] + 2] = [best[1]]


@pytest.fixture(scope="module")
def vocabulary(tmp_path_factory):
    return Llama2cVocabulary(str(write_tokenizer(tmp_path_factory.mktemp("vocabulary") / "tok.bin")))


@pytest.fixture(scope="module")
def stories(test_data):
    return Llama2cVocabulary(str(test_data / "stories260k" / "tok512.bin"))


@given(st.text(alphabet="aab é\nzx<0>☃") | st.text())
@settings(max_examples=300, deadline=None)
def test_encodes_as_run_c_does_and_decodes_back(vocabulary, text):
    ids = vocabulary.encode(text)
    assert ids == plain_encode(PIECES, text)
    assert vocabulary.decode(ids) == text
    assert vocabulary.pad_id not in ids


@given(st.lists(st.sampled_from("ab aé"), max_size=12).map("".join), st.randoms(use_true_random=False))
@settings(max_examples=50, deadline=None)
def test_merges_as_run_c_does_whatever_the_scores(tmp_path_factory, text, random):
    pieces = [(name, random.choice([-3.0, -2.0, -1.0])) for name in {text[i:j] for i in range(6) for j in range(i, 8)}]
    pieces = [(" ", -3.0), *((name, score) for name, score in pieces if name not in ("", " "))]
    path = write_tokenizer(tmp_path_factory.mktemp("scores") / "tok.bin", pieces)
    assert Llama2cVocabulary(str(path)).encode(text) == plain_encode(pieces, text)


@given(st.text())
@settings(max_examples=100, deadline=None)
def test_stories_vocabulary_decodes_what_it_encodes(stories, text):
    assert stories.decode(stories.encode(text)) == text


def test_a_story_in_pieces(stories, test_data):
    text = (test_data / "stories260k" / "expected_greedy.txt").read_text().rstrip("\n")
    ids = stories.encode(text)
    assert b"".join(piece(stories, token) for token in ids) == b" " + text.encode()
    assert len(ids) == 256
    assert stories.encode("☃") == [stories.encode("a ")[-1], *(byte + 3 for byte in "☃".encode())]


@pytest.mark.parametrize("text", ["", " ", "aab  abé", "é☃\n\x00", "<0x41><s></s>"])
@pytest.mark.parametrize("compiled", [False, True])
def test_tensorflow_gives_the_same(vocabulary, text, compiled):
    wrap = tf.function if compiled else lambda function: function
    ids = wrap(vocabulary.encode_tf)(tf.constant(text))
    assert ids.dtype == tf.int32 and ids.numpy().tolist() == vocabulary.encode(text)
    assert wrap(vocabulary.decode_tf)(ids).numpy().decode() == text
    padded = [[*ids.numpy(), 2, 0, 260], [260] * (len(ids) + 3)]
    decoded = wrap(vocabulary.decode_tf)(tf.constant(padded)).numpy().tolist()
    assert [x.decode() for x in decoded] == [text, "a" * (len(ids) + 3)]


def test_a_text_ends_with_eos_or_where_bos_begins_another(vocabulary):
    a, b = vocabulary.encode("a")[-1], 261
    assert vocabulary.decode([a, b, 2, b]) == vocabulary.decode([a, b, 1, b]) == vocabulary.decode([a, b])
    assert vocabulary.decode([3 + 0xE2, 3 + 0x98]) == "�"  # a character that was cut


def test_what_diffusion_knows_of_it(vocabulary, tmp_path):
    ids = token_ids(vocabulary)
    size = 259 + len(PIECES)
    assert (ids.size, ids.mask_id, ids.pad_id, ids.start_id, ids.eos_id) == (size + 1, size, 0, 1, 2)
    assert ids.noise_ranges == ((0, 1), (2, size))
    assert [piece(vocabulary, i) for i in (0, 1, 3, 258, 259)] == [b"<unk>", b"<s>", b"\0", b"\xff", b" "]
    other = Llama2cVocabulary(str(write_tokenizer(tmp_path / "other", [*PIECES[:-1], ("b b", 0.5)])))
    assert other != vocabulary and token_ids(other).fingerprint != ids.fingerprint
    assert other == Llama2cVocabulary(str(tmp_path / "other"))


def test_a_position_in_data_tokenised_on_the_way_is_saved(vocabulary):
    feature = seqio.Feature(vocabulary)
    texts = ["a", "ab", "aé", "b"]
    seqio.TaskRegistry.add(
        "llama2c_vocabulary_test",
        source=seqio.FunctionDataSource(
            lambda split, shuffle_files, seed=None: tf.data.Dataset.from_tensor_slices({"targets": texts}), ["train"]
        ),
        preprocessors=[seqio.preprocessors.tokenize, seqio.preprocessors.append_eos],
        output_features={"targets": feature},
    )
    dataset = SeqioDataset("llama2c_vocabulary_test", {"targets": 6}, batch_size=2, shuffle=False)
    batches = dataset.train_iterator()
    next(batches)
    state = batches.state_dict()
    expected = next(batches).tokens
    assert expected.tolist() == [[*ids, 2, *[0] * (5 - len(ids))] for ids in map(vocabulary.encode, texts[2:])]
    again = dataset.train_iterator()
    again.load_state_dict(state)
    np.testing.assert_array_equal(next(again).tokens, expected)


def test_files_that_are_no_tokenizer(tmp_path, test_data):
    whole = write_tokenizer(tmp_path / "whole").read_bytes()
    (tmp_path / "cut").write_bytes(whole[:-3])
    (tmp_path / "text").write_text("pieces " * 1000)
    write_tokenizer(tmp_path / "no space", PIECES[1:])
    for name, message in {
        "cut": "truncated.*piece 269",
        "text": "tokenizer file: ids 3 to 258",
        "no space": "no piece for a space",
        "nowhere": "Cannot read the tokenizer file",
    }.items():
        with pytest.raises(UserError, match=message):
            Llama2cVocabulary(str(tmp_path / name))
    with pytest.raises(UserError, match="tokenizer file: ids 3 to 258"):
        Llama2cVocabulary(str(test_data / "stories260k" / "stories260K.bin"))
