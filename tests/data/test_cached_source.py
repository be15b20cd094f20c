"""Reading a cache: the tokens are the online source's, nothing is read twice or left out, mistakes are named."""

import collections
import dataclasses
import itertools
import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest

from diffusion_t5x.cache_tasks import cache_tasks
from diffusion_t5x.data import cache
from diffusion_t5x.data.cached_source import CachedDataset
from diffusion_t5x.data.seqio_source import SeqioDataset
from diffusion_t5x.errors import UserError

seqio = pytest.importorskip("seqio")
tf = pytest.importorskip("tensorflow")

SIZE = 48
LENGTHS = {"inputs": 8, "targets": 10}
ARCHITECTURES = ["decoder_only", "encoder_decoder"]


def word(i):
    return f"{i:03d}" + "x" * (i % 5)


def register(name, first, vocabulary=None):
    vocabulary = vocabulary or seqio.ByteVocabulary()

    def dataset(split, shuffle_files, seed=None):
        texts = [word(i) for i in range(first, first + (SIZE if split == "train" else 11))]
        return tf.data.Dataset.from_tensor_slices({"inputs": texts, "targets": [t.upper() for t in texts]})

    seqio.TaskRegistry.add(
        name,
        source=seqio.FunctionDataSource(dataset, splits=("train", "validation")),
        preprocessors=[seqio.preprocessors.tokenize, seqio.preprocessors.append_eos_after_trim],
        output_features={n: seqio.Feature(vocabulary) for n in LENGTHS},
        shuffle_buffer_size=20,
    )


register("cached_words", 0)
register("cached_more_words", 100)
register("cached_other_vocabulary", 200, seqio.ByteVocabulary(extra_ids=5))
seqio.MixtureRegistry.add("cached_mixture", [("cached_words", 0.75), ("cached_more_words", 0.25)])
ONLINE = SeqioDataset("cached_words", LENGTHS, batch_size=8, shuffle=False)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    cache_dir = str(tmp_path_factory.mktemp("cache"))
    cache_tasks(mixture_or_task_name="cached_mixture", task_feature_lengths=LENGTHS, cache_dir=cache_dir)
    return cache_dir


@pytest.fixture(scope="module")
def words(folder):
    return CachedDataset("cached_words", LENGTHS, folder, batch_size=8)


def batches(iterator, number):
    return list(itertools.islice(iterator, number))


def assert_same(one, other):
    for name, x in vars(one).items():
        y = getattr(other, name)
        np.testing.assert_array_equal(x, y, err_msg=name)
        assert x is None or x.dtype == y.dtype, name


def documents(found):
    """Inputs and targets of each segment of each row, whatever the architecture."""
    texts = []
    for batch in found:
        for row in range(len(batch.tokens)):
            for segment in range(1, batch.segment_ids[row].max() + 1):
                here = batch.segment_ids[row] == segment
                targets = batch.tokens[row, here & batch.target_mask[row]]
                inputs = batch.tokens[row, here & ~batch.target_mask[row]]
                positions = batch.positions[row, here]
                if batch.encoder_tokens is not None:
                    there = batch.encoder_segment_ids[row] == segment
                    inputs, positions = batch.encoder_tokens[row, there], batch.encoder_positions[row, there]
                assert positions.tolist() == list(range(len(positions)))
                texts.append((tuple(inputs.tolist()), tuple(targets.tolist())))
    return texts


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("canvas", [False, True])
def test_unshuffled_batches_are_the_online_ones(words, architecture, canvas):
    layout = {"architecture": architecture, "canvas": canvas}
    cached = dataclasses.replace(words, shuffle=False, **layout).train_iterator()
    online = dataclasses.replace(ONLINE, **layout).train_iterator()
    for one, other in zip(batches(cached, 15), batches(online, 15), strict=True):  # more than two epochs
        assert_same(one, other)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_packed_rows_hold_the_online_examples_each_whole(words, architecture):
    layout = {"architecture": architecture, "canvas": False, "pack": True}
    dataset = dataclasses.replace(words, shuffle=False, batch_size=64, **layout)  # as many rows as are open at a time
    plain = dataclasses.replace(ONLINE, architecture=architecture, canvas=False, batch_size=SIZE)
    stream = itertools.cycle(documents([next(plain.train_iterator())]))
    for batch in batches(dataset.train_iterator(), 3):
        found = documents([batch])
        assert batch.segment_ids.max() > 1
        assert collections.Counter(found) == collections.Counter(itertools.islice(stream, len(found)))
        np.testing.assert_array_equal(batch.tokens[batch.segment_ids == 0], 0)
    online = documents(batches(dataclasses.replace(ONLINE, batch_size=16, **layout).train_iterator(), 4))
    assert set(online) == set(found)


@pytest.mark.parametrize("pack", [False, True])
@pytest.mark.parametrize("hosts", [1, 4])
def test_a_killed_run_goes_on_and_repeats_and_skips_nothing(words, hosts, pack):
    dataset = dataclasses.replace(words, pack=pack, canvas=not pack)
    read = []
    for host in range(hosts):
        undisturbed = batches(dataset.train_iterator(hosts, host), 14)
        position, killed_after = dataset.train_iterator(hosts, host).state_dict(), 0
        for until in (4, 9, 14):  # killed in the middle of the first epoch, and of the second
            iterator = dataset.train_iterator(hosts, host)
            next(iterator)
            iterator.load_state_dict(position)
            for one, other in zip(undisturbed[killed_after:until], iterator, strict=False):
                assert_same(one, other)
            killed_after, position = until, iterator.state_dict()
            next(iterator)
        read.append(undisturbed)
    assert np.concatenate([part[0].example_ids for part in read]).tolist() == list(range(8))
    if pack:
        return
    # Six global batches are an epoch of 48 examples: each is read once, in another order each time.
    epochs = [documents(part[i] for i in range(first, first + 6) for part in read) for first in (0, 6)]
    assert len(set(epochs[0])) == SIZE and sorted(epochs[0]) == sorted(epochs[1]) and epochs[0] != epochs[1]


@pytest.mark.parametrize("pack", [False, True])
def test_a_resumption_reads_nothing_that_lies_before_it(words, pack, monkeypatch):
    dataset = dataclasses.replace(words, pack=pack, canvas=not pack)
    iterator = dataset.train_iterator()
    batches(iterator, 100)
    position = iterator.state_dict()
    assert len(position["position"]) < 200
    read = []
    decode = cache.from_record
    monkeypatch.setattr(cache, "from_record", lambda record: read.append(1) or decode(record))
    resumed = dataset.train_iterator()
    resumed.load_state_dict(position)
    wanted = next(iterator)
    read.clear()
    assert_same(next(resumed), wanted)
    assert len(read) <= 400  # of more than 800: what is read ahead, and for packing the open rows


def test_the_order_of_a_seed_is_its_own(words):
    orders = [
        documents([next(dataclasses.replace(words, seed=seed, batch_size=SIZE).train_iterator())]) for seed in (0, 0, 1)
    ]
    second_epoch = documents(batches(dataclasses.replace(words, batch_size=SIZE).train_iterator(), 2)[1:])
    assert orders[0] == orders[1] != orders[2] and second_epoch != orders[2]


def test_four_hosts_read_the_batches_of_one(words):
    whole = batches(words.train_iterator(), 12)
    parts = [batches(words.train_iterator(4, host), 12) for host in range(4)]
    for batch, *shards in zip(whole, *parts, strict=True):
        assert sorted(documents([batch])) == sorted(documents(shards))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("number", [None, 5])
def test_evaluation_batches_are_the_online_ones(words, architecture, number):
    change = {"architecture": architecture, "split": "validation"}
    cached = list(dataclasses.replace(words, **change).eval_batches(number))
    online = list(dataclasses.replace(ONLINE, **change).eval_batches(number))
    assert len(cached) == len(online) == (2 if number is None else 1)
    for (one, examples), (other, described) in zip(cached, online, strict=True):
        assert_same(one, other)
        assert [x["example_id"] for x in examples] == [x["example_id"] for x in described]


def test_a_mixture_takes_turns_at_its_rates(words):
    mixture = dataclasses.replace(words, mixture_or_task_name="cached_mixture", batch_size=64)
    found = documents(batches(mixture.train_iterator(), 3))
    both = {
        name: set(
            documents([next(dataclasses.replace(ONLINE, mixture_or_task_name=name, batch_size=SIZE).train_iterator())])
        )
        for name in ("cached_words", "cached_more_words")
    }
    assert collections.Counter(document in both["cached_words"] for document in found) == {True: 144, False: 48}
    assert set(found) == both["cached_words"] | both["cached_more_words"]
    with pytest.raises(UserError, match="8 does not divide into 3 shards"):
        words.train_iterator(num_shards=3)


def test_what_it_says_of_the_vocabulary_is_what_the_task_says(words):
    assert words.token_ids() == ONLINE.token_ids()
    assert words.row_length == ONLINE.row_length


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"mixture_or_task_name": "cached_wrods"},
            "has no cache of cached_wrods/train, only .*cached_words/train.*cache_tasks",
        ),
        ({"split": "test"}, "has no cache of cached_words/test"),
        ({"cache_dir": "/nowhere"}, "/nowhere has no cache of cached_words/train: make it with"),
        ({"task_feature_lengths": {"inputs": 8, "targets": 11}}, "'targets': 10}, not .*'targets': 11}: set those, or"),
        ({"batch_size": 0}, "batch size must be a positive integer: 0"),
        ({"pack": True}, "exclude each other"),
    ],
)
def test_mistakes_are_named(words, change, message):
    with pytest.raises(UserError, match=message):
        dataclasses.replace(words, **change).check()


@pytest.fixture
def copy(words, tmp_path):
    """A cache of its own, and the folder of its training split."""
    shutil.copytree(words.cache_dir, tmp_path / "cache")
    return dataclasses.replace(words, cache_dir=str(tmp_path / "cache")), tmp_path / "cache" / "cached_words" / "train"


def test_an_unfinished_cache_is_refused(copy):
    dataset, folder = copy
    (folder / "info.json").unlink()
    with pytest.raises(UserError, match=r"cached_words/train was not finished: run cache_tasks again"):
        dataset.check()


def test_a_damaged_cache_is_refused(copy):
    dataset, folder = copy
    shard = next(folder.glob("examples*"))
    contents = shard.read_bytes()
    shard.write_bytes(contents[: len(contents) // 2])
    with pytest.raises(UserError, match="cached_words/train is damaged"):
        dataset.check()
    shard.unlink()
    with pytest.raises(UserError, match=f"lacks {shard.name}"):
        dataset.check()
    (folder / "info.json").write_text("{}")
    with pytest.raises(UserError, match=r"info.json is damaged"):
        dataset.check()
    (folder / "info.json").write_text('{"format": 0}')
    with pytest.raises(UserError, match=r"is of format 0, but this version reads 1"):
        dataset.check()


def test_a_record_that_breaks_later_ends_in_words(copy):
    dataset, folder = copy
    iterator = dataset.train_iterator()
    next(iterator)
    shard = next(folder.glob("examples*"))
    contents = bytearray(shard.read_bytes())
    contents[200:220] = bytes(255 - byte for byte in contents[200:220])  # in the first record, far from the index
    shard.write_bytes(contents)
    with pytest.raises(UserError, match=r"can no longer be read: .*[Cc]orrupted"):
        batches(dataset.train_iterator(), 100)


def test_shards_of_another_number_of_examples_are_refused(copy):
    dataset, folder = copy
    info = json.loads((folder / "info.json").read_text())
    info["shards"][0]["num_examples"] += 1
    (folder / "info.json").write_text(json.dumps(info))
    with pytest.raises(UserError, match=f"holds {SIZE} examples, but says {SIZE + 1}"):
        dataset.check()


def test_tasks_of_another_vocabulary_are_refused(copy):
    dataset, folder = copy
    name = "cached_other_vocabulary"
    cache_tasks(mixture_or_task_name=name, task_feature_lengths=LENGTHS, cache_dir=dataset.cache_dir, splits=["train"])
    other = dataclasses.replace(dataset, mixture_or_task_name=name)
    with pytest.raises(UserError, match="trained with another vocabulary"):  # what a run does with its checkpoint
        other.token_ids().check_same(dataset.token_ids().describe(), "/a/checkpoint")
    info = folder.parents[1] / "cached_mixture" / "train" / "info.json"
    info.write_text(info.read_text().replace("cached_more_words", name))
    with pytest.raises(UserError, match=r"cached_other_vocabulary and cached_words .* different vocabularies"):
        dataclasses.replace(dataset, mixture_or_task_name="cached_mixture").check()


def test_a_position_in_other_data_is_refused_and_a_moved_cache_is_not_other_data(copy, words):
    dataset, folder = copy
    position = words.train_iterator().state_dict()
    dataset.train_iterator().load_state_dict(position)
    with pytest.raises(UserError, match=r"batch_size=8.*batch_size=4"):
        dataclasses.replace(dataset, batch_size=4).train_iterator().load_state_dict(position)
    info = folder / "info.json"
    sha256 = json.loads(info.read_text())["shards"][0]["sha256"]
    info.write_text(info.read_text().replace(sha256, "0" * 64))
    with pytest.raises(UserError, match="position in the data"):
        dataset.train_iterator().load_state_dict(position)


PROGRAM = """
import sys

# None stands for what cannot be found.
sys.modules |= dict.fromkeys(("tensorflow", "tensorflow_datasets", "tensorflow_text", "seqio", "t5"))
from diffusion_t5x.command_line import config
from diffusion_t5x import generate, train
model_dir, *flags = sys.argv[1:]
for steps in (2, 3):
    config.run(train.train, [*flags, f"--gin.MODEL_DIR={model_dir}", f"--gin.TRAIN_STEPS={steps}"])
generate.main(["--checkpoint", model_dir, "--prompt", "001"])
"""


@pytest.mark.slow
def test_a_machine_without_tensorflow_trains_evaluates_resumes_and_generates(folder, tmp_path):
    files = [
        *("models/decoder_only.gin", "sizes/tiny.gin", "objectives/masked.gin"),
        *("runs/pretrain.gin", "data/cached_pretrain.gin"),
    ]
    macros = {
        "CACHE_DIR": folder,
        "MIXTURE_OR_TASK_NAME": "cached_mixture",
        "TASK_FEATURE_LENGTHS": LENGTHS,
        "BATCH_SIZE": 4,
        "EVAL_PERIOD": 2,
    }
    arguments = [f"--gin_file={file}" for file in files] + [f"--gin.{name}={value}" for name, value in macros.items()]
    command = [sys.executable, "-c", PROGRAM, str(tmp_path), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=os.environ)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "tokens in" in done.stderr
    assert "resuming from" in done.stderr and "at step 2 of 3" in done.stderr
    assert (tmp_path / "checkpoints" / "checkpoint_3").is_dir()
    losses = (tmp_path / "training_eval" / "cached_mixture" / "metrics.jsonl").read_text().splitlines()
    assert len(losses) == 2
