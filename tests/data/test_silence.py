"""Native libraries that log without a switch: only their noise is dropped."""

import os

import pytest
from open_models import save_sentencepiece

from diffusion_t5x.data.silence import silent_stderr


def test_only_lines_of_noise_are_dropped(capfd):
    with pytest.raises(ValueError), silent_stderr(b" LOG(INFO) "):
        os.write(2, b"a.cc(1) LOG(INFO) all is well\nb.cc(2) LOG(ERROR) nothing is\n")
        raise ValueError
    os.write(2, b"after\n")
    assert capfd.readouterr().err == "b.cc(2) LOG(ERROR) nothing is\nafter\n"
    with silent_stderr():
        os.write(2, b"anything\n")
    assert capfd.readouterr().err == ""


def test_a_sentencepiece_model_is_read_once_and_quietly_by_tensorflow(tmp_path, capfd):
    seqio, tf = pytest.importorskip("seqio"), pytest.importorskip("tensorflow")
    from diffusion_t5x.data.sentencepiece_vocabulary import SentencePieceVocabulary

    path = save_sentencepiece(tmp_path / "model", normalization_rule_name="identity")
    own, theirs = SentencePieceVocabulary(path, extra_ids=10), seqio.SentencePieceVocabulary(path, extra_ids=10)
    texts = ["the", "a b c <extra_id_3>", "", "é\u200d漢 \x00"]
    capfd.readouterr()
    data = tf.data.Dataset.from_tensor_slices(texts).map(own.encode_tf, num_parallel_calls=2)
    tokens = [[x.tolist() for x in data.as_numpy_iterator()] for _ in range(2)]
    assert "normalizer" not in capfd.readouterr().err
    assert tokens == [[theirs.encode_tf(text).numpy().tolist() for text in texts]] * 2
