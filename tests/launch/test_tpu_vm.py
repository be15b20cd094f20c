"""`launch/tpu_vm.sh` with a gcloud whose hosts are folders here."""

import signal
import time

import pytest
from tpu_slices import Cloud


@pytest.fixture
def cloud(tmp_path):
    return Cloud(tmp_path)


ONCE = 'if mkdir "$CLOUD/$HOST.once" 2>/dev/null; then {}; fi'
# A process that a lost connection leaves behind: it goes on printing, and saves when it is told to stop.
STAYS = 'trap "echo $HOST >> $CLOUD/saved; exit 75" TERM; while :; do echo step; /bin/sleep 0.02; done'


def test_the_verb_runs_on_every_host_and_its_output_is_kept(cloud):
    cloud.behave('echo "step 1"')
    code, errors = cloud.run()
    assert code == 0, errors
    assert cloud.lines("ran.a.0") == cloud.lines("ran.a.1") == ["-m diffusion_t5x.train --a=b c --distributed"]
    (log,) = (cloud.folder / "tpu_logs/a").glob("*-1/a.log")
    assert {"a.0: step 1", "a.1: step 1"} <= set(log.read_text().splitlines())


def test_it_says_that_only_what_is_committed_is_copied(cloud):
    assert "not committed" not in cloud.run()[1]
    cloud.state("uncommitted", " M launch/tpu_vm.sh")
    code, errors = cloud.run()
    assert code == 0 and "not committed" in errors


def test_told_to_stop_it_runs_again_without_another_installation(cloud):
    cloud.behave(ONCE.format("exit 75"))
    code, errors = cloud.run()
    assert code == 0, errors
    assert cloud.times("ran") == [2, 2] and cloud.times("installed") == [1, 1]


def test_a_stop_of_one_host_counts_when_others_failed_for_it(cloud):
    cloud.behave(ONCE.format('[ "$HOST" = a.1 ] && exit 75; exit 134'))
    assert cloud.run()[0] == 0
    assert cloud.times("ran") == [2, 2]


def test_a_failure_ends_it_and_so_does_the_last_retry(cloud):
    cloud.behave('[ "$HOST" = a.0 ] || exit 3')
    assert cloud.run()[0] == 3
    assert cloud.times("ran") == [1, 1]
    cloud.behave("exit 75")
    assert cloud.run("--retries", "2")[0] == 75
    assert cloud.times("ran") == [4, 4]


def test_what_a_lost_connection_left_is_told_to_save_before_the_next_attempt(cloud):
    (cloud.folder / "lose").touch()
    cloud.behave(f"if mkdir $CLOUD/$HOST.ready 2>/dev/null; then {STAYS}; fi; echo again >> $CLOUD/saved")
    code, errors = cloud.run()
    assert code == 0, errors
    assert sorted(cloud.lines("saved")[:2]) == ["a.0", "a.1"] and cloud.lines("saved")[2:] == ["again", "again"]
    assert "it saves first" in errors


def test_what_does_not_save_in_time_is_killed(cloud):
    (cloud.folder / "lose").touch()
    hangs = "trap '' TERM; while :; do /bin/sleep 0.02; done"
    cloud.behave(f"if mkdir $CLOUD/$HOST.ready 2>/dev/null; then {hangs}; fi")
    assert cloud.run()[0] == 0
    assert cloud.times("ran") == [2, 2]


def test_a_command_that_gcloud_repeats_does_not_run_twice_in_an_attempt(cloud):
    """The connection to host 1 is lost, and gcloud connects again while host 0 still runs."""
    cloud.behave(ONCE.format('[ "$HOST" = a.0 ] && { /bin/sleep 0.3; exit 134; }; exit 255'))
    code, errors = cloud.run()
    assert code == 0, errors
    assert cloud.times("ran") == [2, 2]


def test_a_slice_that_was_made_again_is_set_up_anew(cloud):
    cloud.behave(ONCE.format("echo PREEMPTED > $CLOUD/tpu-vm.a; exit 134"))
    cloud.meanwhile("rm -rf $CLOUD/a; echo READY > $CLOUD/tpu-vm.a")
    code, errors = cloud.run()
    assert code == 0 and "a is PREEMPTED" in errors
    assert cloud.times("ran") == [2, 2] and cloud.times("installed") == [2, 2]


QUEUE = "queued-resources"
# The queue's next step: the request is granted, and its slices are there.
GRANTED = f"""
case $(cat "$CLOUD/{QUEUE}.q") in
  ACCEPTED) echo WAITING_FOR_RESOURCES > "$CLOUD/{QUEUE}.q" ;;
  *) echo ACTIVE > "$CLOUD/{QUEUE}.q"; for i in 0 1; do echo READY > "$CLOUD/tpu-vm.q-$i"; done ;;
esac
"""


def test_a_spot_request_is_queued_again_after_a_preemption_and_both_slices_are_set_up(cloud):
    # The slices are lost when all four hosts run: one that has not begun would fail in the next attempt.
    lost = "until [ $(ls -d $CLOUD/*.once | wc -l) = 4 ]; do /bin/sleep 0.02; done; "
    lost += f"echo SUSPENDED > $CLOUD/{QUEUE}.q; rm -rf $CLOUD/q-? $CLOUD/tpu-vm.q-?; exit 255"
    cloud.behave(ONCE.format('[ "$HOST" = q-1.1 ] && { ' + lost + "; }; exit 134"))
    cloud.meanwhile(GRANTED)
    request = ["--slices", "2", "--request", "--accelerator-type=v5e-16 --spot"]
    code, errors = cloud.run(*request, name="q", CUT="1")
    assert code == 0, errors
    flags = "--zone z --node-count 2 --node-prefix q --accelerator-type=v5e-16 --spot --async"
    asked = [call for call in cloud.lines("calls") if " create " in call or " delete " in call]
    create = f"compute tpus {QUEUE} create q {flags}"
    assert asked == [create, f"compute tpus {QUEUE} delete q --zone z --force --quiet", create]
    assert "q is WAITING_FOR_RESOURCES" in errors
    for node in ("q-0", "q-1"):
        assert cloud.times("ran", node) == cloud.times("installed", node) == [2, 2]


def test_a_request_that_failed_is_not_repeated(cloud):
    cloud.state(f"{QUEUE}.q", "FAILED")
    code, errors = cloud.run("--request", "--accelerator-type=v5e-16", name="q")
    assert code == 2 and "queued-resources describe q --zone z" in errors


def test_mistakes_are_said_at_once(cloud):
    code, errors = cloud.run(name="b")
    assert code == 2 and "b is not there" in errors
    (cloud.folder / "broken").touch()
    code, errors = cloud.run()
    assert code == 2 and "not logged in" in errors
    assert not cloud.lines("ran.a.0")


@pytest.mark.parametrize("number,code", [(signal.SIGTERM, 75), (signal.SIGINT, 130)])
def test_told_to_stop_the_launcher_ends_the_run_which_saves(cloud, number, code):
    cloud.behave(f"touch $CLOUD/$HOST.ready; {STAYS}")
    process = cloud.start()
    deadline = time.monotonic() + 30
    while not all((cloud.folder / f"a.{host}.ready").exists() for host in (0, 1)):
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.02)
    process.send_signal(number)
    errors = process.communicate(timeout=30)[1]
    assert process.returncode == code, errors
    assert sorted(cloud.lines("saved")) == ["a.0", "a.1"]


def made_with(cloud):
    return [cloud.lines(f"a/{host}/diffusion_t5x_a/made_with") for host in (0, 1)]


@pytest.mark.parametrize("old,found", [([], "python3"), (["python3", "python3.13"], "python3.12")])
def test_the_first_python_that_fits_is_taken(cloud, old, found):
    for name in old:
        cloud.state(f"bin/version.{name}", "old")
    code, errors = cloud.run()
    assert code == 0, errors
    assert made_with(cloud) == [[found]] * 2


def test_where_every_python_is_too_old_uv_brings_one(cloud):
    for name in ("python3", "python3.11", "python3.12", "python3.13"):
        cloud.state(f"bin/version.{name}", "old")
    code, errors = cloud.run()
    assert code == 0, errors
    assert made_with(cloud) == [["uv"]] * 2
    assert cloud.lines("installed.a.0") == [
        "-m pip install -q --upgrade --target uv uv",
        "-m pip install -q -e ./code[tpu]",
    ]
