"""Old names of modules still import what has moved, and say where it is now."""

import importlib
import subprocess
import sys

import pytest

from diffusion_t5x import moved


@pytest.mark.parametrize("old", [*moved._MOVED, "conversion.from_hf", "conversion.families", "scale.roofline"])
def test_an_old_name_is_the_module_that_moved(old):
    name = f"diffusion_t5x.{old}"
    sys.modules.pop(name, None)
    now = importlib.import_module(moved.new_name(name))
    with pytest.warns(DeprecationWarning, match=f"^{name} is now {now.__name__}.$"):
        found = importlib.import_module(name)
    assert found is now and found.__name__ == moved.new_name(name)


def test_statements_of_old_programs():
    program = (
        "from diffusion_t5x import config, flags\n"
        "from diffusion_t5x.conversion.from_hf import from_hf\n"
        "from diffusion_t5x.evaluation.conversation import Plain\n"
        "from diffusion_t5x.training import checkpoints, loop\n"
        "import diffusion_t5x.scale.roofline\n"
        "print(config.run.__module__, from_hf.__module__, Plain.__module__, checkpoints.__name__)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=100)
    names = ["command_line.config", "importing.from_hf", "chat.conversation", "checkpointing.checkpoints"]
    assert done.stdout.split() == [f"diffusion_t5x.{name}" for name in names], done.stderr


@pytest.mark.parametrize("name", ["conversion.nothing", "evaluation.nothing", "nothing"])
def test_what_never_was_is_not_there(name):
    with pytest.raises(ModuleNotFoundError, match="No module named"):
        importlib.import_module(f"diffusion_t5x.{name}")
