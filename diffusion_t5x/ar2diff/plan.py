"""The plan of a conversion: what will be trained and what it costs, measured on the step itself."""

import dataclasses
import pathlib
import shutil
from typing import Any, Self

import jax

from diffusion_t5x.ar2diff.command import Command
from diffusion_t5x.ar2diff.data import TrainingData
from diffusion_t5x.ar2diff.recipe import Recipe
from diffusion_t5x.checkpointing.checkpoints import OpenCheckpoint
from diffusion_t5x.errors import UserError
from diffusion_t5x.models.transformer import ModelDefinition
from diffusion_t5x.performance.training_run import TrainingRun, Trial

_SAVE_SECONDS = 600  # between checkpoints, at most
_MEMORY_SHARE = 0.8  # of what is free: XLA's figure leaves out the program itself and what reads the data
_BYTES = 4  # of a parameter, in checkpoints and exports


@dataclasses.dataclass(frozen=True)
class Plan:
    """The work and needs of a conversion. Sizes are in bytes, times in seconds.

    Attributes:
      steps: number of training steps.
      microbatches: pieces in which a step goes through its batch.
      eval_period: steps between checkpoints.
      tokens_per_step: positions of all rows.
      seconds_per_step: measured.
      num_parameters, num_trained: of the model.
      memory, free_memory: bytes needed and free on one device.
      disk, free_disk: bytes needed and free for the output folder.
    """

    steps: int
    microbatches: int
    eval_period: int
    tokens_per_step: int
    seconds_per_step: float
    num_parameters: int
    num_trained: int
    memory: int
    free_memory: int
    disk: int
    free_disk: int

    @classmethod
    def measure(cls, command: Command, recipe: Recipe) -> Self:
        """Compiles the recipe's step, in as many microbatches as it takes to fit, and times it.

        Raises:
          UserError: not even one row at a time fits into memory, or the disk is too small.
        """
        run = recipe.write({"TRAIN_STEPS": 1})
        free_memory = memory_of_device()
        trial, run = _fitting(run, free_memory)
        seconds = trial.seconds_per_step()
        tokens = run.dataset.batch_size * run.dataset.row_length
        wanted = command.tokens / tokens if command.tokens else command.minutes * 60 / seconds
        steps = max(1, round(wanted))
        plan = cls(
            steps=steps,
            microbatches=run.microbatches,
            eval_period=max(1, min(-(-steps // 4), int(_SAVE_SECONDS / seconds) or 1)),
            tokens_per_step=tokens,
            seconds_per_step=seconds,
            num_parameters=ModelDefinition(run.model, run.dataset.token_ids()).num_params(),
            num_trained=run.num_trained(),
            memory=trial.peak_bytes,
            free_memory=free_memory,
            disk=_disk(run),
            free_disk=shutil.disk_usage(command.output).free,
        )
        if plan.disk > plan.free_disk:
            raise UserError(
                f"{command.output} has {_size(plan.free_disk)} free, but this writes about {_size(plan.disk)}. "
                "Make room, or give another --output."
            )
        recipe.write({"TRAIN_STEPS": steps, "EVAL_PERIOD": plan.eval_period, "NUM_MICROBATCHES": plan.microbatches})
        return plan

    def describe(self) -> dict[str, Any]:
        """Its fields."""
        return dataclasses.asdict(self)

    @property
    def tokens(self) -> int:
        """Tokens trained on."""
        return self.steps * self.tokens_per_step

    def lines(
        self, command: Command, recipe: Recipe, run: TrainingRun, data: TrainingData, start: OpenCheckpoint
    ) -> str:
        """The plan for people: a line each."""
        lora = run.lora
        trained = f"{self.num_trained:,} of {self.num_parameters:,} parameters"
        how = f"LoRA of rank {lora.rank} and {', '.join(lora.whole) or 'nothing else'}: " if lora else ""
        epochs = self.tokens / max(1, data.num_tokens * (1 - data.held_out / 100))
        again = f"read {epochs:.1f} times" if epochs > 1 else f"of which {epochs:.0%} is read"
        rows, length = run.dataset.batch_size, run.dataset.row_length
        pieces = f", in {self.microbatches} microbatches" if self.microbatches > 1 else ""
        minutes = self.steps * self.seconds_per_step / 60
        device = f"{jax.device_count()} × {jax.devices()[0].device_kind}"
        told = {
            "model": f"{command.model}, from {start.named}",
            "route": f"{recipe.route}: {type(run.objective).__name__}, {', '.join(map(str, run.objective.modes))}",
            "trained": how + trained,
            "data": f"{data.num_records:,} {data.unit}, about {data.num_tokens:,} tokens, {again}; "
            f"{data.held_out:g} % held out",
            "batch": f"{rows} rows of {length} tokens{pieces}",
            "steps": f"{self.steps:,}: {self.tokens:,} tokens; a checkpoint every {self.eval_period:,} steps",
            "memory": f"{_size(self.memory)} of {_size(self.free_memory)} per device",
            "disk": f"about {_size(self.disk)} of {_size(self.free_disk)}",
            "time": f"about {minutes:.0f} min of training ({self.seconds_per_step:.2g} s per step on {device})",
            "output": f"{command.output}: recipe.gin, train, checkpoint, export, report.html, README.md",
        }
        return "\n".join(f"  {name:<9}{text}" for name, text in told.items())


def memory_of_device() -> int:
    """Bytes that a program may use on a device: an accelerator's limit, or what this machine has free."""
    limit = (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit")
    if limit:
        return int(limit)
    said = dict(line.split(":") for line in pathlib.Path("/proc/meminfo").read_text().splitlines())
    return int(said["MemAvailable"].split()[0]) * 1024


def _fitting(run: TrainingRun, free: int) -> tuple[Trial, TrainingRun]:
    """The step in the fewest microbatches that fit into memory; as given, where it already has several."""
    rows = run.dataset.batch_size
    pieces = [n for n in range(run.microbatches, rows + 1) if rows % n == 0]
    for number in pieces if run.microbatches == 1 else pieces[:1]:
        tried = dataclasses.replace(run, microbatches=number)
        trial = Trial(tried)
        if trial.peak_bytes <= _MEMORY_SHARE * free:
            return trial, tried
    raise UserError(
        f"A step takes {_size(trial.peak_bytes)} of memory, and {_size(_MEMORY_SHARE * free)} may be used: set fewer "
        'tokens, such as --gin.TASK_FEATURE_LENGTHS=\'{"inputs": 64, "targets": 64}\', or a smaller --gin.LORA_RANK.'
    )


def _disk(run: TrainingRun) -> int:
    """Bytes of two checkpoints of training (one is written while another is there), the exported one and the export."""
    state = run.state(run.mesh.make())
    whole = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))
    return 2 * whole + 2 * _BYTES * run.definition().num_params()


def _size(number: float) -> str:
    return f"{number / 2**30:.1f} GiB" if number >= 2**30 else f"{number / 2**20:.0f} MiB"
