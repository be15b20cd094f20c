"""A toy verb with gin files of its own, in a folder."""

import subprocess
import sys

from diffusion_t5x.command_line import config

MODELS = """
import dataclasses

@dataclasses.dataclass(frozen=True)
class Model:
    width: int
    depth: int = 2
    layers: list = dataclasses.field(default_factory=list)

@dataclasses.dataclass(frozen=True)
class Sundae:
    model: Model
    num_unrolls: int = 1

def warmup(steps, peak=1.0):
    return steps * peak
"""


TRAIN = '''
"""Trains a toy."""
import logging
import os
import sys

from diffusion_t5x.command_line import config, gin_messages, gin_reading
from diffusion_t5x.errors import UserError

def train(*, model_dir, objective, train_steps: int = 10, schedule=None, task="books", dry_run: bool = False):
    """What the verb does."""
    print(f"{model_dir=} {objective=} {train_steps=} {task=} {dry_run=}")
    if schedule:
        print("schedule", schedule(steps=3))
    if task == "missing":
        raise UserError("there is no task 'missing'")
    if task == "bug":
        raise ZeroDivisionError("a bug")
    if task == "log":
        logging.getLogger("diffusion_t5x.training").info("resuming")
        logging.getLogger("other").info("chatter")
        print(os.environ["TF_CPP_MIN_LOG_LEVEL"], os.environ["TFDS_DATA_DIR"])
        print([module for module in ("jax", "tensorflow") if module in sys.modules])
    if task == "text":
        print(config.operative_text())

if __name__ == "__main__":
    config.run(train)
'''


BASE_GIN = """\
from __gin__ import dynamic_registration
from toy_verbs import models
from toy_verbs import train

MODEL_DIR = %gin.REQUIRED
TRAIN_STEPS = 100
WIDTH = %gin.REQUIRED
MODEL = @models.Model()

train.train:
  model_dir = %MODEL_DIR
  objective = @models.Sundae()
  train_steps = %TRAIN_STEPS
models.Sundae.model = %MODEL
models.Model.width = %WIDTH
"""


SET = ["--gin.MODEL_DIR=/tmp/m", "--gin.WIDTH=8"]


def registered(package):
    """Takes out of gin's registry and returns everything of a package."""
    registry = config.gin_config._REGISTRY
    return {name: registry.pop(name) for name, _ in list(registry.items()) if name.startswith(package)}


def verb(folder, *arguments, cwd=None):
    """Runs the toy verb in a process of its own."""
    command = [sys.executable, "-m", "toy_verbs.train", *map(str, arguments)]
    environment = {"PATH": "/usr/bin:/bin", "PYTHONPATH": f"{folder}:{config.PACKAGE.parent}"}
    return subprocess.run(command, cwd=cwd or folder, env=environment, capture_output=True, text=True, timeout=60)


def error_of(folder, *arguments):
    """The one line that a mistake prints: no traceback, nothing done, status 2."""
    result = verb(folder, *arguments)
    assert result.returncode == 2, result.stderr
    assert result.stdout == ""
    assert result.stderr.startswith("error: ") and "Traceback" not in result.stderr
    assert "In call to configurable" not in result.stderr
    return result.stderr.removeprefix("error: ").strip()
