"""`launch/setup_env.sh` with a uv that notes what it is asked to install."""

import concurrent.futures
import shutil
import sys

import pytest
from stand_ins import LAUNCH, environment, program, run

FILES = ("setup.py", "pyproject.toml", "requirements.lock")


@pytest.fixture
def checkout(tmp_path):
    """A checkout, and an environment that is no link to it yet."""
    folder = tmp_path / "mine"
    (folder / "launch").mkdir(parents=True)
    for name in FILES:
        (folder / name).touch()
    shutil.copy(LAUNCH / "setup_env.sh", folder / "launch")
    program(folder / "launch/any.sh", 'set -euo pipefail\nsource "$(dirname "${BASH_SOURCE[0]}")/setup_env.sh"\n')
    program(tmp_path / "bin/uv", f'[ "$1" = --version ] || echo "$*" >> {tmp_path}/installed\n')
    (tmp_path / "venv/bin").mkdir(parents=True)
    (tmp_path / "venv/bin/python").symlink_to(sys.executable)
    return folder


def set_up(checkout):
    folder = checkout.parent
    given = environment(folder / "bin", DIFFUSION_T5X_VENV=f"{folder}/venv/", PYTHON="")
    return run(checkout / "launch/any.sh", env=given), (folder / "installed").exists()


@pytest.mark.parametrize("note", [".ready", ".unfinished"])
def test_an_environment_of_another_checkout_is_left_alone(checkout, note):
    other = checkout.parent / "other"
    other.mkdir()
    text = {".ready": f"1 2\n{other}\n3.11\n", ".unfinished": f"{other}\n"}[note]
    (checkout.parent / "venv" / note).write_text(text)
    process, installed = set_up(checkout)
    assert process.returncode == 2 and not installed
    assert f"belongs to the checkout {other}" in process.stderr and "DIFFUSION_T5X_VENV=" in process.stderr
    assert (checkout.parent / "venv" / note).read_text() == text


def test_an_environment_of_a_checkout_that_is_gone_is_installed_anew(checkout):
    (checkout.parent / "venv/.ready").write_text(f"1 2\n{checkout.parent}/moved\n3.11\n")
    process, installed = set_up(checkout)
    assert process.returncode == 0 and installed, process.stderr
    assert (checkout.parent / "venv/.ready").read_text().splitlines()[1] == str(checkout)


def test_it_is_installed_once(checkout):
    assert set_up(checkout)[1]
    (checkout.parent / "installed").unlink()
    process, installed = set_up(checkout)
    assert process.returncode == 0 and not installed and "is ready" in process.stderr
    (checkout / "requirements.lock").write_text("changed\n")
    assert set_up(checkout)[1]


@pytest.mark.skipif(shutil.which("flock") is None, reason="flock is not installed")
def test_of_two_commands_that_start_together_one_installs(checkout):
    uv = f'[ "$1" = --version ] && exit; sleep 0.3; echo "$*" >> {checkout.parent}/installed\n'
    program(checkout.parent / "bin/uv", uv)
    with concurrent.futures.ThreadPoolExecutor() as threads:
        both = [each.result()[0] for each in [threads.submit(set_up, checkout) for _ in range(2)]]
    assert [process.returncode for process in both] == [0, 0]
    assert len((checkout.parent / "installed").read_text().splitlines()) == 2  # the lock's packages, and the checkout
    assert sorted("is ready" in process.stderr for process in both) == [False, True]


@pytest.mark.skipif(shutil.which("flock") is None, reason="flock is not installed")
def test_of_two_checkouts_that_start_together_one_gets_the_environment(checkout):
    other = shutil.copytree(checkout, checkout.parent / "other")
    uv = f'[ "$1" = --version ] && exit; sleep 0.3; echo "$*" >> {checkout.parent}/installed\n'
    program(checkout.parent / "bin/uv", uv)
    with concurrent.futures.ThreadPoolExecutor() as threads:
        both = [each.result()[0] for each in [threads.submit(set_up, folder) for folder in (checkout, other)]]
    assert sorted(process.returncode for process in both) == [0, 2]
    assert any("belongs to the checkout" in process.stderr for process in both)
    assert len((checkout.parent / "installed").read_text().splitlines()) == 2


def test_where_the_file_system_has_no_locks_it_installs_and_says_so(checkout):
    program(checkout.parent / "bin/flock", "exit 1\n")
    process, installed = set_up(checkout)
    assert process.returncode == 0 and installed and "cannot lock" in process.stderr
