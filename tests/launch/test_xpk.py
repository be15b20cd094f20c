"""`launch/xpk.sh` with an xpk that runs the command as XPK's container does."""

import os
import signal
import subprocess
import time

import pytest
from stand_ins import LAUNCH, environment, program

# The container's shell: it hands SIGTERM to the last program that it has started in the background, and waits for it.
XPK = """
echo "$*" > arguments
echo $$ > container
while [ "$1" != --command ]; do shift; done
hand_on() (kill -SIGTERM $! 2>/dev/null)
trap hand_on SIGTERM
(eval "$2") & PID=$!
while kill -0 $PID 2>/dev/null; do /bin/sleep 0.05; done
wait $PID
exit $?
"""
SAVES = """
trap 'echo saved > saved; exit 75' TERM
echo "$*" > ran
while :; do /bin/sleep 0.02; done
"""
CLUSTER = ["--cluster", "c", "--zone", "z", "--tpu-type", "v5p-128", "--workload", "w"]


@pytest.mark.parametrize("flags", [[], ["--docker-image", "registry/image"], ["--pathways"]], ids=" ".join)
def test_the_run_saves_when_its_container_is_told_to_stop(tmp_path, flags):
    for name, script in {"xpk": XPK, "pip": 'echo "$*" > installed\n', "python": SAVES}.items():
        program(tmp_path / "bin" / name, script)
    command = ["bash", LAUNCH / "xpk.sh", *flags, *CLUSTER, "--", "train", "--a=b c"]
    process = subprocess.Popen(command, cwd=tmp_path, env=environment(tmp_path / "bin"), start_new_session=True)
    deadline = time.monotonic() + 30
    try:
        while not (tmp_path / "ran").exists() or not (tmp_path / "ran").read_text():
            assert time.monotonic() < deadline and process.poll() is None
            time.sleep(0.02)
        os.kill(int((tmp_path / "container").read_text()), signal.SIGTERM)
        assert process.wait(30) == 75
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    assert (tmp_path / "saved").exists()
    pathways = "--pathways" in flags
    assert (tmp_path / "ran").read_text() == f"-m diffusion_t5x.train --a=b c{'' if pathways else ' --distributed'}\n"
    assert (tmp_path / "installed").exists() == ("--docker-image" not in flags)
    given = (tmp_path / "arguments").read_text()
    assert given.startswith(f"workload create{'-pathways' if pathways else ''} ")
    assert ("--restart-on-exit-codes 75" in given) != pathways  # which `create-pathways` does not take
