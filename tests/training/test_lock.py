"""One training process at a time in a MODEL_DIR, whatever becomes of it."""

import fcntl
import shutil
import subprocess
import sys

import pytest

from diffusion_t5x.errors import UserError
from diffusion_t5x.training.lock import FILE, locked

HOLDER = """
import sys
from diffusion_t5x.training.lock import locked
with locked(sys.argv[1]):
    print("locked", flush=True)
    sys.stdin.read()
"""


def test_a_second_process_is_told_who_is_there_and_a_killed_one_does_not_block(tmp_path):
    command = [sys.executable, "-c", HOLDER, str(tmp_path / "run")]
    holder = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout.readline() == "locked\n"
        for _ in range(2):  # the message leaves the lock as it is
            who = rf"run is in use by process {holder.pid} on \S+ since \d{{4}}-"
            with pytest.raises(UserError, match=who), locked(str(tmp_path / "run")):
                pytest.fail("two in one folder")
        with locked(str(tmp_path / "another")):
            pass
    finally:
        holder.kill()
        holder.communicate()
    assert f"process {holder.pid}" in (tmp_path / "run" / FILE).read_text()  # left behind, and of no consequence
    with locked(str(tmp_path / "run")):
        assert f"process {holder.pid}" not in (tmp_path / "run" / FILE).read_text()


def test_it_is_given_back_after_an_error(tmp_path):
    with pytest.raises(ZeroDivisionError), locked(str(tmp_path)):
        1 / 0  # noqa: B018
    with locked(str(tmp_path)):
        pass


def test_a_file_system_without_locks_is_said(tmp_path, monkeypatch, caplog):
    def refuse(file, operation):
        raise OSError(37, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with locked(str(tmp_path)):
        assert "cannot be locked" in caplog.text


@pytest.mark.parametrize("directory", ["/dev/null/model", "/proc/model"])
def test_a_folder_that_cannot_be_written(directory):
    with pytest.raises(UserError, match=f"Cannot write to {directory}"), locked(directory):
        pass


@pytest.mark.parametrize("remove", [shutil.rmtree, lambda path: path.rename(path.with_name("elsewhere"))])
def test_a_folder_that_is_removed_is_noticed(tmp_path, remove):
    folder = tmp_path / "model"
    with locked(str(folder)) as check_folder:
        check_folder()
        (folder / "config.gin").write_text("")
        (folder / FILE).unlink()  # somebody took it for a left-over
        check_folder()
        remove(folder)
        with pytest.raises(UserError, match=f"{folder} was removed or renamed while the run was writing to it"):
            check_folder()
    with pytest.raises(UserError, match="was removed or renamed"), locked(str(folder)):
        remove(folder) if remove is shutil.rmtree else shutil.rmtree(folder)
        raise FileNotFoundError("checkpoints/checkpoint_3")  # what a background save says of it
    with pytest.raises(KeyError), locked(str(folder)):
        raise KeyError("something else")
