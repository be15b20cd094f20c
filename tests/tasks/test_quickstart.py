"""The quickstart's vocabulary, tasks and mixture."""

import collections
import dataclasses
import hashlib
import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest

from diffusion_t5x.data.seqio_source import SeqioDataset
from diffusion_t5x.errors import UserError

seqio = pytest.importorskip("seqio")

from diffusion_t5x.tasks import cldr_pairs, quickstart, stdlib_corpus  # noqa: E402

PAIRS = SeqioDataset("quickstart_pairs", {"inputs": 32, "targets": 32}, batch_size=64)
PRETRAIN = SeqioDataset("quickstart_pretrain", {"inputs": 64, "targets": 64}, batch_size=64, pack=True, canvas=False)


@pytest.fixture(scope="module")
def vocabulary():
    return PAIRS.vocabulary()


def test_ids(vocabulary):
    ids = PAIRS.token_ids()
    assert (ids.size, ids.pad_id, ids.eos_id, ids.mask_id, ids.start_id) == (2048, 0, 1, 2047, 0)
    assert ids.noise_ranges == ((0, 2), (3, quickstart.PIECES))
    assert vocabulary.unk_id == 2


def test_every_text_comes_back_exactly(vocabulary):
    texts = [text for split in ("train", "validation", "test") for pair in cldr_pairs.pairs(split)
             for text in (pair.english, pair.french)]  # fmt: skip
    texts += stdlib_corpus.documents("train")[::10] + stdlib_corpus.documents("validation")
    texts += ["\tdef f():\n\t\treturn  1 \n", "   leading", "trailing  ", "☃ 漢字", "1\u202f234,5\u00a0€"]
    tokens = vocabulary.tokenizer.encode(texts, num_threads=2)
    assert vocabulary.tokenizer.decode(tokens) == texts
    assert not any(vocabulary.unk_id in row for row in tokens)


def test_pairs_fit_into_32_tokens(vocabulary):
    for pairs in map(cldr_pairs.pairs, ("train", "validation", "test")):
        texts = [text for pair in pairs for text in (pair.english, pair.french)]
        assert max(map(len, vocabulary.tokenizer.encode(texts))) < 32  # and EOS


@pytest.mark.slow
def test_two_processes_at_once_agree_on_vocabulary_and_batches(tmp_path):
    code = "\n".join(
        [
            "import hashlib",
            "from diffusion_t5x.data.seqio_source import SeqioDataset",
            "from diffusion_t5x.tasks import quickstart",
            f"reader = {PRETRAIN!r}.train_iterator()",
            "tokens = b''.join(next(reader).tokens.tobytes() for _ in range(10))",
            "print(quickstart.vocabulary_file(), hashlib.sha256(tokens).hexdigest())",
        ]
    )
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", code],
            env=os.environ | {"DIFFUSION_T5X_CACHE": str(tmp_path), "PYTHONHASHSEED": seed},
            stdout=subprocess.PIPE,
            text=True,
        )
        for seed in ("1", "2")
    ]
    outputs = {tuple(process.communicate()[0].split()) for process in processes}
    assert [process.returncode for process in processes] == [0, 0]
    ((path, digest),) = outputs
    assert [str(file) for file in tmp_path.iterdir()] == [path]
    assert pathlib.Path(path).read_bytes() == pathlib.Path(quickstart.vocabulary_file()).read_bytes()
    reader = PRETRAIN.train_iterator()
    assert digest == hashlib.sha256(b"".join(next(reader).tokens.tobytes() for _ in range(10))).hexdigest()


def test_a_cache_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="DIFFUSION_T5X_CACHE"):
        quickstart._write_atomically(tmp_path / "file" / "model", b"")


def test_prefix_lm_cuts_documents_and_loses_no_token(vocabulary):
    lengths = {"inputs": 20, "targets": 24}
    task = seqio.TaskRegistry.get("quickstart_corpus_prefix_lm")
    ds = task.get_dataset(lengths, split="validation", shuffle=False, seed=0, num_epochs=1)
    examples = list(ds.as_numpy_iterator())
    wanted = [token for document in stdlib_corpus.documents("validation") for token in vocabulary.encode(document)]
    found = [token for x in examples for token in [*x["inputs"][:-1], *x["targets"][:-1]]]
    assert found == wanted
    assert all(x[name][-1] == vocabulary.eos_id for x in examples for name in lengths)
    assert all(len(x[name]) <= lengths[name] for x in examples for name in lengths)
    # In a chunk of 18 tokens, 1 to 17 are given, each number as likely: within five standard deviations.
    given = collections.Counter(len(x["inputs"]) - 1 for x in examples if len(x["inputs"]) + len(x["targets"]) == 20)
    assert set(given) == set(range(1, 18))
    expected = sum(given.values()) / 17
    assert all(abs(count - expected) < 5 * expected**0.5 for count in given.values())


def test_prefix_lm_says_when_lengths_are_too_short():
    with pytest.raises(UserError, match="at least 4 tokens"):
        dataclasses.replace(PRETRAIN, task_feature_lengths={"inputs": 3, "targets": 64}).train_iterator()


@pytest.mark.slow
def test_mixture_holds_its_rates():
    mixture = seqio.MixtureRegistry.get("quickstart_pretrain")
    ds = mixture.get_dataset(PRETRAIN.task_feature_lengths, shuffle=True, seed=0, try_in_mem_cache=False)
    pairs = {(pair.english, pair.french) for pair in cldr_pairs.pairs("train")}
    decode = mixture.output_features["targets"].vocabulary.decode
    drawn = 0
    for example in ds.take(4000).as_numpy_iterator():
        drawn += (decode(example["inputs"].tolist()), decode(example["targets"].tolist())) in pairs
    assert abs(drawn / 4000 - 0.2) < 0.02  # three standard errors


@pytest.mark.slow
@pytest.mark.parametrize(
    "architecture,mixture,lengths,least",
    [
        ("decoder_only", "quickstart_pretrain", {"inputs": 64, "targets": 64}, 0.8),
        pytest.param(
            "decoder_only",
            "quickstart_pretrain_span_corruption",
            {"inputs": 76, "targets": 20},
            0.8,
            marks=pytest.mark.slow,
        ),
        # A chunk is cut anywhere, and inputs and targets must both find room: half of either row is what is to be had.
        pytest.param(
            "encoder_decoder", "quickstart_pretrain", {"inputs": 64, "targets": 64}, 0.5, marks=pytest.mark.slow
        ),
        ("encoder_decoder", "quickstart_pretrain_span_corruption", {"inputs": 76, "targets": 20}, 0.8),
    ],
)
def test_rows_are_well_filled(architecture, mixture, lengths, least):
    data = dataclasses.replace(
        PRETRAIN, mixture_or_task_name=mixture, task_feature_lengths=lengths, architecture=architecture
    )
    reader = data.train_iterator()
    batches = [next(reader) for _ in range(10)]
    assert np.mean([batch.segment_ids > 0 for batch in batches]) > least
    if architecture == "encoder_decoder":
        assert np.mean([batch.encoder_segment_ids > 0 for batch in batches]) > least


EPOCHS = dataclasses.replace(PAIRS, split="validation", batch_size=100)


@pytest.fixture(scope="module")
def epochs():
    """The position before each of 29 batches, and their tokens."""
    assert 800 < EPOCHS.num_eval_examples() < 900  # an epoch is 8 batches and some rows
    reader = EPOCHS.train_iterator()
    return [(reader.state_dict(), next(reader).tokens) for _ in range(29)]


@pytest.mark.parametrize("batches", [0, 2, 3, 5, 7, 8, 9])
def test_a_position_near_an_epoch_s_end_resumes_into_the_same_epochs(epochs, batches):
    resumed = EPOCHS.train_iterator()
    resumed.load_state_dict(epochs[batches][0])
    for _, tokens in epochs[batches : batches + 20]:
        np.testing.assert_array_equal(next(resumed).tokens, tokens)


def test_each_epoch_of_the_pairs_is_whole_and_ordered_anew():
    source = seqio.TaskRegistry.get("quickstart_pairs").source
    size = len(cldr_pairs.pairs("validation"))
    ds = source.get_dataset(split="validation", shuffle=True, seed=5).repeat(2)
    read = [x["inputs"] for x in ds.as_numpy_iterator()]
    assert (
        sorted(read[:size]) == sorted(read[size:]) == sorted(p.english.encode() for p in cldr_pairs.pairs("validation"))
    )
    assert read[:size] != read[size:]


def test_evaluation_examples_are_the_test_pairs_in_order():
    dataset = SeqioDataset("quickstart_pairs", {"inputs": 32, "targets": 32}, split="test", batch_size=64)
    examples = [example for _, found in dataset.eval_batches(100) for example in found]
    assert examples == [
        {"example_id": i, "inputs_pretokenized": p.english, "targets_pretokenized": p.french, "kind": p.kind}
        for i, p in enumerate(cldr_pairs.pairs("test")[:100])
    ]
