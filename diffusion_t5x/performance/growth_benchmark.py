"""Measures how the time and memory of training and decoding grow with length, batch, vocabulary and layers."""

import dataclasses
import logging
import pathlib
import sys
from collections.abc import Mapping, Sequence
from typing import Literal, Protocol, get_args

import jax
import optax
from jax.sharding import Mesh

from diffusion_t5x import partitioning, records, terminal
from diffusion_t5x.checkpointing import checkpoints
from diffusion_t5x.console import Console
from diffusion_t5x.decoding.autoregressive import AutoregressiveDecoder
from diffusion_t5x.decoding.block import BlockDecoder
from diffusion_t5x.decoding.decoder import Decoder
from diffusion_t5x.decoding.masked import MaskedDecoder
from diffusion_t5x.decoding.sundae import SundaeDecoder
from diffusion_t5x.errors import UserError
from diffusion_t5x.evaluation.results import describe
from diffusion_t5x.models.config import ModelConfig
from diffusion_t5x.models.transformer import ModelDefinition
from diffusion_t5x.objectives.objective import Objective
from diffusion_t5x.partitioning import MeshConfig
from diffusion_t5x.performance import growth, stopwatch
from diffusion_t5x.performance.growth import Growth
from diffusion_t5x.performance.model_flops import forward_flops
from diffusion_t5x.performance.stopwatch import OutOfMemory, Stopwatch
from diffusion_t5x.performance.train_speed import Case, StepWatch

logger = logging.getLogger(__name__)
Axis = Literal["length", "batch_size", "vocabulary_size", "num_layers"]


class Watch(Protocol):
    """A program, compiled and run once."""

    peak_bytes: int

    def seconds(self) -> float: ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class GrowthBenchmark:
    """Times training and decoding over sizes, and fits exponents: tables, and `growth.json`.

    One size grows at a time; the others stay where they are. The model has fresh random parameters and reads random
    tokens; no token ends a text. The sizes of an axis take turns, so that a machine that slows down affects all of
    them; compilation is left out. An exponent e says that the time grows as size^e: it is the slope of a line through
    the logarithms. Beside it stands the one of the matrix products, by formula (`performance.model_flops`).

    Attributes:
      model: the model's dimensions; decoder-only.
      objectives: what to train, by names of your choice.
      decoders: how to decode, by names of your choice.
      optimizer: the optimizer of training.
      benchmark_output_dir: created if missing.
      axes: sizes by axis, ascending: "length" (targets per row), "batch_size" (rows), "vocabulary_size" (ids, MASK
        included) and "num_layers".
      length, batch_size, vocabulary_size: where they are while another axis grows.
      input_length: number of input tokens.
      repeats: number of turns.
      random_seed: seed of parameters, tokens, noise and decoders.
      mesh: how the devices are arranged.
      dry_run: check everything, print what would be measured, and measure nothing.
    """

    model: ModelConfig
    objectives: Mapping[str, Objective]
    decoders: Mapping[str, Decoder]
    optimizer: optax.GradientTransformation
    benchmark_output_dir: str
    axes: Mapping[str, Sequence[int]]
    length: int
    batch_size: int
    vocabulary_size: int
    input_length: int
    repeats: int
    random_seed: int = 0
    mesh: MeshConfig = MeshConfig()
    dry_run: bool = False

    def run(self) -> None:
        """Measures, prints the tables and writes the file; a dry run prints what would be measured.

        Raises:
          UserError: anything that does not fit, before anything is compiled.
        """
        if jax.process_count() > 1:
            raise UserError("benchmark.growth measures a single host: start it on one host.")
        mesh = self.mesh.make()
        self._check(mesh)
        machine = stopwatch.describe_machine()
        checkpoints.ensure_writable(self.benchmark_output_dir, self.dry_run)
        names = [*self.objectives, *self.decoders]
        if self.dry_run:
            sizes = "; ".join(f"{axis} {list(sizes)}" for axis, sizes in self.axes.items())
            print(terminal.safe(f"Would time {', '.join(names)} over {sizes}."))
            return
        settings = {name: value for name, value in vars(self).items() if name not in ("dry_run", "optimizer")}
        path, lines = pathlib.Path(self.benchmark_output_dir, growth.FILE), list[Growth]()
        for axis in self.axes:
            for name in names:
                lines.append(self._measure(mesh, axis, name))
                logger.info("%s over %s: time %s", name, axis, growth.exponent_text(lines[-1]))
                measured = [line.record() for line in lines]
                records.write_json(path, {"settings": describe(settings), "machine": machine, "growth": measured})
            found = growth.table([line for line in lines if line.axis == axis], stopwatch.device_name(machine))
            Console(width=None if sys.stdout.isatty() else 140).print(found)
        logger.info("wrote %s", path)

    def _check(self, mesh: Mesh) -> None:
        """Raises a UserError for sizes that are out of range or do not fit the model or the mesh."""
        if self.model.architecture == "encoder_decoder":
            raise UserError("benchmark.growth measures decoder-only models: include models/decoder_only.gin.")
        if not self.objectives and not self.decoders:
            raise UserError("benchmark.growth has neither objectives nor decoders: set OBJECTIVES or DECODERS.")
        if not self.axes:
            raise UserError("benchmark.growth.axes is empty: set AXES, such as {'length': (128, 256)}.")
        if shared := self.objectives.keys() & self.decoders.keys():
            raise UserError(f"benchmark.growth has an objective and a decoder with one name: {', '.join(shared)}.")
        for name in ("input_length", "repeats", "length", "batch_size", "vocabulary_size"):
            if getattr(self, name) < 1:
                raise UserError(f"benchmark.growth.{name} must be at least 1, not {getattr(self, name)}.")
        for axis, sizes in self.axes.items():
            if axis not in get_args(Axis):
                raise UserError(f"benchmark.growth.axes has {axis!r}. There are: {', '.join(get_args(Axis))}.")
            whole = isinstance(sizes, tuple | list) and all(isinstance(size, int) for size in sizes)
            if not whole or len(sizes) < 2 or list(sizes) != sorted(set(sizes)) or sizes[0] < 1:
                raise UserError(
                    f"benchmark.growth.axes[{axis!r}] must be two whole numbers or more, ascending; got {sizes}."
                )
            for size in sizes:
                self._at(axis, size).check(mesh)

    def _at(self, axis: str, size: int) -> "_Place":
        sizes = {"length": self.length, "batch_size": self.batch_size, "vocabulary_size": self.vocabulary_size}
        model = self.model
        if axis == "num_layers":
            model = dataclasses.replace(model, num_layers=size)
        else:
            sizes[axis] = size
        return _Place(self, model, **sizes)

    def _measure(self, mesh: Mesh, axis: str, name: str) -> Growth:
        """Times one objective or decoder over an axis; sizes that do not fit into memory are left out."""
        watches = dict[int, Watch]()
        flops = list[int | None]()
        for size in self.axes[axis]:
            place = self._at(axis, size)
            try:
                make = place.training if name in self.objectives else place.decoding
                watches[size], work = make(mesh, name)
            except OutOfMemory:
                logger.warning("%s: %s = %d does not fit into memory; larger ones are left out", name, axis, size)
                break
            flops.append(work)
        if not watches:
            raise UserError(
                f"{name} does not fit into memory with {axis} = {self.axes[axis][0]}: begin lower, or leave it out."
            )
        seconds: dict[int, list[float]] = {size: [] for size in watches}
        for _ in range(self.repeats):
            for size, watch in watches.items():
                seconds[size].append(watch.seconds())
        return Growth(
            name=name,
            kind="training step" if name in self.objectives else "decoding",
            axis=axis,
            sizes=tuple(watches),
            seconds=tuple(tuple(found) for found in seconds.values()),
            peak_bytes=tuple(watch.peak_bytes for watch in watches.values()),
            flops=tuple(known) if len(known := [work for work in flops if work is not None]) == len(flops) else None,
        )


@dataclasses.dataclass(frozen=True)
class _Place:
    """Sizes at which something is measured; attributes as in `GrowthBenchmark`."""

    benchmark: GrowthBenchmark
    model: ModelConfig
    length: int
    batch_size: int
    vocabulary_size: int

    @property
    def row(self) -> int:
        return self.benchmark.input_length + self.length

    @property
    def definition(self) -> ModelDefinition:
        return ModelDefinition(self.model, stopwatch.endless_vocabulary(self.vocabulary_size))

    def check(self, mesh: Mesh) -> None:
        """Raises a UserError for sizes that do not fit the model or the mesh."""
        self.definition  # noqa: B018  (raises on a bad size of the vocabulary)
        partitioning.check_batch(mesh, self.batch_size, self.row)
        self.model.check_length(self.row, "benchmark.growth.length")
        for label, objective in self.benchmark.objectives.items():
            Case(self.model, objective, self.batch_size).check(label, mesh, self.benchmark.input_length, self.length)

    def training(self, mesh: Mesh, name: str) -> tuple[StepWatch, int]:
        """Returns a training step, and its FLOPs by formula."""
        case = Case(self.model, self.benchmark.objectives[name], self.batch_size)
        sizes = self.vocabulary_size, self.benchmark.input_length, self.length
        watch = StepWatch(mesh, case, self.benchmark.optimizer, *sizes, self.benchmark.random_seed)
        return watch, watch.flops

    def decoding(self, mesh: Mesh, name: str) -> tuple[Stopwatch, int | None]:
        """Returns the decoding of a batch, and the FLOPs of its passes by formula; None if there is no formula."""
        decoder, definition, seed = self.benchmark.decoders[name], self.definition, self.benchmark.random_seed
        shardings = partitioning.param_shardings(mesh, definition.abstract(), definition.axes())
        init = jax.jit(lambda key: definition.as_read(definition.init(key)), out_shardings=shardings)
        batch = stopwatch.random_batch(definition, self.batch_size, self.benchmark.input_length, self.length, seed)
        watch = Stopwatch(mesh, definition, init(jax.random.key(seed)), decoder, batch, seed)
        slots = slots_per_pass(decoder, self.row)
        if slots is None:
            return watch, None
        canvases = decoder.num_samples if isinstance(decoder, SundaeDecoder) else 1
        # A cache has room for the whole row, and attention counts every pair of slots.
        one = forward_flops(definition.config, slots, keys=self.row)
        return watch, self.batch_size * canvases * watch.forwards * one


def slots_per_pass(decoder: Decoder, row: int) -> int | None:
    """Returns how many slots of a row a decoder reads in each pass; None if that differs from pass to pass."""
    match decoder:
        case AutoregressiveDecoder():
            return 1
        case BlockDecoder():
            return decoder.block_size
        case MaskedDecoder() | SundaeDecoder():
            return row
    return None
