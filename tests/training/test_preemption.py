"""Told to stop, by real signals: the step is finished and saved, and the run goes on from there as if undisturbed."""

import os
import pty
import signal
import socket
import subprocess
import sys
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from diffusion_t5x.checkpointing import checkpoints, manifest, restoring
from diffusion_t5x.partitioning import MeshConfig
from diffusion_t5x.training.bad_numbers import BadNumbers, Judge
from diffusion_t5x.training.goodput import Goodput
from diffusion_t5x.training.loop import Periods, Reporting, Saving, TrainLoop
from diffusion_t5x.training.preemption import RUN_AGAIN, STOPPED, StopSignals
from diffusion_t5x.training.state import TrainState

MESH = MeshConfig().make()
ABSTRACT = TrainState(
    step=jax.ShapeDtypeStruct((), jnp.int32), params={"sum": jax.ShapeDtypeStruct((), jnp.int32)}, opt_state=()
)


@jax.jit
def count(state, batch, loss_limit):
    step = state.step + 1
    metrics = {"loss": jnp.float32(step**2), "tokens": jnp.sum(batch.segment_ids > 0)}
    return TrainState(step=step, params={"sum": state.params["sum"] + step}, opt_state=()), metrics


class Run:
    """A run of ten steps in a folder; each call goes on from where the last one stopped."""

    def __init__(self, folder, *, eval=5, in_batch=None, in_evaluation=None):
        self.folder, self.periods = folder, Periods(log=4, eval=eval, save=100)
        self.in_batch, self.in_evaluation = in_batch or {}, in_evaluation or {}
        self.written, self.evaluated, self.position = {}, [], 0

    def write(self, step, folder, metrics):
        if folder == "train":
            assert step not in self.written
            self.written[step] = metrics["loss"]

    def next_batch(self, state):
        self.position += 1
        if number := self.in_batch.pop(self.position, None):
            os.kill(os.getpid(), number)
        return tiny.one_a_row([([3], [4, 5])], length=4)

    def state_dict(self):
        return {"position": np.array(self.position)}

    def evaluate(self, state, step):
        if number := self.in_evaluation.pop(step, None):
            # From another thread, as from another process: this one is busy for long.
            threading.Timer(0.05, os.kill, (os.getpid(), number)).start()
            deadline = time.monotonic() + 60
            while time.monotonic() < deadline:
                time.sleep(0.01)
            pytest.fail("nothing broke off the evaluation")
        self.evaluated.append(step)
        return {"score": float(step)}

    def __call__(self):
        state, due = TrainState(step=jnp.int32(0), params={"sum": jnp.int32(0)}, opt_state=()), False
        if checkpoints.latest(self.folder):
            state, data, metadata = restoring.restore(self.folder, ABSTRACT)
            state = jax.device_put(state)
            self.position, due = int(data["position"]), metadata.get("evaluation_due", False)
        store = checkpoints.Checkpoints(self.folder)
        try:
            train_loop = TrainLoop(
                mesh=MESH,
                train_step=count,
                batches=self,
                evaluate=self.evaluate,
                total_steps=10,
                periods=self.periods,
                saving=Saving(store, {}),
                reporting=Reporting(self, Judge(BadNumbers(), self.folder), Goodput()),
            )
            return train_loop.run(state, due)
        finally:
            store.close()


@pytest.mark.parametrize(
    "number,code",
    [
        (signal.SIGTERM, RUN_AGAIN),
        (signal.SIGINT, STOPPED),
        (signal.SIGHUP, RUN_AGAIN),
        (signal.SIGUSR1, RUN_AGAIN),
    ],
)
def test_a_signal_finishes_the_step_and_saves(tmp_path, number, code):
    before = signal.getsignal(number)
    run = Run(tmp_path, in_batch={3: number, 7: number})
    for step in (3, 7):
        with pytest.raises(SystemExit) as stopped:
            run()
        assert stopped.value.code == code
        assert checkpoints.steps(tmp_path)[-1] == step == run.position
        assert manifest.faults(checkpoints.find_checkpoint(tmp_path)) == []
    final = run()
    assert int(final.params["sum"]) == 55 and run.evaluated == [5, 10]
    # Every step is in exactly one mean: of 1 to 3, of 4, of 5 to 7, of 8, of 9 and 10.
    means = [np.mean([s**2 for s in steps]) for steps in ([1, 2, 3], [4], [5, 6, 7], [8], [9, 10])]
    assert list(run.written) == [3, 4, 7, 8, 10] and list(run.written.values()) == pytest.approx(means)
    assert signal.getsignal(number) is before and signal.set_wakeup_fd(-1) == -1


@pytest.mark.parametrize("step", [5, 10])
def test_an_evaluation_is_broken_off_and_made_up_for(tmp_path, step):
    run = Run(tmp_path, in_evaluation={step: signal.SIGTERM})
    with pytest.raises(SystemExit) as stopped:
        run()
    assert stopped.value.code == RUN_AGAIN and run.evaluated == [5][: step // 10]
    assert checkpoints.read_metadata(tmp_path) == {"step": step, "metrics": {}, "evaluation_due": True}
    run.in_evaluation = {step: signal.SIGTERM}  # and once more
    with pytest.raises(SystemExit):
        run()
    assert checkpoints.steps(tmp_path) == [step]
    run()
    assert run.evaluated == [5, 10] and checkpoints.steps(tmp_path)[-1] == 10


def test_a_signal_in_the_last_step_ends_a_run_that_is_done(tmp_path):
    run = Run(tmp_path, eval=None, in_batch={10: signal.SIGTERM})
    assert int(run().step) == 10 and checkpoints.steps(tmp_path) == [10]


def test_the_exit_codes_are_those_that_the_page_names():
    assert (RUN_AGAIN, STOPPED) == (75, 130)


_BUSY = """
import jax, jax.numpy as jnp
from diffusion_t5x.training.preemption import StopSignals
spin = jax.jit(lambda: jax.lax.while_loop(lambda i: i >= 0, lambda i: i + 1, jnp.zeros((), jnp.float32)))
with StopSignals() as stop:
    print("busy", flush=True)
    jax.block_until_ready(spin())
"""


def test_a_second_signal_ends_the_process_at_once_whatever_it_computes():
    process = subprocess.Popen([sys.executable, "-c", _BUSY], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stdout.readline() == "busy\n"
        time.sleep(0.5)
        process.send_signal(signal.SIGTERM)
        assert "SIGTERM: stopping after this step" in process.stderr.readline()
        assert process.poll() is None  # in the middle of a step that takes for ever
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=60) == 128 + signal.SIGINT
    finally:
        process.kill()
        process.communicate()


_JOINED = """
import sys, time, jax
from diffusion_t5x.training.preemption import StopSignals
jax.distributed.initialize(sys.argv[1], num_processes=2, process_id=int(sys.argv[2]))
with StopSignals() as stop:
    print("ready", flush=True)
    for step in range(1, 3000):
        time.sleep(0.02 if sys.argv[2] == "0" else 0.03)  # never at the same step
        if stop.reached(step):
            print(step, stop.exit_code, flush=True)
            break
jax.distributed.shutdown()
"""


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_joined_processes_stop_at_the_same_step_whichever_is_told(number):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    commands = [[sys.executable, "-c", _JOINED, address, str(index)] for index in range(2)]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for command in commands]
    try:
        assert [process.stdout.readline() for process in processes] == ["ready\n"] * 2
        processes[1].send_signal(number)
        told = [process.communicate(timeout=120)[0] for process in processes]
        assert told[0] == told[1] and told[0].split()[1] == str(RUN_AGAIN)
    finally:
        for process in processes:
            process.kill()
            process.wait()


def test_outside_of_training_signals_are_as_they_were():
    handlers = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    with StopSignals():
        assert handlers != [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    assert handlers == [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]


_TOLD = """
import sys, time
from diffusion_t5x.training.preemption import StopSignals
from diffusion_t5x.progress import Progress
with StopSignals() as stop, Progress(10**6) as progress:
    open(sys.argv[1], "w").write("running")
    for step in range(1, 10**6):
        progress.update(step, {"loss": 1.0})
        time.sleep(0.01)
        if stop.reached(step):
            time.sleep(0.5)  # of a checkpoint
            open(sys.argv[1], "w").write("saved")
            sys.exit(stop.exit_code)
"""


def wait_until(path, text):
    deadline = time.monotonic() + 60
    while not (path.exists() and path.read_text() == text):
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_terminal_that_closes_stops_a_run_with_a_checkpoint(tmp_path):
    """Then nothing can be printed any more."""
    said = tmp_path / "said"
    terminal, end = pty.openpty()
    program = "import fcntl, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0)" + _TOLD
    command = [sys.executable, "-c", program, str(said)]
    process = subprocess.Popen(command, stdin=end, stdout=end, stderr=end, start_new_session=True)
    try:
        os.close(end)
        wait_until(said, "running")
        os.read(terminal, 1 << 16)
        os.close(terminal)
        assert process.wait(timeout=60) == RUN_AGAIN and said.read_text() == "saved"
    finally:
        process.kill()
        process.wait()


@pytest.mark.parametrize(
    "numbers,code",
    [
        ([signal.SIGHUP, signal.SIGHUP], RUN_AGAIN),  # from the shell and from the kernel
        ([signal.SIGTERM, signal.SIGHUP], RUN_AGAIN),  # from systemd
        ([signal.SIGUSR1, signal.SIGTERM], RUN_AGAIN),  # from Slurm, early and late
        ([signal.SIGTERM, signal.SIGTERM], -signal.SIGTERM),
    ],
)
def test_signals_that_come_along_with_others_are_no_second_ones(tmp_path, numbers, code):
    said = tmp_path / "said"
    process = subprocess.Popen([sys.executable, "-c", _TOLD, str(said)], stderr=subprocess.DEVNULL)
    try:
        wait_until(said, "running")
        for number in numbers:
            process.send_signal(number)
            time.sleep(0.1)
        ended = process.wait(timeout=60)
    finally:
        process.kill()
        process.wait()
    assert ended == (128 - code if code < 0 else code)
    assert said.read_text() == ("running" if code < 0 else "saved")


def test_a_hangup_that_is_ignored_stays_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as by nohup
    try:
        with StopSignals() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            time.sleep(0.05)
            assert not stop.reached(1)
            os.kill(os.getpid(), signal.SIGUSR1)
            time.sleep(0.05)
            assert stop.reached(1)
    finally:
        signal.signal(signal.SIGHUP, before)
