"""Runs that are killed again and again end where an undisturbed run ends, bit for bit."""

import collections
import json
import random

import numpy as np
import pytest
from etils import epath
from killing import PHASES, Run, command

from diffusion_t5x import cache_tasks, config
from diffusion_t5x.training import checkpoints, manifest, stored

pytestmark = pytest.mark.slow
STEPS = 60
OF_TIME = {"tokens_per_second", "seconds_per_step"}


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cache")
    flags = ["--gin_file=tasks/quickstart.gin", "--gin_file=runs/cache_tasks.gin", f"--gin.CACHE_DIR={folder}"]
    flags += ["--gin.MIXTURE_OR_TASK_NAME=quickstart_pairs", '--gin.SPLITS=("train", "validation")']
    config.run(cache_tasks.cache_tasks, [*flags, '--gin.TASK_FEATURE_LENGTHS={"inputs": 24, "targets": 24}'])
    return folder


def arrays(model_dir):
    checkpoint = checkpoints.find_checkpoint(str(model_dir))
    leaves = stored.leaves(checkpoint)
    return stored.read_arrays(checkpoint, leaves, {name: name for name in leaves})


def metrics(model_dir):
    found = {}
    for path in sorted(model_dir.glob("*/**/metrics.jsonl")):
        kind = path.relative_to(model_dir).parent.as_posix()
        if kind != "goodput":
            lines = map(json.loads, path.read_text().splitlines())
            found[kind] = [{name: x for name, x in line.items() if name not in OF_TIME} for line in lines]
    return found


def check_same(killed, undisturbed):
    expected, found = arrays(undisturbed), arrays(killed)
    assert found.keys() == expected.keys() and "step" in found
    for name, value in expected.items():
        np.testing.assert_array_equal(found[name], value, err_msg=name)
    assert metrics(killed) == metrics(undisturbed)
    assert len(metrics(killed)["train"]) == STEPS
    for path in (killed / "checkpoints").iterdir():
        assert path.name.startswith("checkpoint_"), path  # nothing half-written is left
        assert manifest.faults(epath.Path(path)) == []


def test_killed_runs_end_as_an_undisturbed_one(cache, tmp_path, request, monkeypatch):
    num_kills, draw = request.config.getoption("--kills"), random.Random(request.config.getoption("--kill_seed"))
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "compiled"))
    undisturbed = tmp_path / "undisturbed"
    Run(command(cache, undisturbed, STEPS), undisturbed, tmp_path / "undisturbed.log", draw).finish()

    seen, kills, runs = collections.Counter(), 0, 0
    while kills < num_kills:
        killed = tmp_path / f"killed_{runs}"
        run = Run(command(cache, killed, STEPS), killed, tmp_path / f"killed_{runs}.log", draw)
        runs += 1
        while kills < num_kills:
            phase = run.kill(draw.choice(PHASES))
            if phase is None:
                break
            seen[phase] += 1
            kills += 1
        run.finish()
        check_same(killed, undisturbed)
    print(f"{kills} kills of {runs} runs: {dict(seen)}")
    assert num_kills < 30 or seen.keys() >= {"start or restore", "step", "save", "evaluation"}
