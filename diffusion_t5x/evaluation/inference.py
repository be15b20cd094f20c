"""Decodes the examples of a data set."""

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from diffusion_t5x import partitioning
from diffusion_t5x.data.batch import Batch
from diffusion_t5x.decoding.decoder import Decoded, Decoder, Watch
from diffusion_t5x.evaluation import traces
from diffusion_t5x.evaluation.in_slots import IsEnough, SlotDecoding
from diffusion_t5x.evaluation.teacher import Judge
from diffusion_t5x.models.streams import sample_key
from diffusion_t5x.models.transformer import ModelDefinition, Params
from diffusion_t5x.records import write_json_lines

Example = Mapping[str, Any]
DecodeStep = Callable[[Params, Batch, np.int32], Decoded]


def make_decode_step(
    mesh: Mesh, definition: ModelDefinition, decoder: Decoder, *, seed: int, trace: bool | Watch = False
) -> jax.stages.Wrapped:
    """Returns the jitted `(params, batch, sample=0, seed=seed) -> Decoded`.

    Examples draw from `(seed, example_ids)`, and each sample from its own key; a single sample is the 0th. A seed that
    is given to the program, as a `streams.seed_number`, needs no other program. `trace` is as in `Decoder.decode`.
    """

    def step(
        params: Params, batch: Batch, sample: jax.Array | int = 0, seed: jax.Array | np.uint32 | int = seed
    ) -> Decoded:
        key = sample_key(jax.random.key(seed), sample)
        return decoder.decode(definition.bind(params), batch, key, trace)

    return jax.jit(step, out_shardings=partitioning.replicated(mesh))


def predict(
    decode_step: DecodeStep,
    params: Params,
    batches: Iterable[tuple[Batch, Sequence[Example]]],
    mesh: Mesh,
    to_text: Callable[[Sequence[int]], str],
    cells: Callable[[Sequence[int]], list[str]],
    judge: Judge | None = None,
    samples_per_example: int = 1,
    text_mask: Callable[[Batch], np.ndarray] | None = None,
    slots: SlotDecoding | None = None,
    is_enough: IsEnough | None = None,
) -> Iterator[dict[str, Any]]:
    """Yields one record for each example, in order.

    Args:
      decode_step: see `make_decode_step`.
      params: the model's parameters.
      batches: batches, and the examples (with their texts) in their first rows.
      mesh: the mesh for the rows.
      to_text: returns the text of tokens, up to EOS.
      cells: returns the texts of tokens, one each, including EOS and padding.
      judge: returns more numbers for each row, by name.
      samples_per_example: number of times that each example is decoded, each with its own random numbers.
      text_mask: returns the positions of a batch's texts, bool `[B, L]`, if only parts of them are written. None: the
        targets are the text.
      slots: decodes in place of `decode_step` if it can and there is more than one batch. A text that ends makes room
        for the next one then, in place of waiting for the longest of its batch.
      is_enough: lets a text that is decoded in slots stop early. Its numbers are of what is written by then.

    Yields:
      The example's own fields with "prediction" (text), "score" (see the decoder), "num_tokens" (written tokens, up to
      the one that ends the text), "num_steps" (model steps that the row took part in), "num_drafted" and
      "num_accepted" (tokens, if the decoder speculates), the judge's numbers and, if the step traces, "trace" (see
      `traces.compact`). With several samples these describe the first, and "predictions" has the texts of all. If only
      parts of a text were written, "holes" has these parts.
    """
    pays, batches = (False, batches) if slots is None else slots.pays(batches, stops=is_enough is not None)
    if slots is not None and pays:
        outputs = slots.decode(params, batches, samples_per_example, is_enough)
    else:
        outputs = decode_whole(decode_step, params, batches, mesh, samples_per_example)
    for batch, examples, (decoded, *others) in outputs:
        said = {}
        if judge:
            with jax.set_mesh(mesh):
                said = jax.device_get(judge(partitioning.put_batch(mesh, batch.replace(tokens=decoded.tokens))))
        given = np.asarray(batch.target_mask)
        masks = given if text_mask is None else text_mask(batch)
        for row, example in enumerate(examples):
            text = np.flatnonzero(masks[row])
            texts = [to_text(output.tokens[row, text].tolist()) for output in (decoded, *others)]
            targets = given if decoded.target_mask is None else np.asarray(decoded.target_mask)
            record = {
                **example,
                "prediction": texts[0],
                "score": float(decoded.scores[row]),
                "num_tokens": int(decoded.num_tokens[row]),
                "num_steps": int(decoded.row_steps[row]),
                **{name: float(values[row]) for name, values in said.items()},
            }
            if decoded.num_drafted is not None and decoded.num_accepted is not None:
                record["num_drafted"] = int(decoded.num_drafted[row])
                record["num_accepted"] = int(decoded.num_accepted[row])
            if text_mask is not None:
                record["holes"] = _holes(cells(decoded.tokens[row, text].tolist()), targets[row, text])
            if others:
                record["predictions"] = texts
            if decoded.trace is not None:
                steps = jax.tree.map(lambda x: x[:, row, text], decoded.trace)  # noqa: B023
                record["trace"] = traces.compact(steps, targets[row, text], record["num_steps"], cells)
            yield record


def decode_whole(
    decode_step: DecodeStep,
    params: Params,
    batches: Iterable[tuple[Batch, Sequence[Example]]],
    mesh: Mesh,
    samples: int,
) -> Iterator[tuple[Batch, Sequence[Example], list[Decoded]]]:
    """Yields each batch with its output for each sample, numpy; only the first one's has a trace."""
    for batch, examples in batches:
        with jax.set_mesh(mesh):
            placed = partitioning.put_batch(mesh, batch)
            first = jax.device_get(decode_step(params, placed, np.int32(0)))
            others = [
                jax.device_get(decode_step(params, placed, np.int32(sample)).replace(trace=None))
                for sample in range(1, samples)
            ]
        yield batch, examples, [first, *others]


def _holes(cells: Sequence[str], written: np.ndarray) -> list[str]:
    """Returns the texts of the written parts of a text."""
    runs = itertools.groupby(zip(cells, written.tolist(), strict=True), lambda cell: cell[1])
    return ["".join(text for text, _ in run) for is_hole, run in runs if is_hole]


def write_jsonl(path: str, records: Iterable[Mapping[str, Any]]) -> None:
    """Writes records as JSON lines, atomically; only the first process of a run writes."""
    if jax.process_index() == 0:
        write_json_lines(path, records)
