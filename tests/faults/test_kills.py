"""Runs that are killed again and again end where an undisturbed run ends, bit for bit."""

import collections
import random

import pytest
from killing import PHASES, Run, check_same, from_cache, write_cache

pytestmark = pytest.mark.slow
STEPS = 60


def test_killed_runs_end_as_an_undisturbed_one(tmp_path, request, monkeypatch):
    num_kills, draw = request.config.getoption("--kills"), random.Random(request.config.getoption("--kill_seed"))
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "compiled"))
    cache, undisturbed = tmp_path / "cache", tmp_path / "undisturbed"
    write_cache(cache, "quickstart_pairs")
    Run(from_cache(cache, undisturbed, STEPS), undisturbed, tmp_path / "undisturbed.log", draw).finish()

    seen, kills, runs = collections.Counter(), 0, 0
    while kills < num_kills:
        killed = tmp_path / f"killed_{runs}"
        run = Run(from_cache(cache, killed, STEPS), killed, tmp_path / f"killed_{runs}.log", draw)
        runs += 1
        while kills < num_kills:
            phase = run.kill(draw.choice(PHASES))
            if phase is None:
                break
            seen[phase] += 1
            kills += 1
        run.finish()
        check_same(killed, undisturbed, STEPS)
    print(f"{kills} kills of {runs} runs: {dict(seen)}")
    assert num_kills < 30 or seen.keys() >= {"start or restore", "step", "save", "evaluation"}
