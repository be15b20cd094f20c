"""Writing a cache: what lies in its files, that it is the same every time, and that nothing there is overwritten."""

import dataclasses
import itertools
import json

import grain
import numpy as np
import pytest

from diffusion_t5x.cache_tasks import cache_tasks
from diffusion_t5x.command_line import config
from diffusion_t5x.data import cache
from diffusion_t5x.data.cached_source import CachedDataset
from diffusion_t5x.data.seqio_source import SeqioDataset
from diffusion_t5x.errors import UserError

seqio = pytest.importorskip("seqio")
tf = pytest.importorskip("tensorflow")

SIZE = 13
LENGTHS = {"inputs": 8, "targets": 6}


def noisy(ds, output_features):
    """Inputs with random tokens in front; some targets too long."""

    @seqio.map_over_dataset(num_seeds=1)
    def add(x, seed):
        noise = tf.random.stateless_uniform([3], seed, 3, 250, tf.int32)
        return {"inputs": tf.concat([noise, x["targets"][:2]], 0), "targets": x["targets"]}

    return add(ds)


def texts(split, shuffle_files, seed=None):
    return tf.data.Dataset.from_tensor_slices({"targets": [f"{i:02d}" * (1 + i % 4) for i in range(SIZE)]})


seqio.TaskRegistry.add(
    "cacheable",
    source=seqio.FunctionDataSource(texts, splits=("train", "test")),
    preprocessors=[seqio.preprocessors.tokenize, noisy, seqio.preprocessors.append_eos_after_trim],
    output_features={name: seqio.Feature(seqio.ByteVocabulary()) for name in LENGTHS},
    shuffle_buffer_size=20,
)
seqio.MixtureRegistry.add("cacheable_mixture", [("cacheable", 3)])
ONLINE = SeqioDataset("cacheable", LENGTHS, seed=7, shuffle=False, canvas=False, batch_size=SIZE)


def write(folder, name="cacheable", lengths=LENGTHS, **arguments):
    cache_tasks(mixture_or_task_name=name, task_feature_lengths=lengths, cache_dir=str(folder), seed=7, **arguments)


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def times(folder):
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


def records(path):
    return [cache.from_record(record) for record in grain.sources.ArrayRecordDataSource(str(path))]


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cache")
    write(folder, num_shards=4)
    return folder


def test_each_file_is_what_a_host_of_as_many_reads(written):
    """Token for token, cut targets and the preprocessors' random choices included."""
    names = [f"examples.array_record-{i:05d}-of-00004" for i in range(4)]
    assert sorted(contents(written / "cacheable" / "train")) == [*names, "info.json"]
    for host, name in enumerate(names):
        found = records(written / "cacheable" / "train" / name)
        assert len(found) == (SIZE + 3 - host) // 4
        batch = next(dataclasses.replace(ONLINE, batch_size=4 * len(found)).train_iterator(4, host))
        for example, tokens, there, is_target in zip(
            found, batch.tokens, batch.segment_ids > 0, batch.target_mask, strict=True
        ):
            np.testing.assert_array_equal(example["inputs"], tokens[there & ~is_target])
            np.testing.assert_array_equal(example["targets"], tokens[is_target])
            assert example["targets"].dtype == np.uint16 and len(example["targets"]) <= LENGTHS["targets"]


def test_info_says_what_it_is(written):
    info = json.loads((written / "cacheable" / "test" / "info.json").read_text())
    assert info["name"] == "cacheable" and info["split"] == "test" and info["task_feature_lengths"] == LENGTHS
    assert info["seed"] == 7 and info["vocabulary"]["fingerprint"] == ONLINE.token_ids().fingerprint
    assert [shard["num_examples"] for shard in info["shards"]] == [4, 3, 3, 3]
    assert info["versions"]["seqio"]


def test_the_same_command_writes_the_same_bytes(written, tmp_path):
    write(tmp_path, num_shards=4)
    assert contents(tmp_path) == contents(written)


def test_beam_writes_the_same_bytes(written, tmp_path):
    pytest.importorskip("apache_beam")
    write(tmp_path, num_shards=4, beam_options=["--runner=DirectRunner"])
    assert contents(tmp_path) == contents(written)


def test_what_is_there_stays(written):
    before = times(written)
    write(written, num_shards=4)
    assert times(written) == before
    with pytest.raises(UserError, match=r"has a cache made with different settings: num_shards 4, not 2\. Nothing"):
        write(written, num_shards=2)
    with pytest.raises(UserError, match=r"task_feature_lengths \{'inputs': 8, 'targets': 6\}, not"):
        write(written, num_shards=4, lengths={"inputs": 8, "targets": 7})
    assert times(written) == before


def test_an_unfinished_cache_is_made_anew(written, tmp_path):
    write(tmp_path, num_shards=2)
    whole = contents(tmp_path)
    (tmp_path / "cacheable" / "train" / "info.json").unlink()
    (tmp_path / "cacheable" / "train" / "examples.array_record-00000-of-00009").write_bytes(b"left over")
    write(tmp_path, num_shards=2)
    assert contents(tmp_path) == whole


def test_several_epochs_have_choices_of_their_own_which_are_the_online_ones(tmp_path):
    write(tmp_path, splits=["train"], num_epochs=2)
    cached = CachedDataset("cacheable", LENGTHS, str(tmp_path), shuffle=False, canvas=False, batch_size=SIZE)
    epochs = list(itertools.islice(cached.train_iterator(), 2))
    for batch, online in zip(epochs, ONLINE.train_iterator(), strict=False):
        np.testing.assert_array_equal(batch.tokens, online.tokens)
    assert not np.array_equal(epochs[0].tokens, epochs[1].tokens)
    np.testing.assert_array_equal(epochs[0].tokens[epochs[0].target_mask], epochs[1].tokens[epochs[1].target_mask])


def test_a_mixture_is_its_tasks_and_their_rates(tmp_path):
    write(tmp_path, "cacheable_mixture", splits=["train"])
    assert json.loads((tmp_path / "cacheable_mixture" / "train" / "info.json").read_text())["rates"] == {"cacheable": 3}
    batch = next(CachedDataset("cacheable_mixture", LENGTHS, str(tmp_path), batch_size=SIZE).train_iterator())
    assert batch.segment_ids.any(1).all()
    before = times(tmp_path)
    write(tmp_path, "cacheable_mixture", splits=["train"])
    assert times(tmp_path) == before


def test_a_dry_run_writes_nothing(tmp_path, capsys):
    write(tmp_path / "none", dry_run=True)
    assert "Would write 2 of 2" in capsys.readouterr().out and not (tmp_path / "none").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"name": "cacheabel"}, "did you mean cacheable"),
        ({"splits": ["validation"]}, "has no split 'validation', only test, train"),
        ({"num_shards": 0}, r"cache_tasks.num_shards must be a positive integer: 0"),
        ({"lengths": {"targets": 6}}, "inputs and targets, but names targets"),
    ],
)
def test_mistakes_are_named_before_anything_is_written(tmp_path, change, message):
    with pytest.raises(UserError, match=message):
        write(tmp_path / "none", **change)
    assert not (tmp_path / "none").exists()


def test_the_command_line(written, tmp_path, capsys):
    macros = {"MIXTURE_OR_TASK_NAME": "cacheable", "TASK_FEATURE_LENGTHS": LENGTHS, "CACHE_DIR": str(tmp_path)}
    macros |= {"NUM_SHARDS": 4, "RANDOM_SEED": 7}
    flags = ["--gin_file=runs/cache_tasks.gin", *(f"--gin.{name}={value}" for name, value in macros.items())]
    config.run(cache_tasks, flags)
    assert "cacheable/test/examples.array_record-00003-of-00004: 3 examples" in capsys.readouterr().err
    assert contents(tmp_path) == contents(written)
