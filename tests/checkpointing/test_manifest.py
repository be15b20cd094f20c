"""Checkpoints whose files were cut, changed or lost are found and named, and no run stands on them."""

import json
import logging
import os
import resource
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath

from diffusion_t5x.checkpointing import checkpoints, manifest, restoring, stored
from diffusion_t5x.errors import UserError

STATE = {"step": np.int32(0), "params": {"x": np.arange(6, dtype=np.float32), "y": np.ones((2, 3), np.float32)}}
ABSTRACT = jax.tree.map(lambda x: jax.ShapeDtypeStruct(np.shape(x), np.asarray(x).dtype), STATE)


def save(folder, *steps, **settings):
    store = checkpoints.Checkpoints(folder, **({"keep_last": 9} | settings))
    for step in steps:
        store.save(step, {**STATE, "step": jnp.int32(step)}, {"position": np.array(step)}, {"step": step})
    store.close()


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    save(folder, 3, 5, 7)
    return folder


@pytest.fixture
def run(original, tmp_path):
    return shutil.copytree(original, tmp_path / "run")


def cut(path):
    os.truncate(path, path.stat().st_size // 2)


def change(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def lose(path):
    path.unlink()


def faults(checkpoint, **settings):
    return manifest.faults(epath.Path(checkpoint), **settings)


def every_file(checkpoint):
    return [
        name
        for name in manifest.files(epath.Path(checkpoint))
        if name not in ("_CHECKPOINT_METADATA", "commit_success.txt")
    ]


def test_the_manifest_lists_every_file_as_sha256sum_does(original):
    folder = original / "checkpoint_7"
    entries = json.loads((folder / manifest.FILE).read_text())["files"]
    assert {*entries, manifest.FILE} == {*every_file(folder)} and len(entries) > 10
    sums = subprocess.run(["sha256sum", *entries], cwd=folder, capture_output=True, text=True, check=True).stdout
    assert [line.split()[0] for line in sums.splitlines()] == [entry["sha256"] for entry in entries.values()]
    assert all((folder / name).stat().st_size == entry["size"] for name, entry in entries.items())


@pytest.mark.parametrize("damage", [cut, change, lose])
def test_damage_to_any_file_is_found_and_named(run, damage):
    folder = run / "checkpoint_7"
    for name in every_file(folder):
        content = (folder / name).read_bytes()
        if not content:
            continue
        damage(folder / name)
        found = faults(folder)
        assert found
        if name != "manifest.json":  # what is changed in there may be another file's checksum
            assert all(fault.startswith(name) for fault in found)
        if damage is not change:  # sizes alone tell of it
            assert faults(folder, checksums=False) == found
        (folder / name).write_bytes(content)
    assert faults(folder) == []


def test_restoring_a_broken_checkpoint_names_the_file_and_the_newest_whole_one(run):
    change(run / "checkpoint_5" / "state" / "manifest.ocdbt")
    cut(run / "checkpoint_7" / "state" / "manifest.ocdbt")
    cut(run / "checkpoint_7" / "metadata" / "metadata")
    named = (
        r"checkpoint_7 is broken: .*state/manifest.ocdbt has \d+ bytes, not \d+.*newest intact one is .*checkpoint_3:"
    )
    for restore in (restoring.restore, restoring.restore_initial):
        with pytest.raises(stored.BrokenCheckpoint, match=named):
            restore(run, ABSTRACT)
    with pytest.raises(stored.BrokenCheckpoint, match=named):
        restoring.restore_params(run, ABSTRACT["params"])
    with pytest.raises(stored.BrokenCheckpoint, match=r"checkpoint_7 is broken: metadata/metadata has \d+ bytes"):
        checkpoints.read_metadata(run)
    for step in (3, 5):  # what is asked for by its path is judged by itself
        broken = step == 5
        if broken:
            with pytest.raises(stored.BrokenCheckpoint, match="SHA-256 differs"):
                restoring.restore(run / f"checkpoint_{step}", ABSTRACT)
        else:
            assert int(restoring.restore(run / f"checkpoint_{step}", ABSTRACT)[0]["step"]) == step


def test_without_a_whole_one_nothing_is_promised(run):
    for step in (3, 5, 7):
        lose(run / f"checkpoint_{step}" / "state" / "_METADATA")
    with pytest.raises(UserError, match=r"_METADATA is missing or cannot be read. There is no intact one"):
        restoring.restore(run, ABSTRACT)
    with pytest.raises(UserError, match=r"Every checkpoint in .* is broken: checkpoint_3, checkpoint_5, checkpoint_7"):
        stored.latest_whole(run)


def test_a_manifest_that_is_lost_or_cut_is_a_fault(run):
    cut(run / "checkpoint_7" / manifest.FILE)
    lose(run / "checkpoint_5" / manifest.FILE)
    assert faults(run / "checkpoint_7") == ["manifest.json cannot be read"]
    assert faults(run / "checkpoint_5") == ["manifest.json is missing"]
    assert stored.latest_whole(run) == str(run / "checkpoint_3")


def test_a_manifest_names_files_of_the_checkpoint(run):
    path = run / "checkpoint_7" / manifest.FILE
    said = json.loads(path.read_text())
    said["files"]["state/../../checkpoint_5/manifest.json"] = said["files"].popitem()[1]
    path.write_text(json.dumps(said))
    assert faults(run / "checkpoint_7") == ["manifest.json names files outside of the checkpoint"]


def make_old(checkpoint):
    """As it was before there were manifests."""
    lose(checkpoint / manifest.FILE)
    notes = json.loads((checkpoint / manifest.NOTES).read_text())
    (checkpoint / manifest.NOTES).write_text(json.dumps(notes | {"custom_metadata": {}}))


def test_checkpoints_of_before_there_were_manifests_load_and_the_log_says_so_once(run, caplog):
    make_old(run / "checkpoint_7")
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            assert int(restoring.restore(run, ABSTRACT)[0]["step"]) == 7
    assert [record.message.count("without checksums") for record in caplog.records] == [1]
    assert stored.latest_whole(run) == str(run / "checkpoint_7")
    cut(run / "checkpoint_7" / "state" / "_METADATA")  # as much as can be known of it
    assert stored.latest_whole(run) == str(run / "checkpoint_5")


def test_a_run_from_an_older_checkpoint_sets_the_broken_ones_aside_and_writes_their_steps_again(run):
    for step in (5, 7):
        cut(run / f"checkpoint_{step}" / "state" / "manifest.ocdbt")
    (run / "broken_checkpoint_5").mkdir()
    whole = stored.latest_whole(run)
    stored.set_aside_after(whole)
    assert checkpoints.steps(run) == [3]
    aside = {"broken_checkpoint_5", "broken_checkpoint_5_2", "broken_checkpoint_7"}
    assert {path.name for path in run.iterdir()} == aside | {"checkpoint_3"}
    save(run, 4, keep_last=1)
    # Had the broken ones stayed, the newest by number would be one of them, and this one would be gone.
    assert checkpoints.steps(run) == [4] and not faults(run / "checkpoint_4")
    save(run, 5, keep_last=1)
    assert checkpoints.steps(run) == [5] and {path.name for path in run.iterdir()} >= aside


_NO_SPACE = """
import sys, resource, numpy as np
from diffusion_t5x.checkpointing.checkpoints import Checkpoints
store = Checkpoints(sys.argv[1], keep_last=1, asynchronous=sys.argv[2] == "True")
resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, resource.RLIM_INFINITY))
store.save(9, {"x": np.random.default_rng(0).random(1 << 20)}, {}, {})
store.wait()
"""


def test_a_save_that_fails_is_an_error_and_leaves_the_only_whole_checkpoint(tmp_path):
    save(tmp_path, 3)
    done = subprocess.run([sys.executable, "-c", _NO_SPACE, str(tmp_path), "True"], capture_output=True, text=True)
    assert done.returncode == 1 and "File too large" in done.stderr, done.stderr[-2000:]
    assert checkpoints.steps(tmp_path) == [3] and faults(tmp_path / "checkpoint_3") == []
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] == resource.RLIM_INFINITY


def test_synchronous_saves_have_a_manifest_too(tmp_path):
    save(tmp_path, 1, asynchronous=False)
    assert faults(tmp_path / "checkpoint_1") == []


def test_a_renamed_checkpoint_is_noticed_wherever_it_is_read(run):
    (run / "checkpoint_5").rename(run / "checkpoint_10")
    named = "checkpoint_10 is broken: it is of step 5 and was renamed: call it checkpoint_5 again"
    for read in (checkpoints.read_metadata, lambda path: restoring.restore(path, ABSTRACT)):
        with pytest.raises(stored.BrokenCheckpoint, match=named):
            read(run)
    assert stored.latest_whole(run) == str(run / "checkpoint_7")
    make_old(run / "checkpoint_10")
    assert not stored.is_whole(epath.Path(run / "checkpoint_10"))


@pytest.mark.parametrize("lost", ["metadata/metadata", "state/_METADATA", "metadata", "state", ""])
def test_a_part_of_a_checkpoint_is_none_that_is_older_than_manifests(run, lost):
    make_old(run / "checkpoint_7")
    path = run / "checkpoint_7" / lost
    path.unlink() if path.is_file() else shutil.rmtree(path)
    path.parent.mkdir(exist_ok=True)
    (run / "checkpoint_7").mkdir(exist_ok=True)
    with pytest.raises(stored.BrokenCheckpoint, match=r"checkpoint_7 is broken: it has no (state|metadata)/"):
        restoring.restore(run, ABSTRACT)
    assert stored.latest_whole(run) == str(run / "checkpoint_5")


@pytest.mark.slow
def test_a_flipped_bit_of_the_manifest_is_always_found(run):
    path = run / "checkpoint_7" / manifest.FILE
    content = path.read_bytes()
    for place in range(len(content)):
        for bit in (0, place % 7 + 1):
            path.write_bytes(content[:place] + bytes([content[place] ^ 1 << bit]) + content[place + 1 :])
            (found,) = faults(run / "checkpoint_7", checksums=False)
            assert found.startswith("manifest.json "), (place, bit, found)


@pytest.mark.parametrize(
    "content",
    [
        b"[]",
        b"{}",
        b"\xff",
        b'{"files": []}',
        b'{"files": {"a": 1}}',
        b'{"files": {"a": {"size": "1", "sha256": ""}}}',
        b'{"files": {"a": {"size": 1}}}',
        b'{"files": {"\\u0000": {"size": 1, "sha256": ""}}}',
        b'{"files": {}, "more": 1}',
        b"[" * 100_000,
    ],
)
def test_what_is_no_manifest_is_a_fault(run, content):
    (run / "checkpoint_7" / manifest.FILE).write_bytes(content)
    assert faults(run / "checkpoint_7") == ["manifest.json cannot be read"]


def test_manifests_of_before_they_had_a_checksum_of_their_own_are_read(run):
    path = run / "checkpoint_7" / manifest.FILE
    said = json.loads(path.read_text())
    del said["sha256"]
    path.write_text(json.dumps(said))
    assert faults(run / "checkpoint_7") == []


def test_damage_to_an_evaluation_is_found(run):
    store = checkpoints.Checkpoints(run)
    store.add_evaluation(7, {"score": 1.0})
    store.close()
    assert checkpoints.read_metadata(run) == {"step": 7, "metrics": {"score": 1.0}}
    path = run / "checkpoint_7" / stored.EVALUATION
    content = path.read_bytes()
    for damage in (cut, change, lose):
        damage(path)
        with pytest.raises(stored.BrokenCheckpoint, match=r"checkpoint_7 is broken: evaluation.json"):
            checkpoints.read_metadata(run)
        path.write_bytes(content)
