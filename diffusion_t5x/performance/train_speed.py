"""Training speed on random batches: no task, no checkpoint, no TensorFlow."""

import dataclasses
import pathlib
import statistics
import time
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
import optax
import rich.box
import rich.markup
import rich.table
from jax.sharding import Mesh

from diffusion_t5x import partitioning, records
from diffusion_t5x.errors import UserError
from diffusion_t5x.models.config import ModelConfig
from diffusion_t5x.models.transformer import ModelDefinition
from diffusion_t5x.objectives.objective import Objective
from diffusion_t5x.performance import stopwatch
from diffusion_t5x.performance.step_flops import step_flops
from diffusion_t5x.performance.topology import CHIPS
from diffusion_t5x.training.state import abstract_state, init_state
from diffusion_t5x.training.step import make_train_step

FILE = "train_speed.json"

# FLOP/s of dense bfloat16 matrix products by what JAX calls a device. NVIDIA's data sheets: A100, H100 SXM, H200 SXM.
PEAK_FLOPS = {
    "TPU v4": CHIPS["v4"].flops,
    "TPU v5 lite": CHIPS["v5e"].flops,
    "TPU v5": CHIPS["v5p"].flops,
    "TPU v5p": CHIPS["v5p"].flops,
    "TPU v6 lite": CHIPS["v6e"].flops,
    "NVIDIA A100-SXM4-40GB": 312e12,
    "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA H100 80GB HBM3": 989.4e12,
    "NVIDIA H200": 989.4e12,
}


@dataclasses.dataclass(frozen=True)
class Case:
    """The training setup to measure.

    Attributes:
      model: the model's dimensions.
      objective: the training objective; it must not need a teacher.
      batch_size: number of rows in a step, over all devices.
      num_microbatches: number of pieces in which a step processes them.
    """

    model: ModelConfig
    objective: Objective
    batch_size: int
    num_microbatches: int = 1

    def check(self, label: str, mesh: Mesh, input_length: int, length: int) -> None:
        """Raises a UserError if the case cannot be trained."""
        if self.objective.needs_teacher:
            name = type(self.objective).__name__
            raise UserError(f"{label}: {name} needs a teacher. Measure Block instead.")
        if self.num_microbatches < 1 or self.batch_size % self.num_microbatches:
            raise UserError(
                f"benchmark.train, {label}: {self.batch_size} rows cannot be split into {self.num_microbatches} "
                "num_microbatches."
            )
        row = length if self.model.architecture == "encoder_decoder" else input_length + length
        self.model.check_length(row, "benchmark.train.target_length")
        partitioning.check_batch(mesh, self.batch_size // self.num_microbatches, row)


class StepWatch:
    """A training step, compiled for random rows and run once.

    Attributes:
      compile_seconds: seconds of tracing and compilation.
      peak_bytes: memory of each device as planned by XLA: state, batch and intermediate values.
      tokens: number of tokens in a step, over all devices.
      flops: FLOPs of a step, over all devices; see `performance.step_flops`.

    Raises:
      OutOfMemory: on the device or, if that is the CPU, in the machine.
    """

    def __init__(
        self,
        mesh: Mesh,
        case: Case,
        optimizer: optax.GradientTransformation,
        vocabulary_size: int,
        input_length: int,
        length: int,
        seed: int,
    ):
        self._mesh, self._seed = mesh, np.uint32(seed % 2**32)
        definition = ModelDefinition(case.model, stopwatch.endless_vocabulary(vocabulary_size))
        batch = stopwatch.random_batch(definition, case.batch_size, input_length, length, seed)
        targets = np.random.default_rng(seed + 1).integers(0, vocabulary_size - 1, batch.tokens.shape, np.int32)
        batch = batch.replace(tokens=np.where(batch.target_mask, targets, batch.tokens))
        abstract = abstract_state(mesh, definition, optimizer, False)
        step = make_train_step(
            mesh, abstract, definition, case.objective, optimizer, seed=seed, microbatches=case.num_microbatches
        )
        with jax.set_mesh(mesh), stopwatch.noticing_memory():
            self._batch = partitioning.put_batch(mesh, batch)
            start = time.monotonic()
            self._step = step.lower(abstract, self._batch).compile()
            self.compile_seconds = time.monotonic() - start
            self.peak_bytes = stopwatch.peak_bytes(self._step)
            self._state = init_state(abstract, definition, optimizer, seed)
        is_encoder_decoder = case.model.architecture == "encoder_decoder"
        self.tokens = case.batch_size * (input_length + length)
        self.flops = step_flops(
            definition.config,
            case.objective,
            case.batch_size,
            batch.tokens.shape[1],
            encoder_length=input_length if is_encoder_decoder else 0,
        )
        with stopwatch.noticing_memory():
            self.seconds(1)

    def seconds(self, num_steps: int = 1) -> float:
        """Returns the seconds per step, averaged over `num_steps` consecutive steps."""
        with jax.set_mesh(self._mesh):
            start = time.perf_counter()
            for _ in range(num_steps):
                self._state, metrics = self._step(None, self._state, self._batch, np.float32(np.inf), self._seed)
            jax.block_until_ready(metrics)
            return (time.perf_counter() - start) / num_steps


@dataclasses.dataclass(frozen=True)
class Speed:
    """The measured speed of a case.

    Attributes:
      label: its name.
      seconds: seconds per step, of each turn.
      tokens: number of tokens in a step, over all devices; there is no padding.
      flops: FLOPs of a step, over all devices, by formula.
      peak_bytes: memory of each device, as planned.
      compile_seconds: seconds of compilation.
      num_devices: number of devices that shared the work.
      peak_flops: peak of a device, FLOP/s; None if unknown.
    """

    label: str
    seconds: tuple[float, ...]
    tokens: int
    flops: int
    peak_bytes: int
    compile_seconds: float
    num_devices: int
    peak_flops: float | None

    @property
    def median(self) -> float:
        """Median seconds per step."""
        return statistics.median(self.seconds)

    @property
    def flops_per_second(self) -> float:
        """FLOP/s of each device."""
        return self.flops / self.median / self.num_devices

    @property
    def utilization(self) -> float | None:
        """Share of a device's peak (MFU); None if that is unknown."""
        return self.flops_per_second / self.peak_flops if self.peak_flops else None

    def record(self) -> dict[str, Any]:
        """Returns the record as a JSON-serialisable dict."""
        return dataclasses.asdict(self) | {
            "seconds_median": self.median,
            "tokens_per_second_per_device": self.tokens / self.median / self.num_devices,
            "flops_per_second_per_device": self.flops_per_second,
            "model_flops_utilization": self.utilization,
        }


def take_turns(watches: Mapping[str, StepWatch], num_steps: int, repeats: int) -> list[Speed]:
    """Measures each case `repeats` times, in turns."""
    seconds: dict[str, list[float]] = {label: [] for label in watches}
    for _ in range(repeats):
        for label, watch in watches.items():
            seconds[label].append(watch.seconds(num_steps))
    return [
        Speed(
            label=label,
            seconds=tuple(seconds[label]),
            tokens=watch.tokens,
            flops=watch.flops,
            peak_bytes=watch.peak_bytes,
            compile_seconds=watch.compile_seconds,
            num_devices=jax.device_count(),
            peak_flops=PEAK_FLOPS.get(jax.devices()[0].device_kind),
        )
        for label, watch in watches.items()
    ]


def table(speeds: list[Speed], device: str) -> rich.table.Table:
    """Returns a table with a line for each case."""
    found = rich.table.Table(box=rich.box.SIMPLE, title=rich.markup.escape(device))
    found.add_column("case")
    for column in ("ms/step", "tokens/s/device", "TFLOP/step", "TFLOP/s/device", "MFU", "GiB/device", "compile s"):
        found.add_column(column, justify="right")
    for speed in speeds:
        least, most = (f"{1000 * end:.4g}" for end in (min(speed.seconds), max(speed.seconds)))
        found.add_row(
            rich.markup.escape(speed.label),
            rich.markup.escape(f"{1000 * speed.median:.4g} [{least}, {most}]"),
            f"{speed.tokens / speed.median / speed.num_devices:,.0f}",
            f"{speed.flops / 1e12:.3g}",
            f"{speed.flops_per_second / 1e12:.3g}",
            "unknown" if speed.utilization is None else f"{speed.utilization:.1%}",
            f"{speed.peak_bytes / 2**30:.2f}",
            f"{speed.compile_seconds:.0f}",
        )
    return found


def write(folder: str, settings: Mapping[str, Any], machine: Mapping[str, Any], speeds: list[Speed]) -> pathlib.Path:
    """Writes train_speed.json."""
    path = pathlib.Path(folder, FILE)
    report = {"settings": settings, "machine": machine, "cases": [speed.record() for speed in speeds]}
    records.write_json(path, report)
    return path
