"""Times decoding in slots beside decoding in whole batches, on texts as long as those of a real data set."""

import dataclasses
import json
import logging
import pathlib
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
import rich.box
import rich.markup
import rich.table
from jax.sharding import Mesh

from diffusion_t5x import partitioning, records, terminal
from diffusion_t5x.checkpointing import checkpoints
from diffusion_t5x.console import Console
from diffusion_t5x.data import text_files
from diffusion_t5x.data.batch import Batch
from diffusion_t5x.decoding.decoder import Decoder
from diffusion_t5x.decoding.slots import check_slots
from diffusion_t5x.errors import UserError
from diffusion_t5x.evaluation.in_slots import SlotDecoding
from diffusion_t5x.evaluation.inference import decode_whole, make_decode_step
from diffusion_t5x.evaluation.results import describe
from diffusion_t5x.models.config import ModelConfig
from diffusion_t5x.models.transformer import ModelDefinition, Params
from diffusion_t5x.partitioning import MeshConfig
from diffusion_t5x.performance import stopwatch

logger = logging.getLogger(__name__)
FILE = "slot_speed.json"
_LEAST_SAME = 0.9  # share of texts; ties may be decided differently
Lengths = Sequence[tuple[int, int]]  # inputs and targets of each text


@dataclasses.dataclass(frozen=True, kw_only=True)
class SlotBenchmark:
    """Times decoders in slots and in whole batches: a table, and `slot_speed.json` in `benchmark_output_dir`.

    The model has fresh random parameters and reads random inputs. Each text is as long as one of a file, and ends
    there. Slots and whole batches decode the same texts, take turns, and must write the same; compilation is left out.

    Attributes:
      model: the model's dimensions; decoder-only.
      decoders: the decoders to time, by names of your choice.
      benchmark_output_dir: made if it is not there.
      vocabulary_size: number of ids, MASK included.
      text_file: JSON lines, plain or gzip; each has a text in `inputs_field` and one in `targets_field`.
      inputs_field, targets_field: their names.
      bytes_per_token: length of a token, in UTF-8 bytes.
      num_texts: number of texts, drawn from the file.
      input_length, target_length: maximum numbers of tokens; longer inputs and targets are truncated.
      batch_size: number of rows in a batch, and of slots.
      repeats: number of turns.
      random_seed: seed of parameters, inputs, draws of texts and decoders.
      mesh: how the devices are arranged.
      dry_run: check everything, print what would be measured, and measure nothing.
    """

    model: ModelConfig
    decoders: Mapping[str, Decoder]
    benchmark_output_dir: str
    vocabulary_size: int
    text_file: str
    inputs_field: str
    targets_field: str
    bytes_per_token: float
    num_texts: int
    input_length: int
    target_length: int
    batch_size: int
    repeats: int
    random_seed: int = 0
    mesh: MeshConfig = MeshConfig()
    dry_run: bool = False

    def run(self) -> None:
        """Measures, prints the table and writes the file; a dry run prints what would be measured.

        Raises:
          UserError: anything that does not fit, before anything is compiled.
          RuntimeError: a text in slots differs from the one in a batch.
        """
        if jax.process_count() > 1:
            raise UserError("benchmark.slots measures a single host: start it on one host.")
        mesh = self.mesh.make()
        lengths = self._lengths()
        self._check(mesh)
        definition = ModelDefinition(self.model, stopwatch.endless_vocabulary(self.vocabulary_size))
        machine = stopwatch.describe_machine()
        checkpoints.ensure_writable(self.benchmark_output_dir, self.dry_run)
        tokens = sum(targets for _, targets in lengths)
        if self.dry_run:
            labels = ", ".join(self.decoders)
            print(terminal.safe(f"Would time {labels} on {len(lengths)} texts of {tokens:,} tokens."))
            return
        shardings = partitioning.param_shardings(mesh, definition.abstract(), definition.axes())
        params = jax.jit(definition.init, out_shardings=shardings)(jax.random.key(self.random_seed))
        batches = [
            self._batch(definition, lengths[first : first + self.batch_size], first)
            for first in range(0, len(lengths), self.batch_size)
        ]
        speeds = [self._measure(label, mesh, definition, params, batches, tokens) for label in self.decoders]
        Console().print(table(speeds, stopwatch.device_name(machine)))
        settings = {name: value for name, value in vars(self).items() if name not in ("dry_run", "mesh")}
        report = {
            "settings": describe(settings),
            "machine": machine,
            "lengths": lengths,
            "decoders": [speed.record() for speed in speeds],
        }
        path = pathlib.Path(self.benchmark_output_dir, FILE)
        records.write_json(path, report)
        logger.info("wrote %s", path)

    def _check(self, mesh: Mesh) -> None:
        """Raises a UserError for sizes that are out of range or do not fit the model or the mesh."""
        if self.model.architecture == "encoder_decoder":
            raise UserError("benchmark.slots measures decoder-only models: include models/decoder_only.gin.")
        if not self.decoders:
            raise UserError("benchmark.slots.decoders must not be empty.")
        for decoder in self.decoders.values():
            check_slots(decoder)
        if self.num_texts % self.batch_size or self.num_texts <= self.batch_size:
            raise UserError(
                f"benchmark.slots.num_texts must be a multiple of batch_size = {self.batch_size}, at least twice it; "
                f"got {self.num_texts}. Set NUM_TEXTS."
            )
        row = self.input_length + self.target_length
        partitioning.check_batch(mesh, self.batch_size, row)
        self.model.check_length(row, "benchmark.slots.target_length")

    def _lengths(self) -> Lengths:
        """Returns the numbers of inputs and targets of the texts that are drawn from the file."""
        for name in ("num_texts", "input_length", "target_length", "batch_size", "repeats", "bytes_per_token"):
            if getattr(self, name) <= 0:
                raise UserError(f"benchmark.slots.{name} must be greater than 0, not {getattr(self, name)}.")
        lines = text_files.Pieces(self.text_file, text_files.LINE)
        if len(lines) < self.num_texts:
            raise UserError(
                f"{self.text_file} has {len(lines)} texts; {self.num_texts} are to be drawn. Set NUM_TEXTS."
            )
        fields = ((self.inputs_field, self.input_length), (self.targets_field, self.target_length))
        lengths = []
        for number in np.random.default_rng(self.random_seed).permutation(len(lines))[: self.num_texts].tolist():
            try:
                record = json.loads(lines[number])
                sizes = [len(record[field].encode()) for field, _ in fields]
            except (ValueError, KeyError, TypeError, AttributeError):
                names = " and ".join(repr(field) for field, _ in fields)
                raise UserError(
                    f"{self.text_file}:{number + 1} is no JSON object with the texts {names}. Set INPUTS_FIELD and "
                    "TARGETS_FIELD."
                ) from None
            inputs, targets = (
                min(max(round(size / self.bytes_per_token), 1), most)
                for size, (_, most) in zip(sizes, fields, strict=True)
            )
            lengths.append((inputs, targets))
        return lengths

    def _batch(self, definition: ModelDefinition, lengths: Lengths, first_id: int) -> Batch:
        """Returns a row for each text, with random inputs."""
        shape = len(lengths), self.input_length + self.target_length
        slots = np.broadcast_to(np.arange(shape[1], dtype=np.int32), shape)
        inputs, targets = np.array(lengths, np.int32).T[:, :, None]
        there = slots < inputs + targets
        random = np.random.default_rng([self.random_seed, first_id])
        return Batch(
            tokens=np.where(slots < inputs, random.integers(0, definition.vocabulary.mask_id, shape, np.int32), 0),
            target_mask=there & (slots >= inputs),
            segment_ids=there.astype(np.int32),
            positions=np.where(there, slots, 0),
            example_ids=np.arange(first_id, first_id + len(lengths), dtype=np.int32),
        )

    def _measure(
        self,
        label: str,
        mesh: Mesh,
        definition: ModelDefinition,
        params: Params,
        batches: Sequence[Batch],
        tokens: int,
    ) -> "SlotSpeed":
        """Compiles both ways by a first run, compares their texts, and times them in turns."""
        decoder, seed = self.decoders[label], self.random_seed
        step = make_decode_step(mesh, definition, decoder, seed=seed)
        slots = SlotDecoding(mesh, definition, decoder, seed)
        data = [(batch, ()) for batch in batches]
        ways: dict[str, Callable[[], Any]] = {
            "batches": lambda: decode_whole(step, params, data, mesh, 1),
            "slots": lambda: slots.decode(params, data, 1),
        }
        texts = {
            name: np.concatenate([decoded.tokens for _, _, (decoded,) in decode()]) for name, decode in ways.items()
        }
        same = (texts["batches"] == texts["slots"]).all(axis=-1)
        if np.mean(same) < _LEAST_SAME:
            raise RuntimeError(f"{label}: {np.sum(~same)} of {len(same)} texts in slots differ from those in batches.")
        seconds: dict[str, list[float]] = {name: [] for name in ways}
        for _ in range(self.repeats):
            for name, decode in ways.items():
                start = time.perf_counter()
                for _ in decode():
                    pass
                seconds[name].append(time.perf_counter() - start)
        logger.info("%s: %s", label, seconds)
        return SlotSpeed(label, tokens, tuple(seconds["batches"]), tuple(seconds["slots"]), int(np.sum(~same)))


@dataclasses.dataclass(frozen=True)
class SlotSpeed:
    """The measured speed of a decoder.

    Attributes:
      label: its name.
      tokens: number of targets of all texts.
      batches, slots: seconds of each turn.
      num_differing: number of texts in slots that are not those of a batch: ties.
    """

    label: str
    tokens: int
    batches: tuple[float, ...]
    slots: tuple[float, ...]
    num_differing: int

    @property
    def gain(self) -> float:
        """The median time in whole batches over that in slots."""
        return statistics.median(self.batches) / statistics.median(self.slots)

    def tokens_per_second(self, seconds: Sequence[float]) -> float:
        return self.tokens / statistics.median(seconds)

    def record(self) -> dict[str, Any]:
        """Returns the record as a JSON-serialisable dict."""
        return dataclasses.asdict(self) | {
            "tokens_per_second_in_batches": self.tokens_per_second(self.batches),
            "tokens_per_second_in_slots": self.tokens_per_second(self.slots),
            "gain": self.gain,
        }


def table(speeds: Sequence[SlotSpeed], device: str) -> rich.table.Table:
    """Returns a table with a line for each decoder."""
    found = rich.table.Table(box=rich.box.SIMPLE, title=rich.markup.escape(device))
    found.add_column("decoder")
    for column in ("tokens/s in batches", "tokens/s in slots", "gain"):
        found.add_column(column, justify="right")
    for speed in speeds:
        batches, slots = (f"{speed.tokens_per_second(seconds):,.0f}" for seconds in (speed.batches, speed.slots))
        found.add_row(rich.markup.escape(speed.label), batches, slots, f"{speed.gain:.2f}")
    return found
