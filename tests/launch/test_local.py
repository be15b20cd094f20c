"""`launch/local.sh` with a python that does what the test says."""

import os
import shutil
import signal
import subprocess
import sys

import pytest
from stand_ins import LAUNCH, environment, program, run

# What every stand-in begins with: the free port that the launcher asks for, and a first line.
BEGIN = '[ "$1" = -c ] && echo 1 && exit\necho "process $JAX_PROCESS_ID of $JAX_NUM_PROCESSES: $*"\n'


def launcher(folder, python):
    """A checkout with `local.sh` and an environment whose python is the script."""
    program(folder / "venv/bin/python", BEGIN + python)
    (folder / "launch").mkdir()
    (folder / "launch/setup_env.sh").write_text(f"VENV={folder}/venv\n")
    return shutil.copy(LAUNCH / "local.sh", folder / "launch")


@pytest.mark.parametrize("code", [0, 3, 75])
def test_the_code_of_the_processes_is_the_launchers(tmp_path, code):
    """Process 0 would wait for ever for process 1 if that fails."""
    wait = f'[ "$JAX_PROCESS_ID" = 0 ] && [ {code} = 3 ] && exec sleep 600\n'
    process = run(launcher(tmp_path, f"{wait}exit {code}\n"), "2", "train", "--a=b")
    assert process.returncode == code
    assert "1: process 1 of 2: -m diffusion_t5x.train --a=b --distributed" in process.stdout.splitlines()


def test_a_failure_counts_more_than_a_process_that_was_told_to_stop(tmp_path):
    python = '[ "$JAX_PROCESS_ID" = 0 ] && exit 75\nsleep 0.5\nexit 3\n'
    assert run(launcher(tmp_path, python), "2", "train").returncode == 3


def test_processes_that_signals_end_at_the_same_time_are_all_noticed(tmp_path):
    """As where the system ends them for want of memory."""
    assert run(launcher(tmp_path, "kill -KILL $$\n"), "4", "train").returncode == 137


# As a joined process: a stop signal is noted, and a second one does nothing.
SAVING = f"""exec {sys.executable} -S -c '
import os, signal, sys, time
told = []
for number in (signal.SIGTERM, signal.SIGUSR1):
    signal.signal(number, lambda *_: told.append(1))
print("ready", flush=True)
while not told:
    time.sleep(0.02)
time.sleep(int(os.environ["JAX_PROCESS_ID"]) / 4)
print("saved")
sys.exit(print("said last", file=sys.stderr) or 75)'
"""


def told(script, number, to_group):
    """Exit code and output of two processes that get a signal when both are ready."""
    process = subprocess.Popen(
        ["bash", script, "2", "train"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    lines = []
    while {"0: ready", "1: ready"} - set(lines):
        lines.append(process.stdout.readline().strip())
    if to_group:
        os.killpg(process.pid, number)
    else:
        process.send_signal(number)
    out, err = process.communicate(timeout=60)
    return process.returncode, out.splitlines(), err.splitlines()


@pytest.mark.parametrize("to_group", [False, True], ids=["alone", "group"])
@pytest.mark.parametrize("number,code", [(signal.SIGTERM, 75), (signal.SIGINT, 130), (signal.SIGUSR1, 75)])
def test_told_to_stop_it_keeps_what_is_said_last(tmp_path, number, code, to_group):
    status, out, err = told(launcher(tmp_path, SAVING), number, to_group)
    assert status == code
    assert sorted(out) == ["0: saved", "1: saved"]
    assert sorted(err) == ["0: said last", "1: said last"]


# Says something on its way out, again and again.
CHATTY = f"""exec {sys.executable} -S -c '
import signal, sys, time
told = []
for number in (signal.SIGTERM, signal.SIGHUP):
    signal.signal(number, lambda *_: told.append(1))
print("ready", flush=True)
while not told:
    time.sleep(0.02)
for _ in range(4):
    print("saving", flush=True)
    print("saving", file=sys.stderr, flush=True)
    time.sleep(0.05)
open("FOLDER/saved", "w").close()
sys.exit(75)'
"""


def test_processes_save_when_nobody_reads_their_output_any_more(tmp_path):
    """As after the terminal was closed."""
    chatty = CHATTY.replace("FOLDER", str(tmp_path))
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "start_new_session": True}
    process = subprocess.Popen(["bash", launcher(tmp_path, chatty), "1", "train"], **pipes)
    while process.stdout.readline() != "0: ready\n":
        pass
    process.stdout.close()
    process.stderr.close()
    os.killpg(process.pid, signal.SIGHUP)
    assert process.wait(20) == 75 and (tmp_path / "saved").exists()


def test_a_signal_before_the_first_process_is_started_is_not_lost(tmp_path):
    script = launcher(tmp_path, "exec sleep 10\n")
    once = f'mkdir {tmp_path}/once 2>/dev/null && kill -TERM $PPID\nexec {shutil.which("mkfifo")} "$@"\n'
    program(tmp_path / "bin/mkfifo", once)
    assert run(script, "2", "train", env=environment(tmp_path / "bin")).returncode == 143
    assert (tmp_path / "once").exists()


def test_it_does_not_wait_for_ever_for_what_a_process_leaves_behind(tmp_path):
    process = subprocess.run(
        ["bash", launcher(tmp_path, "sleep 5 &\nexit 0\n"), "1", "train"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        timeout=20,
    )
    assert process.returncode == 0
