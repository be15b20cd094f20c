"""Compiles the real training step or decoding loop for a TPU slice, on any machine: no data, no arrays, no TPU."""

import dataclasses
import pathlib
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from diffusion_t5x import partitioning, records
from diffusion_t5x.data.dataset import Dataset
from diffusion_t5x.decoding.decoder import Decoder
from diffusion_t5x.errors import UserError
from diffusion_t5x.evaluation.inference import make_decode_step
from diffusion_t5x.evaluation.loading import abstract_batch, abstract_params
from diffusion_t5x.models.config import ModelConfig, Remat
from diffusion_t5x.models.transformer import ModelDefinition
from diffusion_t5x.partitioning import MeshConfig
from diffusion_t5x.performance.roofline import Report
from diffusion_t5x.performance.topology import Chip, find_slice
from diffusion_t5x.performance.training_run import TrainingRun

_REMAT: tuple[Remat, ...] = ("none", "dots", "full")  # the least computed again first
_MOST_ROWS = 64  # a device, that `fit` tries


# Compiles for a mesh: (mesh, model, batch size) -> what is compiled.
Lower = Callable[[Mesh, ModelConfig, int], jax.stages.Lowered]


@dataclasses.dataclass(frozen=True)
class SliceDryRun:
    """A dry run for a slice.

    Attributes:
      topology: as "v5p:4x4x8".
      output: a file that gets the report as JSON; None writes none.
      fit: look for the largest batch that fits, and what need not be computed again then.
    """

    topology: str
    output: str | None = None
    fit: bool = False

    def train(self, run: TrainingRun) -> None:
        """Prints what a training step would take."""

        def lower(mesh: Mesh, model: ModelConfig, batch_size: int) -> jax.stages.Lowered:
            return dataclasses.replace(run, model=model).lower(mesh, batch_size)

        what = f"a step of {type(run.objective).__name__}"
        self._run(what, lower, run.mesh, run.model, run.dataset, run.microbatches)

    def infer(self, *, mesh: MeshConfig, model: ModelConfig, decoder: Decoder, dataset: Dataset) -> None:
        """Prints what decoding a batch would take; arguments as for `infer.infer`."""
        vocabulary = dataset.token_ids()

        def lower(mesh: Mesh, model: ModelConfig, batch_size: int) -> jax.stages.Lowered:
            definition = ModelDefinition(model, vocabulary)
            decode = make_decode_step(mesh, definition, decoder, seed=0)
            return decode.lower(
                abstract_params(mesh, definition), abstract_batch(mesh, dataset, batch_size), np.int32(0)
            )

        self._run(f"a batch of {type(decoder).__name__}", lower, mesh, model, dataset, 1)

    def _run(self, what: str, lower: Lower, mesh: MeshConfig, model: ModelConfig, dataset: Dataset, microbatches: int):
        model.check_length(dataset.row_length, f"task_feature_lengths of {dataset.name}")
        if self.output and pathlib.Path(self.output).exists():
            raise UserError(f"--dry_run_output={self.output}: the file exists already, and nothing is overwritten.")
        chip, devices = find_slice(self.topology)
        devices_mesh = mesh.make(devices)
        tried: list[Report] = []

        def try_out(rows: int, remat: Remat) -> Report:
            partitioning.check_batch(devices_mesh, rows // microbatches, dataset.row_length)
            settings = {
                "what": what,
                "topology": self.topology,
                "chips": len(devices),
                "mesh": {name: size for name, size in devices_mesh.shape.items() if size > 1},
                "batch_size": rows,
                "row_length": dataset.row_length,
                "microbatches": microbatches,
                "remat": remat,
                "dtype": model.dtype,
            }
            changed = dataclasses.replace(model, remat=remat)
            tried.append(_compile(settings, chip, lambda: lower(devices_mesh, changed, rows), devices_mesh))
            print(tried[-1], flush=True)
            return tried[-1]

        pieces = partitioning.pieces_of("batch", devices_mesh) * microbatches
        best = self._fit(try_out, pieces) if self.fit else try_out(dataset.batch_size, model.remat)
        if self.fit:
            print(_advice(best))
        if self.output:
            said = best.as_json() if best else {"fits": False}
            said |= {"tried": [report.as_json() for report in tried]} if self.fit else {}
            records.write_json(self.output, said, indent=1)

    def _fit(self, try_out: Callable[[int, Remat], Report], pieces: int) -> Report | None:
        best: Report | None = None
        rows = 1
        while rows <= _MOST_ROWS and (report := try_out(rows * pieces, "full")).fits:
            best, rows = report, 2 * rows
        if best is None:
            return None
        for remat in _REMAT[:-1]:
            if (report := try_out(best.settings["batch_size"], remat)).fits:
                return report
        return best


def _compile(settings: dict[str, Any], chip: Chip, lower: Callable[[], jax.stages.Lowered], mesh: Mesh) -> Report:
    start = lowered = time.monotonic()
    try:
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):  # nothing may run on devices that are not there
            program = lower()
            lowered = time.monotonic()
            compiled = program.compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        said = next((line for line in str(error).splitlines() if "Used" in line), str(error).splitlines()[0])
        return Report(settings, chip, None, said.strip(), None, lowered - start, time.monotonic() - lowered)
    return Report.of(settings, chip, compiled, lowered - start, time.monotonic() - lowered)


def _advice(best: Report | None) -> str:
    if best is None:
        return "Nothing fits, not even one row per device: use a larger slice, num_microbatches, or another mesh."
    return f"--fit: BATCH_SIZE = {best.settings['batch_size']}, ModelConfig.remat = {best.settings['remat']!r}"
