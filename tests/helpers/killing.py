"""Training runs as real processes, ways to kill them at chosen moments of their life, and what they leave behind."""

import dataclasses
import json
import os
import pathlib
import random
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence

import jax
import numpy as np
from etils import epath

from diffusion_t5x.checkpointing import checkpoints, manifest, stored

PHASES = ("start", "restore", "step", "save", "evaluation")
SAVE, EVAL = 5, 10  # steps between two
_PATIENCE = 180  # seconds, for what comes soon on an idle machine


TINY = ("num_layers=1", "embed_dim=16", "num_heads=2", "head_dim=8", "mlp_dim=16")
OF_TIME = {"tokens_per_second", "seconds_per_step", "decode_seconds", "reward_seconds", "reward_wait_seconds"}


def command(verb: str, files: Sequence[str], settings: Mapping[str, object]) -> list[str]:
    """A command line of gin files and macros."""
    flags = [f"--gin_file={file}.gin" for file in files]
    return [sys.executable, "-m", f"diffusion_t5x.{verb}", *flags, *(f"--gin.{k}={v}" for k, v in settings.items())]


def from_cache(cache: pathlib.Path, model_dir: pathlib.Path, steps: int) -> list[str]:
    """Trains a tiny model on cached data: no TensorFlow is loaded, and a start takes seconds."""
    files = ("models/decoder_only", "sizes/tiny", "hardware/cpu", "objectives/sundae", "runs/pretrain")
    settings = {
        "MODEL_DIR": model_dir,
        "CACHE_DIR": cache,
        "MIXTURE_OR_TASK_NAME": "quickstart_pairs",
        "TASK_FEATURE_LENGTHS": '{"inputs": 24, "targets": 24}',
        "TRAIN_STEPS": steps,
        "BATCH_SIZE": 4,
        "EVAL_STEPS": 4,
        "EVAL_PERIOD": EVAL,
        "Periods.log": 1,
        "Periods.save": SAVE,
    }
    flags = [f"--gin.ModelConfig.{size}" for size in TINY]
    return command("train", (*files, "data/cached_pretrain"), settings) + flags


def write_cache(folder: pathlib.Path, task: str) -> None:
    """Caches what a task of the quickstart trains on."""
    files = ("tasks/quickstart", "runs/cache_tasks")
    settings = {
        "CACHE_DIR": folder,
        "MIXTURE_OR_TASK_NAME": task,
        "SPLITS": '("train", "validation")',
        "TASK_FEATURE_LENGTHS": '{"inputs": 24, "targets": 24}',
    }
    subprocess.run(command("cache_tasks", files, settings), check=True, timeout=600, env=environment())


def environment() -> dict[str, str]:
    """Environment variables of a process that imports what this one does."""
    return os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}


def arrays(model_dir: pathlib.Path) -> dict[str, np.ndarray]:
    """All of the newest checkpoint: parameters, optimizer state, step."""
    checkpoint = checkpoints.find_checkpoint(str(model_dir))
    targets = {name: jax.ShapeDtypeStruct(x.shape, x.dtype) for name, x in stored.leaves(checkpoint).items()}
    return stored.read_arrays(checkpoint, targets, {name: name for name in targets})


def metrics(model_dir: pathlib.Path) -> dict[str, list[dict]]:
    """All that was written but for times."""
    found = {}
    for path in sorted(model_dir.glob("*/**/metrics.jsonl")):
        kind = path.relative_to(model_dir).parent.as_posix()
        if kind != "goodput":
            lines = map(json.loads, path.read_text().splitlines())
            found[kind] = [{name: x for name, x in line.items() if name not in OF_TIME} for line in lines]
    return found


def check_same(killed: pathlib.Path, undisturbed: pathlib.Path, steps: int) -> None:
    """Asserts that a run ended bit for bit as one that nobody disturbed, and left whole checkpoints only."""
    expected, found = arrays(undisturbed), arrays(killed)
    assert found.keys() == expected.keys() and "step" in found
    for name, value in expected.items():
        np.testing.assert_array_equal(found[name], value, err_msg=name)
    assert metrics(killed) == metrics(undisturbed)
    assert len(metrics(killed)["train"]) == steps
    for path in (killed / "checkpoints").iterdir():
        assert path.name.startswith("checkpoint_"), path  # nothing half-written is left
        assert manifest.faults(epath.Path(path)) == []


@dataclasses.dataclass
class Run:
    """A run that is killed and started again until it is through.

    Attributes:
      command: of each of its processes.
      model_dir: its folder.
      log: gets what they print.
      draw: decides when.
      seconds_to_restore: how long a process took from its start to where it went on, the last time that was seen.
    """

    command: list[str]
    model_dir: pathlib.Path
    log: pathlib.Path
    draw: random.Random
    seconds_to_restore: float = 6.0

    def finish(self) -> None:
        """Lets a process go to its end."""
        with self.log.open("ab") as log:
            subprocess.run(self.command, stdout=log, stderr=log, check=True, timeout=600, env=environment())

    def kill(self, phase: str) -> str | None:
        """Starts a process and kills it (SIGKILL) in this phase; what it was seen at, or None where it had ended."""
        with self.log.open("ab") as log:
            start, printed = time.monotonic(), log.tell()
            process = subprocess.Popen(self.command, stdout=log, stderr=log, env=environment())
            try:
                getattr(self, f"_wait_to_{phase}")(process, start, printed)
                ended = process.poll() is not None
                found = None if ended else self._seen(printed)
            finally:
                process.send_signal(signal.SIGKILL)
                process.wait()
        if ended and process.returncode != 0:
            raise AssertionError(f"exit code {process.returncode}: {self.log.read_text()[printed:][-3000:]}")
        return found

    def _seen(self, printed: int) -> str:
        if not self._is_training(printed):
            return "start or restore"
        steps = self._steps()
        if steps and steps % EVAL == 0 and not self._evaluated(steps):  # a save goes on in the background
            return "evaluation"
        return "save" if self._saving() else "step"

    def _wait_to_start(self, process: subprocess.Popen, start: float, printed: int) -> None:
        time.sleep(self.draw.uniform(0, self.seconds_to_restore / 2))

    def _wait_to_restore(self, process: subprocess.Popen, start: float, printed: int) -> None:
        time.sleep(self.draw.uniform(self.seconds_to_restore / 2, self.seconds_to_restore))

    def _wait_to_step(self, process: subprocess.Popen, start: float, printed: int) -> None:
        self._until(process, lambda: self._is_training(printed))
        self.seconds_to_restore = time.monotonic() - start
        goal = self._steps() + self.draw.randint(1, 25)
        self._until(process, lambda: self._steps() >= goal)
        time.sleep(self.draw.uniform(0, 0.05))

    def _wait_to_save(self, process: subprocess.Popen, start: float, printed: int) -> None:
        self._wait_to_step(process, start, printed)
        self._until(process, self._saving)
        time.sleep(self.draw.uniform(0, 0.1))

    def _wait_to_evaluation(self, process: subprocess.Popen, start: float, printed: int) -> None:
        self._until(process, lambda: self._is_training(printed))
        now = self._steps()
        self._until(process, lambda: self._steps() > now and self._steps() % EVAL == 0)
        time.sleep(self.draw.uniform(0, 0.1))

    def _until(self, process: subprocess.Popen, reached) -> None:
        deadline = time.monotonic() + _PATIENCE
        while process.poll() is None and not reached():
            if time.monotonic() > deadline:
                raise AssertionError(f"nothing came in {_PATIENCE} s: {self.log.read_text()[-3000:]}")
            time.sleep(0.001)

    def _is_training(self, printed: int) -> bool:
        with self.log.open("rb") as log:
            log.seek(printed)
            return b" at step " in log.read()

    def _steps(self) -> int:
        path = self.model_dir / "train" / "metrics.jsonl"
        lines = path.read_bytes().rstrip(b"\n").rsplit(b"\n", 1) if path.exists() else []
        try:
            return json.loads(lines[-1])["step"]
        except (IndexError, ValueError):
            return 0

    def _evaluated(self, step: int) -> bool:
        written = self.model_dir.glob("*_eval/**/metrics.jsonl")
        return any(f'"step": {step}, ' in path.read_text() for path in written)

    def _saving(self) -> bool:
        folder = self.model_dir / "checkpoints"
        return folder.is_dir() and any("tmp" in path.name for path in folder.iterdir())
