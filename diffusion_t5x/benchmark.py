"""Measure how long a decoder takes for texts of different lengths. No task, no checkpoint, no TensorFlow."""

import dataclasses
import json
import logging
import pathlib
import statistics
import time
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
import rich.box
import rich.console
import rich.markup
import rich.table

from diffusion_t5x import config, partitioning
from diffusion_t5x.data.batch import Batch
from diffusion_t5x.data.vocabularies import TokenIds
from diffusion_t5x.decoding.decoder import Decoder
from diffusion_t5x.errors import UserError
from diffusion_t5x.evaluation.inference import DecodeStep, make_decode_step
from diffusion_t5x.models.config import ModelConfig
from diffusion_t5x.models.transformer import ModelDefinition, Params
from diffusion_t5x.partitioning import MeshConfig
from diffusion_t5x.training import checkpoints

logger = logging.getLogger(__name__)


def decode(
    *,
    model: ModelConfig,
    decoder: Decoder,
    benchmark_output_dir: str,
    vocabulary_size: int,
    lengths: Sequence[int],
    input_length: int,
    batch_size: int,
    repeats: int,
    random_seed: int = 0,
    mesh: MeshConfig = MeshConfig(),  # noqa: B008  (frozen)
    dry_run: bool = False,
) -> None:
    """Times a decoder and writes `decode_time.json`, a record for each length, into `benchmark_output_dir`.

    The model has fresh random parameters and reads random inputs. Nothing can end a text, so every target position is
    written: the time is that of the whole length. Compilation is not in it.

    Args:
      model: dimensions.
      decoder: what writes.
      benchmark_output_dir: made if it is not there.
      vocabulary_size: number of ids, MASK included.
      lengths: target tokens, one measurement each.
      input_length: tokens of the input.
      batch_size: texts that are written at once.
      repeats: runs of each length; the record has their median, least and greatest time.
      random_seed: of parameters, inputs and decoder.
      mesh: how the devices are arranged.
      dry_run: check everything, print what would be measured, and measure nothing.

    Raises:
      UserError: anything that does not fit, or an earlier measurement in `benchmark_output_dir`; before anything is
        compiled.
    """
    device_mesh = mesh.make()
    numbers = {"input_length": [input_length], "batch_size": [batch_size], "repeats": [repeats], "lengths": lengths}
    for name, values in numbers.items():
        if not values or min(values) < 1:
            raise UserError(f"benchmark.decode.{name} must be at least 1, and not empty.")
    partitioning.check_batch_size(device_mesh, batch_size)
    targets = [max(lengths)] if model.architecture == "encoder_decoder" else [input_length, max(lengths)]
    model.check_length(sum(targets), "benchmark.decode.lengths")
    definition = ModelDefinition(model, endless_vocabulary(vocabulary_size))
    output = pathlib.Path(benchmark_output_dir, "decode_time.json")
    if output.exists():
        raise UserError(f"{output} is there already: choose another BENCHMARK_OUTPUT_DIR, or remove that file.")
    if dry_run:
        print(f"Would time {decoder} ({definition.num_params():,} parameters) at lengths {list(lengths)} for {output}.")
        return
    checkpoints.ensure_writable(benchmark_output_dir)

    shardings = partitioning.param_shardings(device_mesh, definition.abstract(), definition.axes())
    params = jax.jit(definition.init, out_shardings=shardings)(jax.random.key(random_seed))
    step = make_decode_step(device_mesh, definition, decoder, seed=random_seed)
    records = []
    for length in lengths:
        batch = random_batch(definition, batch_size, input_length, length, random_seed)
        with jax.set_mesh(device_mesh):
            batch = partitioning.put_batch(device_mesh, batch)
            seconds, steps = measure(step, params, batch, definition.vocabulary.eos_id, repeats)
        records.append(
            {
                "decoder": type(decoder).__name__,
                "settings": dataclasses.asdict(decoder),
                "length": length,
                "input_length": input_length,
                "batch_size": batch_size,
                "steps": steps,
                "seconds_median": statistics.median(seconds),
                "seconds_min": min(seconds),
                "seconds_max": max(seconds),
                "tokens_per_second": batch_size * length / statistics.median(seconds),
                "parameters": definition.num_params(),
                "device_kind": jax.devices()[0].device_kind,
                "jax_version": jax.__version__,
            }
        )
        logger.info("%s, %d tokens: %.3g s", type(decoder).__name__, length, records[-1]["seconds_median"])
    if jax.process_index() == 0:
        output.write_text(json.dumps(records, indent=2) + "\n", encoding="utf-8")
        _show(records)
        logger.info("wrote %s", output)


def endless_vocabulary(size: int) -> TokenIds:
    """Ids of which none ends a text: end and padding are MASK, which no decoder writes."""
    if size < 2:
        raise UserError(f"benchmark.decode.vocabulary_size must be at least 2, not {size}: one id is MASK.")
    last = size - 1
    return TokenIds(size=size, pad_id=last, eos_id=last, mask_id=last, start_id=0, noise_ranges=((0, last),))


def random_batch(definition: ModelDefinition, batch_size: int, input_length: int, length: int, seed: int) -> Batch:
    """Rows of `input_length` random tokens and `length` targets to write, laid out for the model's architecture."""
    inputs = np.random.default_rng(seed).integers(
        0, definition.vocabulary.mask_id, (batch_size, input_length), np.int32
    )
    targets = np.zeros((batch_size, length), np.int32)
    is_encoder_decoder = definition.config.architecture == "encoder_decoder"
    tokens = targets if is_encoder_decoder else np.concatenate([inputs, targets], axis=1)
    positions = np.broadcast_to(np.arange(tokens.shape[1], dtype=np.int32), tokens.shape)
    batch = Batch(
        tokens=tokens,
        target_mask=positions >= tokens.shape[1] - length,
        segment_ids=np.ones_like(tokens),
        positions=positions,
        example_ids=np.arange(batch_size, dtype=np.int32),
    )
    if not is_encoder_decoder:
        return batch
    return batch.replace(
        encoder_tokens=inputs,
        encoder_segment_ids=np.ones_like(inputs),
        encoder_positions=np.broadcast_to(np.arange(input_length, dtype=np.int32), inputs.shape),
    )


def measure(step: DecodeStep, params: Params, batch: Batch, end_id: int, repeats: int) -> tuple[list[float], int]:
    """Seconds of each run after a first one that compiles, and the model steps of each.

    Raises:
      RuntimeError: a target holds `end_id`: it was not written, or stands behind an end.
    """
    decoded = jax.block_until_ready(step(params, batch))
    ends = jax.device_get(decoded.tokens)[jax.device_get(batch.target_mask)] == end_id
    if np.any(ends):
        raise RuntimeError(f"{np.sum(ends)} of {np.size(ends)} targets were left out: this time would be no measure.")
    seconds = []
    for _ in range(repeats):
        start = time.monotonic()
        jax.block_until_ready(step(params, batch))
        seconds.append(time.monotonic() - start)
    return seconds, int(decoded.steps)


def _show(records: Sequence[dict[str, Any]]) -> None:
    first = records[0]
    title = f"{first['decoder']}, {first['batch_size']} texts at once, {first['device_kind']}"
    table = rich.table.Table("tokens", "steps", "seconds", "tokens/s", box=rich.box.SIMPLE, title=title)
    for column in table.columns:
        column.justify = "right"
    for record in records:
        times = f"{record['seconds_median']:.3g} [{record['seconds_min']:.3g}, {record['seconds_max']:.3g}]"
        table.add_row(
            str(record["length"]), str(record["steps"]), rich.markup.escape(times), f"{record['tokens_per_second']:.0f}"
        )
    rich.console.Console().print(table)


if __name__ == "__main__":
    config.run(decode)
