"""A conversion is there as a whole or not at all, and one that was killed can be run again."""

import os
import signal
import stat
import subprocess
import sys

import numpy as np
import pytest

from diffusion_t5x.errors import UserError
from diffusion_t5x.importing import output
from diffusion_t5x.importing.huggingface import Folder, Tensor
from diffusion_t5x.importing.to_hf import _Files

_KILLED = """
import os, pathlib, signal, sys
from diffusion_t5x.importing import output
with output.building(output.empty_folder(sys.argv[1])) as folder:
    (folder / "checkpoints").mkdir()
    (folder / "model.gin").write_text("half")
    os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize("exists", [False, True])
def test_a_killed_conversion_leaves_nothing_that_looks_whole_and_can_be_run_again(tmp_path, exists):
    final = tmp_path / "imported [ü]"
    if exists:
        final.mkdir(mode=0o711)
    killed = subprocess.run([sys.executable, "-c", _KILLED, str(final)])
    assert killed.returncode == -signal.SIGKILL
    assert final.exists() == exists
    assert not exists or [path.name for path in final.iterdir()] == [".unfinished"]
    with output.building(output.empty_folder(str(final))) as folder:
        assert not (folder / "model.gin").exists()
        (folder / "checkpoints").mkdir()
        (folder / "model.gin").write_text("whole")
    assert {path.name for path in final.iterdir()} == {"checkpoints", "model.gin"}
    assert list(tmp_path.iterdir()) == [final]
    assert not exists or stat.S_IMODE(final.stat().st_mode) == 0o711  # the folder is the same one
    with pytest.raises(UserError, match="is not empty"):
        output.empty_folder(str(final))


@pytest.mark.parametrize("exists", [False, True])
def test_a_conversion_that_fails_leaves_nothing(tmp_path, exists):
    final = tmp_path / "out"
    if exists:
        final.mkdir()
    with pytest.raises(KeyError), output.building(final) as folder:
        (folder / "model.gin").write_text("half")
        raise KeyError
    assert final.exists() == exists and not list(tmp_path.rglob("model.gin"))


@pytest.mark.parametrize("umask,mode", [(0o022, 0o644), (0o077, 0o600)])
def test_weights_have_the_permissions_of_any_new_file(tmp_path, umask, mode):
    before = os.umask(umask)
    try:
        files = _Files(tmp_path, Folder(tmp_path, {}, {"a": Tensor("", "F32", (2,))}))
        files.add("a", np.ones(2, np.float32))
        files.close()
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "model.safetensors").stat().st_mode) == mode
