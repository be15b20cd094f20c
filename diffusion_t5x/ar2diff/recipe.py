"""The recipe of a conversion, an ordinary gin file: what `diffusion-t5x train --gin_file=DIR/recipe.gin` trains."""

import pathlib
from collections.abc import Mapping
from typing import Any

import jax

from diffusion_t5x import records
from diffusion_t5x.ar2diff.command import Command, routes
from diffusion_t5x.ar2diff.data import TrainingData
from diffusion_t5x.checkpointing.checkpoints import OpenCheckpoint
from diffusion_t5x.command_line import bindings, config
from diffusion_t5x.command_line.recorded import gin_text
from diffusion_t5x.performance.training_run import TrainingRun
from diffusion_t5x.train import train

# By device: rows of a step, and how many held-out batches a loss takes.
_CPU = {"BATCH_SIZE": 4, "EVAL_STEPS": 4}
_ACCELERATOR = {"BATCH_SIZE": 32, "EVAL_STEPS": 8}
_DEFAULT_ROUTE = {"decoder_only": "shifted", "encoder_decoder": "sundae"}


def on_cpu() -> bool:
    """True without an accelerator."""
    return jax.default_backend() == "cpu"


class Recipe:
    """Writes and reads the gin file. Without a vocabulary file, texts are read as bytes."""

    def __init__(self, command: Command, start: OpenCheckpoint, vocabulary_file: str | None, data: TrainingData):
        self.path = command.output / "recipe.gin"
        self.route = command.route or _DEFAULT_ROUTE[start.record.model.get("architecture", "decoder_only")]
        self._command, self._start, self._vocabulary_file, self._data = command, start, vocabulary_file, data

    def write(self, settings: Mapping[str, Any]) -> TrainingRun:
        """Writes the file, with these macros and those that the command and the device decide.

        Returns:
          The run that it describes.

        Raises:
          UserError: the recipe is no valid one.
        """
        records.write_text(self.path, self._text(settings, ""))
        config.load([str(self.path)], self._command.bindings)
        records.write_text(self.path, self._text(settings, bindings.as_text(self._command.bindings)))
        return self.read()

    def read(self) -> TrainingRun:
        """The run that the file describes; its task is registered."""
        reader = _Reader()
        self.run_train(reader)
        return reader.run

    def run_train(self, dry_run: Any = None) -> None:
        """Runs `train` with the file."""
        config.run(train, [f"--gin_file={self.path}"], dry_run=dry_run)

    def _text(self, settings: Mapping[str, Any], overrides: str) -> str:
        model = self._model()
        files = [routes()[self.route], self._data.gin_file, f"hardware/{'cpu' if on_cpu() else 'accelerator'}.gin"]
        macros = {
            "MODEL_DIR": str(self._command.output / "train"),
            "INITIAL_CHECKPOINT_PATH": self._start.named,
            "VOCABULARY_FILE": self._vocabulary_file,
            "FILES": {"train": list(self._data.files)},
            "HELD_OUT": {"validation": self._data.held_out},
            "TASK_FEATURE_LENGTHS": self._lengths(),
            **(_CPU if on_cpu() else _ACCELERATOR),
            **settings,
        }
        return "\n".join(
            [
                f"# {self._command.model} by route {self.route}: written by diffusion-t5x ar2diff. To train only:",
                f"# diffusion-t5x train --gin_file={self.path}",
                "from __gin__ import dynamic_registration",
                "",
                *(f'include "{file}"' for file in [model, *files]),
                "",
                *(f"{name} = {value!r}" for name, value in macros.items()),
                overrides,
            ]
        )

    def _lengths(self) -> dict[str, int]:
        row, inputs = (128, 32) if on_cpu() else (512, 64)  # a text needs only a short beginning
        # Prompts, and what an encoder reads, take half of a row.
        if self._command.kind != "data" or self.route == _DEFAULT_ROUTE["encoder_decoder"]:
            inputs = row // 2
        return {"inputs": inputs, "targets": row - inputs}

    def _model(self) -> str:
        """A gin file of the model: an import's own, or one made from the checkpoint's record."""
        own = pathlib.Path(self._start.model_dir, "model.gin")
        if own.exists():
            return str(own)
        path = self._command.output / "model.gin"
        records.write_text(path, gin_text(self._start, with_task=False) + "\n")
        return str(path)


class _Reader:
    """Takes the run from `train`."""

    def train(self, run: TrainingRun) -> None:
        self.run = run
