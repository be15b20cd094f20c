"""Checkpoints of strangers, made to mislead what lists and verifies them: each is answered in words, and at once."""

import json
import os
import pathlib
import shutil

import numpy as np
import pytest
from etils import epath

from diffusion_t5x import checkpoints as verb
from diffusion_t5x.checkpointing import manifest
from diffusion_t5x.checkpointing.checkpoints import Checkpoints

NOTES = "_CHECKPOINT_METADATA"
METADATA = "metadata/metadata"
DEEP = "[" * 100_000


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hostile")
    store = Checkpoints(folder, keep_last=1, keep_best=1, best_metric="loss", best_mode="min")
    state = {"step": np.int32(5), "params": {"w": np.ones(3, np.float32)}}
    store.save(5, state, {}, {"config": "A = 1\n", "step": 5, "metrics": {"loss": 1.0}})
    store.close()
    return folder


@pytest.fixture
def checkpoint(original, tmp_path):
    return shutil.copytree(original, tmp_path / "run") / "checkpoint_5"


def said(capsys, command, checkpoint):
    with pytest.raises(SystemExit) as stopped:
        verb.main([command, str(checkpoint.parent)])
    printed = capsys.readouterr()
    return stopped.value.code, printed.out + printed.err


def changed(path, changes):
    path.write_text(changes if isinstance(changes, str) else json.dumps(json.loads(path.read_text()) | changes))


def vouch(checkpoint, **entries):
    """Writes a manifest of the files as they are now, and of others."""
    manifest.write(epath.Path(checkpoint))
    found, _ = manifest.read(epath.Path(checkpoint))
    manifest._write(epath.Path(checkpoint), found | entries)


@pytest.mark.parametrize(
    "changes",
    [
        *({"commit_timestamp_nsecs": x} for x in ("x", 10**40, [])),
        *({"custom_metadata": x} for x in ([1], None, {"manifest": 1, "best": [{}, {}]}, {"manifest": 1, "best": 5})),
        *("[1]", "null", DEEP, "{"),
    ],
    ids=lambda changes: str(changes)[:50],
)
def test_notes_of_any_form(changes, checkpoint, capsys):
    """They are not in the manifest: a flipped bit may have made them, too."""
    changed(checkpoint / NOTES, changes)
    code, printed = said(capsys, "list", checkpoint)
    assert code == 0 and "all there" in printed


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        *(
            ("evaluation.json", x)
            for x in ("[1]", '{"metrics": [1]}', '{"metrics": {"\x1b[2J": "\x1b[2J"}}', "{", DEEP)
        ),
        ("evaluation.json", json.dumps({"metrics": {"loss": 10**400}})),
        *((METADATA, x) for x in ({"config": 5}, {"metrics": "a"}, {"metrics": {"loss": "a"}}, "[1]", "x", DEEP)),
    ],
    ids=lambda value: str(value)[:50],
)
def test_metadata_of_any_form(name, changes, checkpoint, capsys):
    changed(checkpoint / name, changes)
    vouch(checkpoint)
    for command in ("list", "show"):
        code, printed = said(capsys, command, checkpoint)
        assert code == 2 and printed.count("\n") == 1 and "its metadata" in printed and "\x1b" not in printed


def device(folder):
    (folder / "x").symlink_to("/dev/zero")


def pipe(folder):
    os.mkfifo(folder / "x")


@pytest.mark.parametrize("make", [device, pipe])
def test_what_has_no_end_is_not_read(make, checkpoint, capsys):
    vouch(checkpoint, x={"size": 0, "sha256": "0" * 64})
    make(checkpoint)
    for command in ("list", "verify"):
        code, printed = said(capsys, command, checkpoint)
        assert code == 1 and "x is missing or cannot be read" in printed


def test_links_that_lead_back(checkpoint, capsys):
    for name in "ab":
        (checkpoint / name).symlink_to(".")
    assert said(capsys, "list", checkpoint)[0] == said(capsys, "verify", checkpoint)[0] == 0


def test_a_manifest_of_nothing_is_no_checkpoint(checkpoint, capsys):
    for path in checkpoint.iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    vouch(checkpoint)
    code, printed = said(capsys, "verify", checkpoint)
    assert code == 1 and "it has no state/_METADATA" in printed


def test_control_characters_in_names(checkpoint, capsys):
    changed(checkpoint / METADATA, {"\x1b[2J": "\x9b", "config": "\x1b]0;x\x07", "metrics": {"\x1b[2J": 1.0}})
    pathlib.Path(checkpoint, "\x1b[2J").write_text("x")
    vouch(checkpoint, **{"\x1b[3J": {"size": 1, "sha256": ""}})
    for command in ("list", "verify", "show"):
        _, printed = said(capsys, command, checkpoint)
        assert all(x.isprintable() or x == "\n" for x in printed)
