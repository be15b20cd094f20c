"""The verb `checkpoints`, on checkpoints that the framework wrote and that were tampered with."""

import json
import pathlib
import shutil

import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_t5x import checkpoints as verb
from diffusion_t5x.checkpointing import inspection
from diffusion_t5x.checkpointing.checkpoints import Checkpoints

RNG = np.random.default_rng(0)
WEIGHTS = RNG.standard_normal((8, 16)).astype(np.float32)
METADATA = {"vocabulary": {"size": 24, "mask_id": 23}, "config": "TRAIN_STEPS = 10\nBATCH_SIZE = 8\n"}


def state(step, **params):
    params = {"w": WEIGHTS, "half": jnp.full((3,), 0.5, jnp.bfloat16)} | params
    return {"step": np.int32(step), "params": {name: x for name, x in params.items() if x is not None}}


@pytest.fixture(scope="module")
def original(tmp_path_factory) -> pathlib.Path:
    folder = tmp_path_factory.mktemp("verb") / "run"
    store = Checkpoints(folder / "checkpoints", keep_last=9, keep_best=1, best_metric="task/loss", best_mode="min")
    for step, loss in ((10, 2.0), (20, 1.0), (30, 1.5)):
        store.save(step, state(step), {}, METADATA | {"step": step, "metrics": {"task/loss": loss}})
    store.close()
    return folder


@pytest.fixture
def run(original, tmp_path) -> pathlib.Path:
    return shutil.copytree(original, tmp_path / "run")


def call(capsys, *argv) -> tuple[int, str]:
    with pytest.raises(SystemExit) as stopped:
        verb.main([str(argument) for argument in argv])
    printed = capsys.readouterr()
    return stopped.value.code, printed.out + printed.err


def words(text: str, start: str) -> list[str]:
    (line,) = (line for line in text.splitlines() if line.split()[:1] == [start])
    return line.split()


def test_list(run, capsys):
    code, printed = call(capsys, "list", run)
    assert code == 0
    sizes = {
        path.name: sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
        for path in (run / "checkpoints").iterdir()
    }
    for step, marks in ((10, []), (20, ["best"]), (30, ["newest"])):
        row = words(printed, str(step))
        assert row[1] == f"{sizes[f'checkpoint_{step}']:,}"
        assert [word for word in row if word in ("newest", "best")] == marks
    assert words(printed, "20")[-1] == "1" and "task/loss" in printed

    (run / "checkpoints/checkpoint_30/state/manifest.ocdbt").unlink()
    code, printed = call(capsys, "list", run / "checkpoints")
    assert code == 1 and "newest" in words(printed, "20") and "best" in words(printed, "20")
    assert "state/manifest.ocdbt is missing" in printed


def test_show(run, capsys):
    code, printed = call(capsys, "show", run)
    assert code == 0 and "checkpoint_30" in printed
    assert words(printed, "params/w") == ["params/w", "float32[8,", "16]"]
    assert words(printed, "params/half") == ["params/half", "bfloat16[3]"]
    assert "'mask_id': 23" in printed and "BATCH_SIZE = 8" in printed
    assert "int32[]" in printed


def test_verify(run, capsys):
    assert call(capsys, "verify", run)[0] == 0
    broken = run / "checkpoints/checkpoint_20/state/_METADATA"
    broken.write_text(broken.read_text() + " ")
    code, printed = call(capsys, "verify", run)
    assert code == 1 and "broken: state/_METADATA has" in printed and printed.count("whole") == 2
    assert call(capsys, "verify", run / "checkpoints/checkpoint_10")[0] == 0
    assert call(capsys, "verify", broken.parent.parent)[0] == 1
    code, printed = call(capsys, "show", broken.parent.parent)
    assert code == 0  # its metadata are whole; what is broken is the state's
    code, printed = call(capsys, "diff", run, broken.parent.parent)
    assert code == 1 and "checkpoint_20 is broken" in printed and "checkpoint_30" in printed


def test_diff_of_a_checkpoint_with_itself(run, capsys):
    code, printed = call(capsys, "diff", run, run / "checkpoints/checkpoint_30")
    assert code == 0 and printed.strip() == "3 arrays are equal, 0 differ."


def test_diff(run, tmp_path, capsys):
    changed = WEIGHTS.copy()
    changed[3, 4] += 0.25
    other = state(30, w=changed, half=jnp.full((4,), 0.5, jnp.bfloat16), more=np.zeros(2, np.float32))
    store = Checkpoints(tmp_path / "other")
    metadata = METADATA | {"config": "TRAIN_STEPS = 20\nBATCH_SIZE = 8\n", "step": 30, "seed": 1}
    store.save(30, other, {}, metadata | {"metrics": {"task/loss": 1.5}})
    store.close()
    code, printed = call(capsys, "diff", run, tmp_path / "other")
    assert code == 1
    assert words(printed, "params/half")[1:3] == ["bfloat16[3]", "bfloat16[4]"]
    assert words(printed, "params/more")[1:3] == ["-", "float32[2]"]
    assert words(printed, "params/w")[-2] == "0.25"
    found = inspection.difference(str(run), str(tmp_path / "other"))
    (array,) = (array for array in found.arrays if array.name == "params/w")
    double = WEIGHTS.astype(np.float64)
    assert array.largest == np.abs(changed - double).max() and found.num_equal == 1
    expected = np.linalg.norm(changed - double) / np.linalg.norm(double)
    assert array.relative == pytest.approx(expected, rel=1e-12)
    assert found.metadata == {"seed": (None, 1)}
    assert [line for line in found.config if line[:2] in ("-T", "+T")] == ["-TRAIN_STEPS = 10", "+TRAIN_STEPS = 20"]
    assert "+TRAIN_STEPS = 20" in printed and "1 arrays are equal, 3 differ." in printed


def test_diff_counts_what_is_not_a_number(tmp_path):
    for name, value in (("a", np.nan), ("b", 1.0)):
        store = Checkpoints(tmp_path / name)
        store.save(0, state(0, w=np.array([value, 2.0], np.float32)), {}, {})
        store.close()
    assert not inspection.difference(str(tmp_path / "a"), str(tmp_path / "a"))
    (array,) = inspection.difference(str(tmp_path / "a"), str(tmp_path / "b")).arrays
    assert np.isnan(array.largest) and np.isnan(array.relative)


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        ([], "required"),
        (["lsit", "x"], "lsit"),
        (["list"], "RUN"),
        (["list", "/no/such/run"], "No checkpoint at /no/such/run"),
        (["diff", "/no/such/run", "b"], "No checkpoint at /no/such/run"),
    ],
)
def test_a_wrong_command_is_one_message_and_status_2(argv, expected, capsys):
    code, printed = call(capsys, *argv)
    assert code == 2 and expected in printed and printed.startswith("error: ") and "Traceback" not in printed


@pytest.mark.parametrize("damage", ["empty", "no array", "no part of an array", "renamed"])
def test_verify_of_a_checkpoint_without_manifest(run, capsys, damage):
    """One of before there were manifests is read; what holds no checkpoint is none."""
    path = run / "checkpoints" / "checkpoint_30"
    (path / "manifest.json").unlink()
    notes = json.loads((path / "_CHECKPOINT_METADATA").read_text())
    (path / "_CHECKPOINT_METADATA").write_text(json.dumps(notes | {"custom_metadata": {}}))
    code, printed = call(capsys, "verify", path)
    assert code == 0 and "written before there were checksums; every file can be read" in printed
    if damage == "empty":
        shutil.rmtree(path)
        path.mkdir()
    elif damage == "renamed":
        path = path.rename(path.with_name("checkpoint_40"))
    else:
        files = sorted((path / "state").rglob("*"), key=lambda file: file.stat().st_size * file.is_file())
        (path / "state" / "manifest.ocdbt" if damage == "no array" else files[-1]).unlink()
    code, printed = call(capsys, "verify", run)
    assert code == 1 and words(printed, path.name)[1] == "broken:"
    assert words(printed, "checkpoint_20")[1] == "whole"
