"""Time decoders over lengths (`decode`), training steps (`train`), decoding in slots (`slots`), or growth (`growth`).

No task, no checkpoint and no TensorFlow is needed.

The first argument says what to measure: diffusion-t5x benchmark decode --gin_file=FILE ...
`decode --checkpoint DIR` takes model, decoder, lengths and the vocabulary's size from a checkpoint, and writes to
benchmark/ in its MODEL_DIR.
"""

import dataclasses
import functools
import logging
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
import optax
from jax.sharding import Mesh

from diffusion_t5x import partitioning, records, terminal
from diffusion_t5x.checkpointing import checkpoints
from diffusion_t5x.checkpointing.checkpoints import OpenCheckpoint
from diffusion_t5x.command_line import config
from diffusion_t5x.command_line.recorded import checkpoint_texts
from diffusion_t5x.command_line.runnable import verb
from diffusion_t5x.command_line.verbs import own_flags
from diffusion_t5x.console import Console
from diffusion_t5x.decoding.decoder import Decoder
from diffusion_t5x.errors import UserError, did_you_mean
from diffusion_t5x.evaluation.results import describe
from diffusion_t5x.models.config import ModelConfig
from diffusion_t5x.models.transformer import ModelDefinition, Params
from diffusion_t5x.partitioning import MeshConfig
from diffusion_t5x.performance import stopwatch, train_speed
from diffusion_t5x.performance.decode_times import DecodeTime, Measurements, show
from diffusion_t5x.performance.growth_benchmark import GrowthBenchmark
from diffusion_t5x.performance.slot_speed import SlotBenchmark
from diffusion_t5x.performance.stopwatch import OutOfMemory, Stopwatch
from diffusion_t5x.performance.train_speed import Case, StepWatch
from diffusion_t5x.reporting import charts
from diffusion_t5x.reporting.decode_charts import decode_charts
from diffusion_t5x.reporting.report import write_report

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecodeBenchmark:
    """Times decoders side by side: a table, `decode_time.json`, `.html` and `.svg` in `benchmark_output_dir`.

    The model has fresh random parameters and reads random inputs. No token ends a text, so every target position is
    written: the time is that of the full length, without compilation. At each length the decoders take turns, so
    that a machine that slows down affects all of them. Each time is saved as soon as it is measured; the same command
    continues from there.

    Attributes:
      model: the model's dimensions.
      decoders: the decoders to time, by names of your choice.
      benchmark_output_dir: created if missing.
      vocabulary_size: number of ids, MASK included.
      lengths: numbers of target tokens.
      input_length: number of input tokens.
      batch_size: number of texts written at once.
      repeats: number of runs of each decoder at each length.
      max_batch_size: if given, everything is measured again with each decoder's own saturating batch: `batch_size` is
        doubled until that raises the tokens per second by less than a tenth, or exceeds this, or memory runs out.
      random_seed: seed of parameters, inputs and decoders.
      mesh: how the devices are arranged.
      dry_run: check everything, print what would be measured, and measure nothing.
    """

    model: ModelConfig
    decoders: Mapping[str, Decoder]
    benchmark_output_dir: str
    vocabulary_size: int
    lengths: Sequence[int]
    input_length: int
    batch_size: int
    repeats: int
    max_batch_size: int | None = None
    random_seed: int = 0
    mesh: MeshConfig = MeshConfig()
    dry_run: bool = False

    def run(self) -> None:
        """Runs the measurements that are missing; a dry run lists them.

        Raises:
          UserError: anything that does not fit, or measurements with different settings in `benchmark_output_dir`,
            before anything is compiled; or `batch_size` texts do not fit into memory.
        """
        if jax.process_count() > 1:
            raise UserError("benchmark.decode measures a single host: start it on one host.")
        mesh = self.mesh.make()
        self._check(mesh)
        definition = ModelDefinition(self.model, stopwatch.endless_vocabulary(self.vocabulary_size))
        machine = stopwatch.describe_machine()
        device = stopwatch.device_name(machine)
        names = [
            "model",
            "decoders",
            "vocabulary_size",
            "input_length",
            "batch_size",
            "max_batch_size",
            "random_seed",
            "mesh",
        ]
        settings = {"parameters": definition.num_params(), **{name: getattr(self, name) for name in names}}
        kept = Measurements(self.benchmark_output_dir, describe(settings), machine)
        checkpoints.ensure_writable(self.benchmark_output_dir, self.dry_run)
        if self.dry_run:
            labels = ", ".join(self.decoders)
            print(terminal.safe(f"Would time {labels} ({definition.num_params():,} parameters) for {kept.path}."))
            print(f"Lengths {list(self.lengths)} on {device}.")
            return
        comparison = _Comparison(self.decoders, kept, self._watches(mesh, definition), self.repeats, device)
        sizes = dict.fromkeys(self.decoders, self.batch_size)
        for length in self.lengths:
            comparison.measure(length, sizes)
        if self.max_batch_size is not None:
            # Longer texts keep the device busy sooner: what saturates at one length is where a shorter one starts.
            for length in sorted(self.lengths, reverse=True):
                sizes = comparison.saturate(length, sizes, self.max_batch_size)
        show(kept.times)
        for name, chart in decode_charts([("", kept.times)]).items():
            records.write_text(kept.path.with_name(f"{name}.svg"), charts.standalone(chart.svg))
        logger.info("wrote %s", write_report([self.benchmark_output_dir], kept.path.with_suffix(".html")))

    def _check(self, mesh: Mesh) -> None:
        """Raises a UserError for sizes that are out of range or do not fit the model or the mesh."""
        numbers = {name: [getattr(self, name)] for name in ("input_length", "batch_size", "repeats")}
        for name, values in {**numbers, "lengths": self.lengths}.items():
            if not values or min(values) < 1:
                raise UserError(f"benchmark.decode.{name} must be at least 1, and not empty.")
        if not self.decoders:
            raise UserError("benchmark.decode.decoders must not be empty.")
        if self.max_batch_size is not None and self.max_batch_size < self.batch_size:
            least = self.batch_size
            raise UserError(f"benchmark.decode.max_batch_size must be at least batch_size = {least}, or None.")
        for length in self.lengths:
            row_length = length if self.model.architecture == "encoder_decoder" else self.input_length + length
            partitioning.check_batch(mesh, self.batch_size, row_length)
            self.model.check_length(row_length, "benchmark.decode.lengths")

    def _watches(self, mesh: Mesh, definition: ModelDefinition) -> Callable[[str, int, int], Stopwatch]:
        """Returns a function that makes the stopwatch for a decoder (label), length and batch size."""
        shardings = partitioning.param_shardings(mesh, definition.abstract(), definition.axes())

        @functools.cache
        def params() -> Params:  # not made where all is measured
            init = jax.jit(lambda key: definition.as_read(definition.init(key)), out_shardings=shardings)
            return init(jax.random.key(self.random_seed))

        def watch(label: str, length: int, size: int) -> Stopwatch:
            batch = stopwatch.random_batch(definition, size, self.input_length, length, self.random_seed)
            return Stopwatch(mesh, definition, params(), self.decoders[label], batch, self.random_seed)

        return watch


decode = verb("decode", DecodeBenchmark)


def train(
    *,
    cases: Mapping[str, Case],
    optimizer: optax.GradientTransformation,
    benchmark_output_dir: str,
    vocabulary_size: int,
    input_length: int,
    target_length: int,
    num_steps: int,
    repeats: int,
    random_seed: int = 0,
    mesh: MeshConfig = MeshConfig(),
    dry_run: bool = False,
) -> None:
    """Times training steps side by side: a table, and `train_speed.json` in `benchmark_output_dir`.

    Models have fresh random parameters and learn random tokens. The cases take turns, so that a machine that slows
    down affects all of them; the state of each stays on the devices, so all must fit together.

    Args:
      cases: the cases to train, by names of your choice.
      optimizer: the optimizer of every case.
      benchmark_output_dir: created if missing.
      vocabulary_size: number of ids, MASK included.
      input_length, target_length: tokens of a row.
      num_steps: number of consecutive steps in a turn.
      repeats: number of turns of each case.
      random_seed: seed of parameters, tokens and noise.
      mesh: how the devices are arranged.
      dry_run: check everything, print what would be measured, and measure nothing.

    Raises:
      UserError: anything that does not fit, before anything is compiled.
    """
    if jax.process_count() > 1:
        raise UserError("benchmark.train measures a single host: start it on one host.")
    device_mesh = mesh.make()
    numbers = {"input_length": input_length, "target_length": target_length, "num_steps": num_steps, "repeats": repeats}
    for name, value in numbers.items():
        if value < 1:
            raise UserError(f"benchmark.train.{name} must be at least 1, not {value}.")
    if not cases:
        raise UserError("benchmark.train.cases must not be empty.")
    for label, case in cases.items():
        case.check(label, device_mesh, input_length, target_length)
    machine = stopwatch.describe_machine()
    device = stopwatch.device_name(machine)
    checkpoints.ensure_writable(benchmark_output_dir, dry_run)
    if dry_run:
        names = ", ".join(cases)
        print(terminal.safe(f"Would time training steps of {names} for {benchmark_output_dir} on {device}."))
        return
    watches = dict[str, StepWatch]()
    for label, case in cases.items():
        try:
            sizes = vocabulary_size, input_length, target_length
            watches[label] = StepWatch(device_mesh, case, optimizer, *sizes, random_seed)
        except OutOfMemory:
            raise UserError(
                f"benchmark.train, {label}: a step does not fit into memory. Set a smaller BATCH_SIZE, or measure "
                "fewer cases at once."
            ) from None
    speeds = train_speed.take_turns(watches, num_steps, repeats)
    Console(width=None if sys.stdout.isatty() else 120).print(train_speed.table(speeds, device))
    settings = {"cases": cases, "vocabulary_size": vocabulary_size, **numbers, "random_seed": random_seed, "mesh": mesh}
    logger.info("wrote %s", train_speed.write(benchmark_output_dir, describe(settings), machine, speeds))


slots = verb("slots", SlotBenchmark)
slots.__module__ = __name__  # which gin files name

growth = verb("growth", GrowthBenchmark)
growth.__module__ = __name__

SUBCOMMANDS: dict[str, Callable[..., Any]] = {"decode": decode, "train": train, "slots": slots, "growth": growth}


@dataclasses.dataclass(frozen=True)
class _Comparison:
    """Runs the measurements that are still missing.

    Attributes:
      decoders: by label.
      kept: the measurements so far.
      watch: makes the stopwatch for a decoder (label), length and batch size.
      repeats: number of runs of each.
      device: the device, as text.
    """

    decoders: Mapping[str, Decoder]
    kept: Measurements
    watch: Callable[[str, int, int], Stopwatch]
    repeats: int
    device: str

    def measure(self, length: int, sizes: Mapping[str, int]) -> None:
        """Times all decoders at this length, each with its batch size."""
        self._take_turns(length, sizes, False, functools.cache(self.watch))

    def saturate(self, length: int, sizes: Mapping[str, int], most: int) -> dict[str, int]:
        """Times all decoders at this length with saturating batches, searched from `sizes` up; returns those sizes."""
        watch = functools.cache(self.watch)  # for this length: a program takes memory

        def seconds_of(label: str, size: int) -> float | None:
            seen = self.kept.searched(label, length)
            if size not in seen:
                try:
                    seconds = min(watch(label, length, size).seconds() for _ in range(2))
                except OutOfMemory:
                    seconds = None
                self.kept.add_searched(label, length, size, seconds)
                return seconds
            return seen[size]

        found = {
            label: stopwatch.saturating_batch(functools.partial(seconds_of, label), sizes[label], most)
            for label in self.decoders
        }
        self._take_turns(length, found, True, watch)
        return found

    def _take_turns(
        self, length: int, sizes: Mapping[str, int], saturating: bool, watch: Callable[[str, int, int], Stopwatch]
    ) -> None:
        def seconds(label: str) -> tuple[float, ...]:
            return self.kept.seconds(label, length, saturating)

        unfinished = [label for label in self.decoders if len(seconds(label)) < self.repeats]
        for label in unfinished:  # compiles, so that nothing but runs comes between runs
            try:
                watch(label, length, sizes[label])
            except OutOfMemory:
                raise UserError(
                    f"{label}: {sizes[label]} texts of {length} tokens do not fit into memory. Leave this length or "
                    "decoder out, or make benchmark.decode.batch_size or the model smaller."
                ) from None
        for turn in range(self.repeats):
            for label in unfinished:
                before = seconds(label)
                if len(before) > turn:
                    continue
                found = watch(label, length, sizes[label])
                time = DecodeTime(
                    label=label,
                    decoder=type(self.decoders[label]).__name__,
                    settings=str(self.decoders[label]),
                    length=length,
                    batch_size=sizes[label],
                    saturating=saturating,
                    forwards=found.forwards,
                    device=self.device,
                    seconds=(*before, found.seconds()),
                )
                self.kept.add(time)
        for label in unfinished:
            logger.info("%s, %d tokens, %d at once: %.3g s", label, length, sizes[label], np.median(seconds(label)))


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the subcommand that the command line names first."""
    words = list(sys.argv[1:] if argv is None else argv)
    name = words[0] if words else ""
    with config.program():
        if name in ("-h", "--help"):
            print(f"{__doc__}\nSubcommands: {', '.join(SUBCOMMANDS)}; each has its own --help.")
            return
        if name not in SUBCOMMANDS:
            given = f"not {name!r}" if words else "but there is none"
            raise UserError(
                f"The first argument must be {' or '.join(SUBCOMMANDS)}, {given}."
                f"{did_you_mean(name, SUBCOMMANDS)} Write python -m diffusion_t5x.benchmark {next(iter(SUBCOMMANDS))} "
                "--gin_file=..."
            )
        flags, rest = own_flags("benchmark decode").parse_known_args(words[1:])
        if flags.checkpoint and name != "decode":
            raise UserError(f"--checkpoint is for decode only: {name} takes its models from gin files.")
        checkpoint = flags.checkpoint and checkpoints.open_checkpoint(flags.checkpoint)
        rest, texts = checkpoint_texts(checkpoint, rest, "runs/benchmark_decode.gin", _of_checkpoint(checkpoint))
    config.run(SUBCOMMANDS[name], rest, subcommand=name, texts=texts)


def _of_checkpoint(checkpoint: OpenCheckpoint | None) -> dict[str, Any]:
    """Returns the macros of runs/benchmark_decode.gin that follow from a checkpoint."""
    if checkpoint is None:
        return {}
    macros: dict[str, Any] = {"BENCHMARK_OUTPUT_DIR": str(checkpoint.model_dir / "benchmark")}
    if lengths := (checkpoint.record.dataset or {}).get("task_feature_lengths"):
        macros["LENGTHS"] = (lengths["targets"],)
        macros |= {"INPUT_LENGTH": lengths["inputs"]} if "inputs" in lengths else {}
    return macros


if __name__ == "__main__":
    main()
