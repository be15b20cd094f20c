"""`launch/slurm.sh` with an srun that runs four ranks here, and treats them as Slurm does."""

import pytest
from stand_ins import LAUNCH, environment, program, run

# With --kill-on-bad-exit=1, ends all ranks when one leaves with a code other than 0; its own code is the highest.
SRUN = """
[ "$1" = --kill-on-bad-exit=1 ] || exit 99
shift
pids=() status=0
for rank in 0 1 2 3; do
  SLURM_PROCID=$rank "$@" & pids+=($!)
done
if [ -n "${TELL:-}" ]; then # every process of the step, as Slurm's signal does
  until [ "$(ls ready.* 2>/dev/null | wc -l)" = 4 ]; do sleep 0.05; done
  kill -TERM "${pids[@]}" $(cat ready.*)
fi
while [ ${#pids[@]} -gt 0 ]; do
  for rank in "${!pids[@]}"; do
    kill -0 "${pids[rank]}" 2>/dev/null && continue
    wait "${pids[rank]}"; code=$?
    unset "pids[$rank]"
    [ $code -gt $status ] && status=$code
    [ $code = 0 ] || kill -KILL "${pids[@]}" $(cat ready.* 2>/dev/null) 2>/dev/null
  done
  sleep 0.05
done
exit $status
"""
# The ranks leave one by one, the last half a second after the first.
STOPS_ON_TERM = """
trap 'sleep 0.$((1 + SLURM_PROCID))5; touch "saved.$SLURM_PROCID"; exit 75' TERM
echo $$ > "ready.$SLURM_PROCID"
while :; do sleep 0.05; done
"""


def submitted(folder, python, **variables):
    """The finished launcher, and what was requeued."""
    for name, script in {"srun": SRUN, "scontrol": 'echo "$*" >> requeued'}.items():
        program(folder / "bin" / name, script)
    program(folder / ".venv/bin/python", python)
    given = {"SLURM_SUBMIT_DIR": str(folder), "SLURM_JOB_ID": "7", **variables}
    process = run(LAUNCH / "slurm.sh", "train", "--a=b", env=environment(folder / "bin", **given), cwd=folder)
    requeued = (folder / "requeued").read_text().split() if (folder / "requeued").exists() else []
    return process, requeued


def test_all_ranks_save_and_the_job_is_queued_again_when_they_leave_one_by_one(tmp_path):
    process, requeued = submitted(tmp_path, STOPS_ON_TERM, TELL="1")
    assert process.returncode == 75, process.stderr
    assert sorted(path.name for path in tmp_path.glob("saved.*")) == [f"saved.{rank}" for rank in range(4)]
    assert requeued == ["requeue", "7"]
    assert not list(tmp_path.glob("*.told_to_stop"))


@pytest.mark.parametrize("code", [0, 1, 137])
def test_other_codes_come_back_and_nothing_is_queued(tmp_path, code):
    process, requeued = submitted(tmp_path, f"[ $SLURM_PROCID = 2 ] || exec sleep 0.2\nexit {code}\n")
    assert process.returncode == (code if code == 0 else 137)  # srun's: it has killed the others
    assert not requeued


def test_a_rank_that_fails_while_others_save_is_a_failure(tmp_path):
    process, requeued = submitted(tmp_path, "[ $SLURM_PROCID = 3 ] || exit 75\nsleep 0.3\nexit 4\n")
    assert process.returncode == 4 and not requeued


def test_an_earlier_stop_says_nothing_of_this_run(tmp_path):
    (tmp_path / "slurm-7.told_to_stop").touch()
    process, requeued = submitted(tmp_path, "exit 0\n")
    assert process.returncode == 0 and not requeued


def test_ranks_get_the_cores_that_the_job_asked_for(tmp_path):
    for given, found in (({}, "none"), ({"SLURM_CPUS_PER_TASK": "12"}, "12")):
        submitted(tmp_path, 'echo "${SRUN_CPUS_PER_TASK:-none}" > "cores.$SLURM_PROCID"\n', **given)
        assert [(tmp_path / f"cores.{rank}").read_text() for rank in range(4)] == [f"{found}\n"] * 4


def test_without_an_environment_it_says_how_to_make_one(tmp_path):
    process = run(LAUNCH / "slurm.sh", "train", env=environment(tmp_path, SLURM_SUBMIT_DIR=str(tmp_path)))
    assert process.returncode == 2 and "bash launch/test.sh --help" in process.stderr
