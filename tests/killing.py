"""A training run as a real process, and ways to kill it at chosen moments of its life."""

import dataclasses
import json
import os
import pathlib
import random
import signal
import subprocess
import sys
import time

PHASES = ("start", "restore", "step", "save", "evaluation")
SAVE, EVAL = 5, 10  # steps between two
_PATIENCE = 180  # seconds, for what comes soon on an idle machine


def command(cache: pathlib.Path, model_dir: pathlib.Path, steps: int) -> list[str]:
    """A tiny model on cached data: no TensorFlow is loaded, and a start takes seconds."""
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
        "ModelConfig.num_layers": 1,
        "ModelConfig.embed_dim": 16,
        "ModelConfig.num_heads": 2,
        "ModelConfig.head_dim": 8,
        "ModelConfig.mlp_dim": 16,
    }
    flags = [f"--gin_file={file}.gin" for file in (*files, "data/cached_pretrain")]
    return [sys.executable, "-m", "diffusion_t5x.train", *flags, *(f"--gin.{k}={v}" for k, v in settings.items())]


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
            subprocess.run(self.command, stdout=log, stderr=log, check=True, timeout=600, env=self._environment())

    def kill(self, phase: str) -> str | None:
        """Starts a process and kills it (SIGKILL) in this phase; what it was seen at, or None where it had ended."""
        with self.log.open("ab") as log:
            start, printed = time.monotonic(), log.tell()
            process = subprocess.Popen(self.command, stdout=log, stderr=log, env=self._environment())
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

    def _environment(self) -> dict[str, str]:
        return os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}

    def _seen(self, printed: int) -> str:
        if not self._is_training(printed):
            return "start or restore"
        if self._saving():
            return "save"
        steps = self._steps()
        return "evaluation" if steps and steps % EVAL == 0 else "step"

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

    def _saving(self) -> bool:
        folder = self.model_dir / "checkpoints"
        return folder.is_dir() and any("tmp" in path.name for path in folder.iterdir())
