"""Decodes for the Python API: row by row, or many rows in slots."""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from diffusion_t5x.chat.prompts import Prompts
from diffusion_t5x.data import stop_strings
from diffusion_t5x.data.batch import Batch
from diffusion_t5x.data.text_rows import TextRows
from diffusion_t5x.data.vocabularies import token_ids
from diffusion_t5x.data.vocabulary import AnyVocabulary
from diffusion_t5x.decoding.decoder import Decoded, Decoder
from diffusion_t5x.evaluation.in_slots import SlotDecoding
from diffusion_t5x.evaluation.inference import make_decode_step, predict
from diffusion_t5x.models.streams import seed_number
from diffusion_t5x.models.transformer import ModelDefinition, Params

Batches = Sequence[tuple[Batch, list[dict[str, Any]]]]

_SLOTS = 8


def batch_size(num_texts: int, stops: bool = False) -> int:
    """Returns the number of rows of a batch, which is that of slots; 1 for a few texts, which are decoded one by one.

    Args:
      num_texts: number of texts.
      stops: texts may stop early, which they do in slots alone.
    """
    return min(num_texts, _SLOTS) if stops or num_texts > _SLOTS else 1


def together(rows: Batches, stops: bool = False) -> Batches:
    """Returns batches of one row in batches of `batch_size`; empty rows fill the last one."""
    size = batch_size(len(rows), stops)
    if size <= 1:
        return rows
    widths = jax.tree.map(lambda *x: max(one.shape[-1] for one in x), *(batch for batch, _ in rows))

    def joined(*rows: np.ndarray, width: int) -> np.ndarray:
        if rows[0].ndim == 1:
            return np.concatenate([*rows, np.zeros(size - len(rows), rows[0].dtype)])
        padded = [np.pad(row, ((0, 0), (0, width - row.shape[1]))) for row in rows]
        return np.concatenate([*padded, np.zeros((size - len(rows), width), rows[0].dtype)])

    found = []
    for first in range(0, len(rows), size):
        group = rows[first : first + size]
        batch = jax.tree.map(lambda width, *x: joined(*x, width=width), widths, *(row for row, _ in group))
        found.append((batch, [example for _, examples in group for example in examples]))
    return found


@dataclasses.dataclass(frozen=True, eq=False)
class Decoding:
    """Decodes batches, with programs that are compiled once for each setting.

    Attributes:
      mesh: a mesh of one device.
      definition: the model.
      tokenizer: its vocabulary.
    """

    mesh: Mesh
    definition: ModelDefinition
    tokenizer: AnyVocabulary

    def records(
        self,
        params: Params,
        batches: Batches,
        decoder: Decoder,
        rows: TextRows | Prompts,
        seed: int,
        samples: int = 1,
        trace: bool = False,
        text_mask: Callable[[Batch], np.ndarray] | None = None,
        stops: Sequence[str] = (),
    ) -> Iterator[dict[str, Any]]:
        """Yields one record per text, like `infer`.

        Args:
          params: the model's parameters.
          batches: of `batch_size` rows.
          decoder: writes the texts.
          rows: converts tokens to text.
          seed: random seed.
          samples: number of texts for each row.
          trace: keep every step.
          text_mask: see `predict`; texts have holes.
          stops: strings before which a text ends.
        """
        program, slots = self._programs(decoder, trace, text_mask is not None)
        has_slots = bool(stops) or any(len(batch.tokens) > 1 for batch, _ in batches)

        def step(params: Params, batch: Batch, sample: np.int32) -> Decoded:
            return program(params, batch, sample, seed_number(seed))

        def to_text(tokens: Sequence[int]) -> str:
            return stop_strings.trim(rows.to_text(tokens), stops).text

        def is_enough(example: dict[str, Any], tokens: list[int]) -> bool:
            return stop_strings.stopped(rows.to_text(tokens), stops)

        yield from predict(
            step,
            params,
            batches,
            self.mesh,
            to_text,
            rows.cells,
            samples_per_example=samples,
            text_mask=text_mask,
            slots=slots.with_seed(seed) if has_slots else None,
            is_enough=is_enough if stops else None,
        )

    @functools.cached_property
    def _programs(self) -> Callable[..., tuple[jax.stages.Wrapped, SlotDecoding]]:
        """Returns the programs for these settings, compiled once for all seeds."""

        @functools.cache
        def make(decoder: Decoder, trace: bool, in_holes: bool) -> tuple[jax.stages.Wrapped, SlotDecoding]:
            ids = token_ids(self.tokenizer).for_infilling() if in_holes else self.definition.vocabulary
            definition = dataclasses.replace(self.definition, vocabulary=ids)
            step = make_decode_step(self.mesh, definition, decoder, seed=0, trace=trace)
            return step, SlotDecoding(self.mesh, definition, decoder, seed=0)

        return make
