"""Reading tasks and mixtures: order, shards, positions that can be resumed, evaluation sets, and mistakes."""

import dataclasses
import importlib
import logging
import subprocess
import sys

import numpy as np
import pytest
from variants import quick

from diffusion_t5x.data.seqio_source import FEATURES, SeqioDataset
from diffusion_t5x.errors import UserError

seqio = pytest.importorskip("seqio")
tf = pytest.importorskip("tensorflow")

SIZE = 50
FIELDS = ("tokens", "target_mask", "segment_ids", "positions", "example_ids")


def word(i):
    return f"{i:02d}" + "x" * (i % 5)


def register(name, first, with_inputs=True, vocabulary=None):
    vocabulary = vocabulary or seqio.ByteVocabulary()

    def dataset(split, shuffle_files, seed=None):
        texts = [word(i) for i in range(first, first + SIZE)]
        ds = tf.data.Dataset.from_tensor_slices({"inputs": texts, "targets": [t.upper() for t in texts]})
        return ds.map(lambda x: x | {"note": tf.strings.length(x["inputs"])})

    names = ("inputs", "targets") if with_inputs else ("targets",)
    seqio.TaskRegistry.add(
        name,
        source=seqio.FunctionDataSource(dataset, splits=("train", "validation")),
        preprocessors=[seqio.preprocessors.tokenize, seqio.preprocessors.append_eos_after_trim],
        output_features={n: seqio.Feature(vocabulary) for n in names},
        postprocess_fn=lambda text, example=None, is_target=False: text.lower(),
        metric_fns=[lambda targets, predictions: {"hits": sum(map(str.__eq__, targets, predictions))}],
        shuffle_buffer_size=20,
    )


register("test_words", 0)
register("test_more_words", 50)
register("test_plain_text", 0, with_inputs=False)
seqio.MixtureRegistry.add("test_mixture", [("test_words", 0.7), ("test_more_words", 0.3)])
WORDS = SeqioDataset("test_words", {"inputs": 8, "targets": 10}, batch_size=8)
PACKED = dataclasses.replace(WORDS, mixture_or_task_name="test_mixture", pack=True, canvas=False)


@pytest.fixture(scope="module")
def word_files(tmp_path_factory):
    """A task whose source shuffles files."""
    folder = tmp_path_factory.mktemp("files")
    for file in range(5):
        lines = [word(i) for i in range(file * 10, file * 10 + 10)]
        (folder / f"{file}.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    seqio.TaskRegistry.add(
        "test_files",
        source=seqio.TextLineDataSource({"train": f"{folder}/*.txt"}),
        preprocessors=[
            lambda ds: ds.map(lambda line: {"inputs": line, "targets": line}),
            seqio.preprocessors.tokenize,
            seqio.preprocessors.append_eos_after_trim,
        ],
        output_features=dict.fromkeys(("inputs", "targets"), seqio.Feature(seqio.ByteVocabulary())),
        shuffle_buffer_size=7,
    )
    return dataclasses.replace(WORDS, mixture_or_task_name="test_files")


def same(one, other):
    return all(np.array_equal(getattr(one, field), getattr(other, field)) for field in FIELDS)


def texts(batch, vocabulary):
    """The targets of each row's first segment."""
    rows = zip(batch.tokens, batch.target_mask & (batch.segment_ids == 1), strict=True)
    return [vocabulary.decode(tokens[mask].tolist()) for tokens, mask in rows]


@pytest.mark.parametrize("kind", ["task with canvas", "packed mixture", "files"])
@pytest.mark.parametrize("batches", quick([3, 13], [3]))
def test_resumed_reading_goes_on_with_the_same_batches(kind, batches, word_files):
    dataset = {"task with canvas": WORDS, "packed mixture": PACKED, "files": word_files}[kind]
    reader = dataset.train_iterator()
    before = [next(reader) for _ in range(batches)]
    position = reader.state_dict()
    after = [next(reader) for _ in range(20)]  # several epochs
    assert all(isinstance(x, np.ndarray) and x.dtype == np.uint8 for x in position.values())

    resumed = dataset.train_iterator()
    next(resumed)
    resumed.load_state_dict(position)
    assert all(same(one, next(resumed)) for one in after)
    undisturbed = dataset.train_iterator()
    assert all(same(one, next(undisturbed)) for one in before + after)


def test_a_file_that_vanishes_later_ends_in_words(tmp_path):
    file = tmp_path / "texts.txt"
    file.write_text("".join(f"{word(i)}\n" for i in range(SIZE)), encoding="utf-8")
    seqio.TaskRegistry.add(
        "test_vanishing",
        source=seqio.TextLineDataSource({"train": str(file)}),
        preprocessors=[lambda ds: ds.map(lambda text: {"targets": text}), seqio.preprocessors.tokenize],
        output_features={"targets": seqio.Feature(seqio.ByteVocabulary(), add_eos=False)},
        shuffle_buffer_size=4,
    )
    reader = SeqioDataset("test_vanishing", {"targets": 10}, batch_size=8).train_iterator()
    next(reader)
    file.unlink()
    with pytest.raises(UserError, match=f"can no longer be read: {file}; No such file") as caught:
        for _ in range(500):  # it is opened again for a next epoch; some of them may have been read ahead
            next(reader)
    assert "{{" not in str(caught.value) and "[Op" not in str(caught.value)


def test_another_run_s_position_is_refused():
    position = WORDS.train_iterator().state_dict()
    with pytest.raises(UserError, match=r"batch_size=8.*batch_size=4"):
        dataclasses.replace(WORDS, batch_size=4).train_iterator().load_state_dict(position)


def test_every_epoch_is_whole_and_in_an_order_of_its_own():
    plain = dataclasses.replace(WORDS, shuffle=False, batch_size=SIZE)
    reader = plain.train_iterator()
    vocabulary = plain.vocabulary()
    for _ in range(2):
        assert texts(next(reader), vocabulary) == [word(i).upper() for i in range(SIZE)]
    orders = [
        texts(next(dataclasses.replace(plain, shuffle=True, seed=seed).train_iterator()), vocabulary)
        for seed in (0, 0, 1)
    ]
    assert orders[0] == orders[1] != orders[2]


def test_shards_read_disjoint_examples_and_number_their_rows_apart():
    whole = dataclasses.replace(WORDS, shuffle=False, batch_size=SIZE)
    shards = [next(whole.train_iterator(2, index)) for index in range(2)]
    vocabulary = whole.vocabulary()
    read = [texts(shard, vocabulary) for shard in shards]
    assert sorted(read[0] + read[1]) == sorted(texts(next(whole.train_iterator()), vocabulary))
    assert np.concatenate([shard.example_ids for shard in shards]).tolist() == list(range(SIZE))
    with pytest.raises(UserError, match="8 does not divide into 3 shards"):
        WORDS.train_iterator(num_shards=3)


def test_evaluation_reads_each_example_once_with_its_text():
    dataset = dataclasses.replace(WORDS, split="validation", batch_size=16)
    batches = list(dataset.eval_batches())
    assert len(batches) == 4
    ids = np.concatenate([batch.example_ids for batch, _ in batches])
    assert ids.tolist() == list(range(64))
    examples = [example for _, found in batches for example in found]
    assert examples == [
        {
            "example_id": i,
            "inputs_pretokenized": word(i),
            "targets_pretokenized": word(i).upper(),
            "note": len(word(i)),
        }
        for i in range(SIZE)
    ]
    rows = [(row, mask) for batch, _ in batches for row, mask in zip(batch.tokens, batch.target_mask, strict=True)]
    there = np.concatenate([batch.segment_ids.any(1) for batch, _ in batches])
    assert there.tolist() == [True] * SIZE + [False] * 14
    for i, (tokens, mask) in enumerate(rows):
        assert mask.sum() == (10 if i < SIZE else 0)
        if i < SIZE:
            assert dataset.to_text(tokens[mask].tolist()) == word(i).upper()
            assert "".join(dataset.cells(tokens[mask].tolist())) == word(i).upper() + "¶" + "·" * (9 - len(word(i)))


def test_evaluation_of_the_first_examples_is_a_part_of_the_whole():
    whole = next(dataclasses.replace(WORDS, batch_size=16).eval_batches())
    first = next(dataclasses.replace(WORDS, batch_size=16).eval_batches(5))
    assert first[1] == whole[1][:5]
    np.testing.assert_array_equal(first[0].tokens[:5], whole[0].tokens[:5])
    assert [WORDS.num_eval_examples(n) for n in (None, 5, 70)] == [50, 5, 50]


def test_evaluation_never_packs_and_mixes_mixtures():
    batch, examples = next(PACKED.eval_batches())
    assert batch.segment_ids.max() == 1
    assert [e["targets_pretokenized"] for e in examples] == texts(batch, PACKED.vocabulary())


def test_scores_are_the_task_s_metrics_of_postprocessed_text():
    records = [{"targets_pretokenized": "AB", "prediction": p} for p in ("ab", "AB", "b")]
    assert WORDS.score(records) == {"hits": 2}
    with pytest.raises(UserError, match="evaluate its tasks one by one"):
        PACKED.score(records)


def test_a_task_without_inputs_is_all_targets():
    dataset = SeqioDataset("test_plain_text", {"targets": 10}, batch_size=8, canvas=False)
    batch = next(dataset.train_iterator())
    np.testing.assert_array_equal(batch.target_mask, batch.segment_ids > 0)
    assert batch.tokens.shape == (8, 10)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mixture_or_task_name": "test_wrods"}, "did you mean test_words.*must be imported"),
        ({"split": "tset"}, "'test_words' has no split 'tset', only train, validation"),
        ({"task_feature_lengths": {"targets": 10}}, "inputs and targets, but names targets"),
        ({"mixture_or_task_name": "test_plain_text"}, "of 'test_plain_text', targets, but names inputs and targets"),
        ({"task_feature_lengths": {"inputs": 0, "targets": 10}}, "inputs length must be a positive integer: 0"),
        ({"batch_size": 0}, "batch size must be a positive integer: 0"),
        ({"pack": True}, "exclude each other"),
    ],
)
def test_mistakes_are_named_before_anything_is_read(change, message):
    with pytest.raises(UserError, match=message):
        dataclasses.replace(WORDS, **change).check()


def test_inputs_and_targets_share_a_vocabulary():
    register("test_two_vocabularies", 0)
    task = seqio.TaskRegistry.get("test_two_vocabularies")
    task.output_features["inputs"] = seqio.Feature(seqio.ByteVocabulary(extra_ids=5))
    with pytest.raises(UserError, match="share one vocabulary"):
        dataclasses.replace(WORDS, mixture_or_task_name="test_two_vocabularies").check()


def test_importing_it_imports_no_tensorflow():
    code = "import sys, diffusion_t5x.data.seqio_source; assert not {'tensorflow', 'seqio'} & sys.modules.keys()"
    subprocess.run([sys.executable, "-c", code], check=True)


def _py_function(ds):
    plus = lambda targets: targets + 1  # noqa: E731
    return ds.map(lambda x: x | {"targets": tf.ensure_shape(tf.py_function(plus, [x["targets"]], tf.int32), [None])})


def _numpy_function(ds):
    plus = lambda targets: targets + 1  # noqa: E731
    return ds.map(lambda x: x | {"targets": tf.ensure_shape(tf.numpy_function(plus, [x["targets"]], tf.int32), [None])})


def _filter(ds):
    return ds.filter(lambda x: tf.py_function(lambda targets: len(targets) > 0, [x["targets"]], tf.bool))


def _unseeded(ds):
    return ds.filter(lambda x: tf.random.uniform(()) < 2)


def _generated(split, shuffle_files, seed=None):
    def examples():
        for i in range(SIZE):
            yield {"inputs": word(i), "targets": word(i).upper()}

    signature = dict.fromkeys(("inputs", "targets"), tf.TensorSpec((), tf.string))
    return tf.data.Dataset.from_generator(examples, output_signature=signature)


def _listed(split, shuffle_files, seed=None):
    texts = [word(i) for i in range(SIZE)]
    return tf.data.Dataset.from_tensor_slices({"inputs": texts, "targets": texts})


@pytest.mark.parametrize(
    "source,steps",
    [*((_listed, [step]) for step in (_py_function, _numpy_function, _filter, _unseeded)), (_generated, [])],
    ids=["py_function", "numpy_function", "filter", "unseeded", "from_generator"],
)
def test_data_whose_position_cannot_be_saved_are_read_and_the_log_says_so_at_once(
    source, steps, request, caplog, monkeypatch
):
    name = f"test_stateful_{request.node.callspec.id}"
    seqio.TaskRegistry.add(
        name,
        source=seqio.FunctionDataSource(source, splits=("train",)),
        preprocessors=[seqio.preprocessors.tokenize, *steps, seqio.preprocessors.append_eos_after_trim],
        output_features={n: seqio.Feature(seqio.ByteVocabulary()) for n in FEATURES},
    )
    importlib.import_module("diffusion_t5x.data.train_iterator")._say_unsaved.cache_clear()
    monkeypatch.setattr(logging.getLogger("diffusion_t5x"), "propagate", True)
    iterator = dataclasses.replace(WORDS, mixture_or_task_name=name).train_iterator()
    with caplog.at_level(logging.INFO, "diffusion_t5x"):
        next(iterator)  # before the first step
    assert caplog.text.count("position in the training data cannot be saved") == 1
    assert "is stateful): examples may repeat after a resume" in caplog.text
    for _ in range(9):
        next(iterator)
        assert iterator.state_dict() == {}


def test_more_shards_than_examples_are_one_message():
    seqio.TaskRegistry.add(
        "test_three",
        source=seqio.FunctionDataSource(
            lambda split, shuffle_files, seed=None: _listed(split, shuffle_files).take(3), splits=("train",)
        ),
        preprocessors=[seqio.preprocessors.tokenize, seqio.preprocessors.append_eos_after_trim],
        output_features={n: seqio.Feature(seqio.ByteVocabulary()) for n in FEATURES},
    )
    three = dataclasses.replace(WORDS, mixture_or_task_name="test_three")
    for shard in range(3):
        next(three.train_iterator(4, shard))
    with pytest.raises(UserError, match=r"nothing to train on.*shard 3 of 4 has no examples.*more processes"):
        next(three.train_iterator(4, 3))


@pytest.mark.slow
def test_reading_imports_none_of_what_keras_would_like():
    program = "from diffusion_t5x.data.libraries import libraries; libraries(); import sys; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=300, check=True)
    assert not {"matplotlib", "pandas", "sklearn"} & set(done.stdout.split())
