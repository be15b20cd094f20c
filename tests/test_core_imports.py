"""The core runs where TensorFlow, SeqIO, t5 and gin are not installed."""

import subprocess
import sys

PROGRAM = """
import importlib, pkgutil, sys

class NotInstalled:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("tensorflow", "tensorflow_datasets", "tensorflow_text", "seqio", "t5", "gin"):
            raise ModuleNotFoundError(f"{name} is not installed here")

sys.meta_path.insert(0, NotInstalled())
data = "batch cached_source rows seqio_source vocabularies vocabulary_files"
names = [f"diffusion_t5x.data.{name}" for name in data.split()]
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
