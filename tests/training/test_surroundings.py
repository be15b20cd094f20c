"""Real faults around a run: memory, disk, a step that hangs."""

import os
import subprocess
import sys
import textwrap

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractMesh, NamedSharding, PartitionSpec

from diffusion_t5x.errors import UserError
from diffusion_t5x.training.surroundings import bytes_a_device, explained

ABSTRACT = {"params": jax.ShapeDtypeStruct((2**28,), jnp.float32)}


def test_what_does_not_fit_into_memory_is_said_with_what_to_change():
    message = r"Out of memory: .*allocat.*take 1\.00 GiB of each device.*8 rows"
    with pytest.raises(UserError, match=message) as error, explained(ABSTRACT, "8 rows of 64 tokens", "/run"):
        jnp.zeros(2**45, jnp.int8).block_until_ready()
    assert "num_microbatches" in str(error.value) and isinstance(error.value.__cause__, jax.errors.JaxRuntimeError)


def test_other_errors_stay_as_they_are(tmp_path):
    for wrong in (ValueError("no"), FileNotFoundError(2, "No such file"), UserError("mine")):
        with pytest.raises(type(wrong)) as error, explained(ABSTRACT, "", str(tmp_path)):
            raise wrong
        assert error.value is wrong


def test_a_device_s_share():
    """An eighth of what is cut eight times, and all of what is not."""
    mesh = AbstractMesh((8, 1), ("fsdp", "tensor"))
    cut, whole = (
        jax.ShapeDtypeStruct((16, 4), jnp.float32, sharding=NamedSharding(mesh, spec))
        for spec in (PartitionSpec("fsdp"), PartitionSpec())
    )
    assert bytes_a_device(cut) == 2 * 4 * 4
    assert bytes_a_device({"cut": cut, "whole": whole, "nowhere": ABSTRACT}) == 32 + 16 * 4 * 4 + 2**30


TRAIN = """
    import sys, time
    import jax, jax.numpy as jnp, numpy as np, tiny
    from contextlib import closing
    from diffusion_t5x.partitioning import MeshConfig
    from diffusion_t5x.checkpointing import checkpoints
    from diffusion_t5x.training.bad_numbers import BadNumbers, Judge
    from diffusion_t5x.training.goodput import Goodput
    from diffusion_t5x.training.loop import Periods, Reporting, Saving, TrainLoop
    from diffusion_t5x.training.metrics import make_writer
    from diffusion_t5x.training.state import TrainState
    from diffusion_t5x.training.surroundings import explained

    @jax.jit
    def count(state, batch, loss_limit):
        step = state.step + 1
        metrics = {"loss": jnp.float32(step), "tokens": jnp.sum(batch.segment_ids > 0)}
        return TrainState(step=step, params=state.params, opt_state=()), metrics

    def hang_here():
        time.sleep(600)

    class Batches:
        def next_batch(self, state):
            if int(state.step) == HANG_AT:
                hang_here()
            return tiny.one_a_row([([3], [4, 5])], length=4)

        def state_dict(self):
            return {"position": np.array(0)}

    folder = sys.argv[1]
    noise = np.random.default_rng(0).standard_normal(SIZE).astype(np.float32)
    state = TrainState(step=jnp.int32(0), params={"noise": jnp.asarray(noise)}, opt_state=())
    store, writer = checkpoints.Checkpoints(folder + "/checkpoints"), make_writer(folder, ["jsonl"])
    with explained(state, "1 row of 4 tokens", folder), closing(writer), closing(store):
        TrainLoop(
            mesh=MeshConfig().make(), train_step=count, batches=Batches(), evaluate=None, total_steps=8,
            periods=Periods(log=1, eval=None, save=2), saving=Saving(store, {}),
            reporting=Reporting(writer, Judge(BadNumbers(), folder), Goodput(), hang_timeout=2.0),
        ).run(state)
"""


def script(path, size=8, hang_at=-1):
    path.write_text(textwrap.dedent(TRAIN).replace("SIZE", str(size)).replace("HANG_AT", str(hang_at)))
    return path


def environment():
    return os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}


def finished(folder):
    return sorted(path.name for path in (folder / "checkpoints").iterdir() if path.name.startswith("checkpoint_"))


@pytest.mark.slow
def test_a_step_that_hangs_ends_the_process_and_says_where_it_stands(tmp_path):
    command = [sys.executable, str(script(tmp_path / "run.py", hang_at=5)), str(tmp_path / "run")]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=300)
    assert done.returncode == 1 and "Timeout (0:00:02)!" in done.stderr
    assert "in hang_here" in done.stderr and "in _step" in done.stderr
    assert finished(tmp_path / "run")[:1] == ["checkpoint_2"]


def test_a_full_disk_is_said_and_the_checkpoints_before_stay(tmp_path):
    """A disk of 8 MiB in memory: three checkpoints of 3 MiB do not go on it, and the old one goes after the new one."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = f"mount -t tmpfs -o size=8m tmpfs {disk}"
    if subprocess.run(["unshare", "-rm", "sh", "-c", mount], capture_output=True).returncode:
        pytest.skip("this kernel lets nobody mount a disk of his own")
    run = f"{sys.executable} {script(tmp_path / 'run.py', size=3 << 18)} {disk}"
    look = f"ls {disk}/checkpoints; cp -r {disk}/checkpoints {tmp_path}/seen"
    both = f"{mount} && {run}; echo status $?; {look}"
    done = subprocess.run(
        ["unshare", "-rm", "sh", "-c", both], env=environment(), capture_output=True, text=True, timeout=300
    )
    assert "status 1" in done.stdout, done.stderr
    assert f"UserError: {disk} cannot be written: No space left on device" in done.stderr


@pytest.mark.slow
def test_a_bucket_that_cannot_be_reached_is_said_before_the_run_begins(tmp_path):
    command = [sys.executable, "-m", "diffusion_t5x.train", "--gin_file=recipes/quickstart/pretrain_ar.gin"]
    command.append("--gin.MODEL_DIR=gs://diffusion-t5x-nobody-has-this/run")
    nowhere = dict.fromkeys(("https_proxy", "http_proxy", "HTTPS_PROXY", "HTTP_PROXY"), "http://127.0.0.1:9")
    env = os.environ | nowhere | {"no_proxy": "", "NO_PROXY": "", "GOOGLE_APPLICATION_CREDENTIALS": ""}
    env["GCS_RETRY_CONFIG_MAX_RETRIES"] = "1"  # by default it tries ten times, for minutes
    done = subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, text=True, timeout=600)
    assert done.returncode == 2, done.stderr[-3000:]
    assert "error: Cannot write to gs://diffusion-t5x-nobody-has-this/run: " in done.stderr
    assert "Choose another folder (MODEL_DIR)" in done.stderr and "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []
