"""The core runs where TensorFlow, SeqIO, t5 and gin are not installed."""

import importlib
import importlib.util
import pathlib
import re
import subprocess
import sys

import pytest

import diffusion_t5x
from diffusion_t5x import former_names

PROGRAM = """
import importlib, pkgutil, sys

class NotInstalled:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("tensorflow", "tensorflow_datasets", "tensorflow_text", "seqio", "t5", "gin"):
            raise ModuleNotFoundError(f"{name} is not installed here")

sys.meta_path.insert(0, NotInstalled())
names = [f"diffusion_t5x.data.{name}" for name in ("batch", "cached_source", "rows", "seqio_source", "vocabularies")]
rooms = "models objectives decoding checkpointing training evaluation importing performance reporting"
for room in rooms.split():
    package = importlib.import_module(f"diffusion_t5x.{room}")
    names += [f"diffusion_t5x.{room}.{module.name}" for module in pkgutil.iter_modules(package.__path__)]
for name in names:
    importlib.import_module(name)
print(len(names))
try:
    import tensorflow
except ModuleNotFoundError:
    print("blocked")
"""


def test_every_room_of_the_core_is_imported_without_them():
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    number, blocked = done.stdout.split()
    assert int(number) > 25 and blocked == "blocked"


@pytest.mark.parametrize(
    ("room", "above"),
    [
        ("data", ("models", "objectives", "decoding", "training", "evaluation")),
        ("models", ("objectives", "decoding", "training", "evaluation")),
        ("objectives", ("decoding", "training", "evaluation")),
        ("decoding", ("objectives", "training", "evaluation")),
    ],
)
def test_no_room_imports_one_above_it_or_beside_it(room, above):
    package = pathlib.Path(diffusion_t5x.__file__).parent
    imports = re.compile(rf"^\s*(?:from|import) diffusion_t5x\.(?:{'|'.join(above)})\b", re.MULTILINE)
    files = sorted((package / room).rglob("*.py"))
    assert files and [file.name for file in files if imports.search(file.read_text(encoding="utf-8"))] == []


@pytest.mark.parametrize(
    ("former", "present"),
    [
        ("config", "command_line.config"),
        ("conversion.from_hf", "importing.from_hf"),
        ("evaluation.conversation", "chat.conversation"),
        ("evaluation.sandbox.wire", "evaluation.code.sandbox.wire"),
        ("evaluation.pass_at_k", "evaluation.code.pass_at_k"),
        ("scale.topology", "performance.topology"),
        ("training.checkpoints", "checkpointing.checkpoints"),
        ("training.progress", "progress"),
        ("training.flops", "performance.step_flops"),
    ],
)
def test_a_former_name_imports_the_module(former, present):
    found = importlib.import_module(f"diffusion_t5x.{former}")
    assert found is importlib.import_module(f"diffusion_t5x.{present}")
    assert found.__name__ == found.__spec__.name == f"diffusion_t5x.{present}"


def test_every_former_name_leads_somewhere():
    for name in former_names._MOVED:
        assert importlib.util.find_spec(former_names.present_name(f"diffusion_t5x.{name}")), name
    assert former_names.present_name("diffusion_t5x.train") is former_names.present_name("config") is None
