"""Span corruption: nothing is lost, everything fits, and T5's own example comes out."""

import functools
import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from diffusion_t5x.data import vocabularies, vocabulary_files
from diffusion_t5x.errors import UserError

seqio = pytest.importorskip("seqio")
tf = pytest.importorskip("tensorflow")

from t5.data import preprocessors as t5_preprocessors  # noqa: E402

from diffusion_t5x.tasks import preprocessors  # noqa: E402

VOCABULARY = seqio.PassThroughVocabulary(1000, eos_id=1)
SENTINELS = seqio.ByteVocabulary(extra_ids=100)  # ids 259 to 358


def run(preprocessor, documents, lengths, vocabulary=SENTINELS, seed=0):
    features = {name: seqio.Feature(vocabulary, add_eos=True) for name in ("inputs", "targets")}
    dataset = tf.data.Dataset.from_generator(
        lambda: ({"targets": document} for document in documents),
        output_signature={"targets": tf.TensorSpec([None], tf.int32)},
    )
    with seqio.utils.map_seed_manager(seed):
        examples = preprocessor(dataset, lengths, features)
    examples = seqio.preprocessors.append_eos(examples, features)
    return [{name: x[name].tolist() for name in ("inputs", "targets")} for x in examples.as_numpy_iterator()]


@pytest.mark.parametrize("sentinels", ["added", "in the model"])
def test_t5s_example_comes_out_token_for_token(sentinels, test_data, tmp_path, monkeypatch):
    """arXiv 1910.10683, figure 2. mT5's model has its sentinels in itself."""
    file = test_data / "t5_sentencepiece" / "t5_vocab.model"
    vocabulary = vocabulary_files.vocabulary(str(file))
    assert vocabulary.extra_ids == 100
    if sentinels == "in the model":
        file = tmp_path / "as_mt5.model"
        file.write_bytes(vocabulary.contents)
        vocabulary = vocabulary_files.vocabulary(str(file))
        assert vocabulary.extra_ids == 0
    assert len(vocabularies.sentinels(vocabulary)) == 100
    text = "Thank you for inviting me to your party last week."
    tokens = vocabulary.encode(text)
    hidden = [vocabulary.decode([token]) in ("for", "inviting", "last") for token in tokens]
    assert sum(hidden) == 3
    monkeypatch.setattr(t5_preprocessors, "random_spans_noise_mask", lambda *args, **kwargs: tf.constant(hidden))
    (example,) = run(preprocessors.span_corruption, [tokens], {"inputs": 512, "targets": 114}, vocabulary)
    sentinel = vocabulary.vocab_size - 1  # <extra_id_0> is the last id, 32,099
    assert sentinel == 32_099
    part = {
        name: vocabulary.encode(name) for name in ("Thank you", "for inviting", "me to your party", "last", "week.")
    }
    assert example == {
        "inputs": [*part["Thank you"], sentinel, *part["me to your party"], sentinel - 1, *part["week."], 1],
        "targets": [sentinel, *part["for inviting"], sentinel - 1, *part["last"], sentinel - 2, 1],
    }
    assert vocabulary.decode(example["inputs"]) == "Thank you <extra_id_0> me to your party <extra_id_1> week."
    assert vocabulary.decode(example["targets"]) == "<extra_id_0> for inviting <extra_id_1> last <extra_id_2>"


@pytest.mark.parametrize("contents", [b"", b"some text", b"IQ== 0\nIg== 1\n"], ids=["empty", "text", "tiktoken"])
def test_what_is_no_sentencepiece_model_is_said(contents, tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(contents)
    with pytest.raises(UserError, match="is not a SentencePiece model"):
        vocabulary_files.vocabulary(str(tmp_path / "tokenizer.model"))


@pytest.mark.parametrize("mean_span,expected", [(2, (70, 22)), (1, (63, 27))])
def test_lengths_as_in_t5s_own_tests(mean_span, expected):
    found = t5_preprocessors.random_spans_helper(
        inputs_length=64,
        noise_density=0.2,
        mean_noise_span_length=mean_span,
        extra_tokens_per_span_inputs=1,
        extra_tokens_per_span_targets=1,
    )
    assert found == expected
    corrupt = functools.partial(preprocessors.span_corruption, noise_density=0.2, mean_noise_span_length=mean_span)
    (example,) = run(corrupt, [list(range(3, 3 + expected[0]))], {"inputs": 64, "targets": expected[1]})
    assert (len(example["inputs"]), len(example["targets"])) == (64, expected[1])


def joined(parts):
    return list(itertools.chain.from_iterable(parts))


def restore(example):
    """The document of an example of span corruption: what stands behind each sentinel, put in its place."""
    spans, sentinel = {}, None
    for token in example["targets"][:-1]:
        if token >= 259:
            sentinel = token
            spans[sentinel] = []
        else:
            spans[sentinel].append(token)
    restored = []
    for token in example["inputs"][:-1]:
        restored += spans.pop(token) if token >= 259 else [token]
    assert list(spans.values()) in ([], [[]])  # a last sentinel stands for the end
    return restored


DOCUMENTS = st.lists(st.lists(st.integers(3, 258), min_size=2, max_size=90), min_size=1, max_size=4)


@settings(max_examples=5, deadline=None, derandomize=True)
@given(DOCUMENTS, st.integers(0, 1000))
def test_span_corruption_hides_spans_and_loses_nothing(documents, seed):
    lengths = {"inputs": 30, "targets": 14}
    examples = run(preprocessors.span_corruption, documents, lengths, seed=seed)
    for example in examples:
        assert example["inputs"][-1] == example["targets"][-1] == 1
        assert len(example["inputs"]) <= 30 and len(example["targets"]) <= 14
        sentinels = [token for token in example["targets"] if token >= 259]
        assert sentinels == list(range(358, 358 - len(sentinels), -1))
    assert joined(restore(example) for example in examples) == joined(documents)


def test_span_corruption_hides_the_share_it_was_told_to():
    rng = np.random.default_rng(0)
    documents = [rng.integers(3, 259, 512).tolist() for _ in range(20)]
    for density, span in [(0.15, 3.0), (0.5, 5.0)]:
        corrupt = functools.partial(preprocessors.span_corruption, noise_density=density, mean_noise_span_length=span)
        examples = run(corrupt, documents, {"inputs": 128, "targets": 128})
        hidden = [[token for token in example["targets"][:-1] if token < 259] for example in examples]
        spans = [sum(token >= 259 for token in example["inputs"]) for example in examples]
        assert sum(map(len, hidden)) / (20 * 512) == pytest.approx(density, abs=0.02)
        assert sum(map(len, hidden)) / sum(spans) == pytest.approx(span, rel=0.1)


def test_what_does_not_fit_is_said():
    with pytest.raises(UserError, match="makes 26 tokens of targets: set TASK_FEATURE_LENGTHS"):
        run(preprocessors.span_corruption, [], {"inputs": 114, "targets": 25})
    with pytest.raises(UserError, match="need a vocabulary with sentinels"):
        run(preprocessors.span_corruption, [], {"inputs": 30, "targets": 14}, VOCABULARY)
