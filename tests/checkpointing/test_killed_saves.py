"""Saves that are killed leave a whole checkpoint, or none."""

import os
import pathlib
import signal
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_t5x.checkpointing import checkpoints, restoring, stored

_KILLED = """
import sys, numpy as np, jax.numpy as jnp
from diffusion_t5x.checkpointing.checkpoints import Checkpoints
store = Checkpoints(sys.argv[1])
store.save(1, {"x": jnp.ones(4)}, {"n": np.array(1)}, {})
store.wait()
rng = np.random.default_rng(0)
big = {str(i): jnp.array(rng.random(1 << 20, np.float32)) for i in range(24)}
print("saving", flush=True)
store.save(2, big, {"n": np.array(2)}, {})
store.wait()
print("saved", flush=True)
sys.stdin.read()
"""


def test_a_save_that_is_killed_is_not_a_checkpoint(tmp_path):
    path = tmp_path / "checkpoints"
    environment = os.environ | {"XLA_FLAGS": "", "JAX_PLATFORMS": "cpu"}
    process = subprocess.Popen(
        [sys.executable, "-c", _KILLED, str(path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
        cwd=pathlib.Path(__file__).parents[2],
    )
    try:
        assert process.stdout.readline() == "saving\n"
        deadline = time.monotonic() + 60
        while not any("checkpoint_2" in entry.name for entry in path.iterdir()):
            assert time.monotonic() < deadline
        process.send_signal(signal.SIGKILL)
        rest = process.communicate()[0]
    finally:
        process.kill()
    assert "saved" not in rest, "the save was over before the kill"
    assert any("checkpoint_2" in entry.name for entry in path.iterdir()), "nothing half-written to test with"
    assert checkpoints.find_checkpoint(str(tmp_path)).name == "checkpoint_1"

    store = checkpoints.Checkpoints(path)
    assert checkpoints.steps(path) == [1]
    store.save(3, {"x": jnp.zeros(4)}, {}, {})
    store.close()
    assert {entry.name for entry in path.iterdir()} == {"checkpoint_1", "checkpoint_3"}


_SAVES_FOR_EVER = """
import sys, jax.numpy as jnp, numpy as np
from diffusion_t5x.checkpointing import checkpoints
step = (checkpoints.steps(sys.argv[1]) or [0])[-1]
store = checkpoints.Checkpoints(sys.argv[1], keep_last=1)
while True:
    step += 1
    store.save(step, {str(i): jnp.full(1 << 18, step + i) for i in range(8)}, {"n": np.array(step)}, {"step": step})
    print(step, flush=True)
"""


@pytest.mark.slow
def test_killed_at_any_moment_there_is_a_whole_checkpoint_and_it_is_the_newest(tmp_path):
    """Only one is kept, so that kills hit writing, committing and deleting; each process goes on where one ended."""
    rng, last = np.random.default_rng(0), 0
    for _ in range(5):
        process = subprocess.Popen(
            [sys.executable, "-c", _SAVES_FOR_EVER, str(tmp_path)], stdout=subprocess.PIPE, text=True
        )
        try:
            for _ in range(3):
                assert int(process.stdout.readline()) > last
            time.sleep(rng.uniform(0, 0.3))
        finally:
            process.kill()
            process.communicate()
        step = checkpoints.steps(tmp_path)[-1]
        assert step > last and stored.is_whole(checkpoints.find_checkpoint(str(tmp_path)))
        last = step
        like = {str(i): jax.ShapeDtypeStruct((1 << 18,), jnp.int32) for i in range(8)}
        state, data, metadata = restoring.restore(str(tmp_path), like)
        assert all((state[name] == step + int(name)).all() for name in like)
        assert data["n"] == metadata["step"] == step


_EVALUATES_FOR_EVER = """
import itertools, sys, jax.numpy as jnp
from diffusion_t5x.checkpointing import checkpoints
store = checkpoints.Checkpoints(sys.argv[1])
print("ready", flush=True)
for score in itertools.count(1):
    store.add_evaluation(1, {"score": score})
"""


@pytest.mark.slow
def test_killed_while_metrics_are_added_a_checkpoint_is_whole_evaluated_or_due(tmp_path):
    store = checkpoints.Checkpoints(tmp_path)
    store.save(1, {"x": jnp.arange(4)}, {}, {"step": 1, "metrics": {}, "evaluation_due": True})
    store.close()
    due = {"step": 1, "metrics": {}, "evaluation_due": True}
    for milliseconds in (0, 3, 17):
        process = subprocess.Popen(
            [sys.executable, "-c", _EVALUATES_FOR_EVER, str(tmp_path)], stdout=subprocess.PIPE, text=True
        )
        try:
            assert process.stdout.readline() == "ready\n"
            time.sleep(milliseconds / 1000)
        finally:
            process.kill()
            process.communicate()
        assert stored.faults(checkpoints.find_checkpoint(tmp_path)) == []
        state, _, metadata = restoring.restore(tmp_path, {"x": jax.ShapeDtypeStruct((4,), jnp.int32)})
        assert state["x"].tolist() == [0, 1, 2, 3]
        assert metadata == due or (metadata.keys() == {"step", "metrics"} and metadata["metrics"]["score"] >= 1)
