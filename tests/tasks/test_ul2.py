"""UL2 and full LM: nothing is lost, everything fits, and the denoisers hide what the paper says."""

import itertools

import numpy as np
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from diffusion_t5x.errors import UserError

seqio = pytest.importorskip("seqio")
tf = pytest.importorskip("tensorflow")

from diffusion_t5x.tasks import preprocessors  # noqa: E402

VOCABULARY = seqio.ByteVocabulary(extra_ids=100)  # sentinels are 259 to 358
FEATURES = {name: seqio.Feature(VOCABULARY, add_eos=True) for name in ("inputs", "targets")}
MODES = {tuple(VOCABULARY.encode(mode)): mode for mode in ("[R]", "[S]", "[X]")}


def run(preprocessor, documents, lengths, seed=0, **options):
    dataset = tf.data.Dataset.from_generator(
        lambda: ({"targets": document} for document in documents),
        output_signature={"targets": tf.TensorSpec([None], tf.int32)},
    )
    with seqio.utils.map_seed_manager(seed):
        examples = preprocessor(dataset, lengths, FEATURES, **options)
    examples = seqio.preprocessors.append_eos(examples, FEATURES)
    return [{name: x[name].tolist() for name in ("inputs", "targets")} for x in examples.as_numpy_iterator()]


def restore(example):
    """The mode and the chunk: what stands behind each sentinel, put in its place; for S the end behind the rest."""
    assert example["inputs"][-1] == example["targets"][-1] == 1
    mode = MODES[tuple(example["inputs"][:3])]
    inputs, targets = example["inputs"][3:-1], example["targets"][:-1]
    if mode == "[S]":
        return mode, inputs + targets
    spans = {}
    for token in targets:
        if token >= 259:
            spans[token] = sentinel = []
        else:
            sentinel.append(token)
    restored = [piece for token in inputs for piece in (spans.pop(token) if token >= 259 else [token])]
    assert list(spans.values()) in ([], [[]])  # a last sentinel stands for the end
    return mode, restored


DOCUMENTS = st.lists(st.lists(st.integers(3, 258), min_size=2, max_size=200), min_size=1, max_size=6)


@pytest.mark.slow
@settings(max_examples=4, deadline=None, derandomize=True, phases=[Phase.generate])  # shrinking takes minutes
@given(DOCUMENTS, st.integers(0, 1000), st.sampled_from([(24, 24), (40, 17), (64, 64), (33, 90)]))
def test_ul2_loses_nothing_and_fits(documents, seed, lengths):
    lengths = dict(zip(("inputs", "targets"), lengths, strict=True))
    examples = run(preprocessors.ul2, documents, lengths, seed)
    for example in examples:
        assert len(example["inputs"]) <= lengths["inputs"] and len(example["targets"]) <= lengths["targets"]
    restored = [restore(example)[1] for example in examples]
    assert list(itertools.chain.from_iterable(restored)) == list(itertools.chain.from_iterable(documents))


@pytest.mark.slow
def test_denoisers_are_equally_likely_and_hide_the_published_shares():
    rng = np.random.default_rng(0)
    documents = [rng.integers(3, 259, 400).tolist() for _ in range(400)]
    lengths = {"inputs": 512, "targets": 512}
    modes = [restore(example)[0] for example in run(preprocessors.ul2, documents, lengths)]
    assert len(modes) == 400
    counts = [modes.count(mode) for mode in ("[R]", "[S]", "[X]")]
    expected = np.array([2, 1, 4]) * 400 / 7
    assert np.all(np.abs(counts - expected) < 5 * np.sqrt(expected)), counts
    for denoiser in preprocessors.UL2_DENOISERS:
        tight = {"inputs": 301, "targets": 160}  # room is counted as t5's mask takes it, to the last token
        examples = run(preprocessors.ul2, documents[:100], tight, denoisers=[denoiser])
        assert all(len(example[name]) <= length for example in examples for name, length in tight.items())
        hidden = [[token for token in example["targets"][:-1] if token < 259] for example in examples]
        share = sum(map(len, hidden)) / (400 * 100)
        assert share == pytest.approx(denoiser.noise_density, abs=0.04)
        if denoiser.mean_span_length:
            spans = [sum(token >= 259 for token in example["inputs"]) for example in examples]
            expected = [max(round(len(tokens) / denoiser.mean_span_length), 1) for tokens in hidden]
            assert sum(spans) == pytest.approx(sum(expected), rel=0.02)


def test_a_single_span_lies_anywhere():
    (denoiser,) = (d for d in preprocessors.UL2_DENOISERS if d.noise_density == 0.15 and d.mean_span_length == 64)
    examples = run(preprocessors.ul2, [[5] * 100] * 200, {"inputs": 200, "targets": 200}, denoisers=[denoiser])
    starts = np.array([example["inputs"].index(358) - 3 for example in examples])
    assert starts.min() >= 1 and starts.max() == 85
    assert starts.mean() == pytest.approx(43, abs=5 * 24.5 / 200**0.5)  # uniform over 1 to 85


def test_ul2_says_what_does_not_fit():
    with pytest.raises(UserError, match="UL2 needs longer inputs and targets than"):
        run(preprocessors.ul2, [], {"inputs": 5, "targets": 24})


def test_full_lm_asks_for_everything():
    documents = [list(range(3, 60)), [7], list(range(100, 120))]
    examples = run(preprocessors.full_lm, documents, {"inputs": 1, "targets": 20})
    assert {tuple(example["inputs"]) for example in examples} == {(1,)}
    chunks = [example["targets"] for example in examples]
    assert [len(chunk) for chunk in chunks] == [20, 20, 20, 2, 20, 2]
    assert [token for chunk in chunks for token in chunk[:-1]] == list(itertools.chain.from_iterable(documents))
