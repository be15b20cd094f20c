"""Meanings of ids, against SentencePiece's own account of a model."""

import jax
import numpy as np
import pytest
from open_models import save_sentencepiece

from diffusion_t5x.data import vocabularies
from diffusion_t5x.errors import UserError

seqio = pytest.importorskip("seqio")


def test_sentencepiece(tmp_path):
    vocabulary = seqio.SentencePieceVocabulary(save_sentencepiece(tmp_path / "m"), extra_ids=100)
    ids = vocabularies.token_ids(vocabulary)
    assert ids.mask_id == vocabulary.vocab_size == ids.size - 1
    assert (ids.pad_id, ids.eos_id, ids.start_id) == (0, 1, 0)
    pieces = ids.size - 101
    assert ids.noise_ranges == ((0, 2), (3, pieces))  # all but unknown, sentinels and MASK
    assert vocabulary.encode("<extra_id_0>")[-1] == ids.mask_id - 1
    byte = vocabulary.tokenizer.PieceToId("<0xFF>")
    assert byte in ids.noise_ids()
    assert set(vocabulary.encode("fox ☃")) <= set(ids.noise_ids().tolist())


def test_sentinels_bos_and_unused_ids_inside_the_model(tmp_path):
    symbols = {"user_defined_symbols": "<extra_id_0>,<keep>", "control_symbols": "<c>"}
    path = save_sentencepiece(tmp_path / "m", bos_id=3, **symbols)
    vocabulary = seqio.SentencePieceVocabulary(path)
    ids = vocabularies.token_ids(vocabulary)
    assert ids.start_id == 3
    noise = set(ids.noise_ids().tolist())
    to_id = vocabulary.tokenizer.PieceToId
    assert to_id("<keep>") in noise
    assert not noise & {to_id("<extra_id_0>"), to_id("<c>"), 2, 3, ids.mask_id}
    assert len(noise) == ids.size - 5


def test_bytes_and_plain_ids():
    ids = vocabularies.token_ids(seqio.ByteVocabulary(extra_ids=10))
    assert (ids.size, ids.mask_id, ids.noise_ranges) == (270, 269, ((0, 2), (3, 259)))
    ids = vocabularies.token_ids(seqio.PassThroughVocabulary(27, eos_id=1))
    assert (ids.size, ids.mask_id, ids.noise_ranges) == (28, 27, ((0, 27),))


def test_noise_is_uniform_over_the_noise_vocabulary():
    ids = vocabularies.token_ids(seqio.ByteVocabulary(extra_ids=10))
    drawn = np.asarray(ids.sample_noise(jax.random.key(0), (258 * 400,)))
    counts = np.bincount(drawn, minlength=ids.size)
    assert set(np.flatnonzero(counts)) == set(ids.noise_ids().tolist())
    assert np.abs(counts[ids.noise_ids()] - 400).max() < 5 * 400**0.5


def test_unfit_vocabularies_are_refused():
    with pytest.raises(UserError, match="no EOS"):
        vocabularies.token_ids(seqio.PassThroughVocabulary(27))
    with pytest.raises(UserError, match="FullCodepointVocabulary is not supported"):
        vocabularies.token_ids(seqio.vocabularies.FullCodepointVocabulary())


def test_fingerprint_tells_vocabularies_apart(tmp_path):
    one, same, other = (
        vocabularies.token_ids(seqio.SentencePieceVocabulary(save_sentencepiece(tmp_path / name, vocab_size=size)))
        for name, size in (("a", 330), ("b", 330), ("c", 320))
    )
    one.check_same(same.describe(), "somewhere")
    with pytest.raises(UserError, match="checkpoints/7 was trained with another vocabulary"):
        one.check_same(other.describe(), "checkpoints/7")
    # The class is no part of a vocabulary: the quickstart's is read back from its file as SeqIO's own.
    one.check_same({**one.describe(), "name": "QuickstartVocabulary"}, "checkpoints/7")


def test_t5s_own_vocabulary(test_data):
    """32,000 pieces of which 0 is pad, 1 EOS and 2 unknown; T5 adds 100 sentinels, and MASK comes behind them."""
    model = str(test_data / "t5_sentencepiece" / "t5_vocab.model")
    ids = vocabularies.token_ids(seqio.SentencePieceVocabulary(model, extra_ids=100))
    assert (ids.size, ids.pad_id, ids.eos_id, ids.start_id, ids.mask_id) == (32_101, 0, 1, 0, 32_100)
    assert ids.noise_ranges == ((0, 2), (3, 32_000))


def test_vocabularies_that_differ_only_in_extra_ids():
    seqio = pytest.importorskip("seqio")
    few, many = seqio.ByteVocabulary(extra_ids=0), seqio.ByteVocabulary(extra_ids=100)
    assert vocabularies.difference(few, many) == "they differ only in extra_ids, 0 and 100"
    assert "PassThroughVocabulary" in vocabularies.difference(few, seqio.PassThroughVocabulary(8))
    described = vocabularies.token_ids(few).describe()
    with pytest.raises(UserError, match=r"100 ids more: if both come from one file, they differ in extra_ids alone\.$"):
        vocabularies.token_ids(many).check_same(described, "/a/checkpoint")
