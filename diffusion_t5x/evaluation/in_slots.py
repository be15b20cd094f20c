"""Decodes the batches of a data set in slots: a text that ends makes room for the next one."""

import collections
import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Self, TypeVar

import jax
import numpy as np
from jax.sharding import Mesh

from diffusion_t5x.data.batch import Batch
from diffusion_t5x.decoding.decoder import Decoded, Decoder
from diffusion_t5x.decoding.rows import RowDecoder
from diffusion_t5x.decoding.slots import SlotEngine
from diffusion_t5x.models.transformer import ModelDefinition, Params

Marked = TypeVar("Marked", bound=tuple[Batch, Sequence[Any]])
Place = tuple[int, int]  # row of a batch, and number of its sample
IsEnough = Callable[[Any, list[int]], bool]
"""Is told an example and the tokens that are written for it so far; True if no more are needed."""


@dataclasses.dataclass(frozen=True)
class SlotDecoding:
    """Decodes the rows of batches in as many slots as a batch has rows. Programs are compiled once.

    Attributes:
      mesh: the mesh for the rows.
      definition: the model.
      decoder: writes the texts.
      seed: as in `inference.make_decode_step`, whose texts these are.
    """

    mesh: Mesh
    definition: ModelDefinition
    decoder: Decoder
    seed: int

    def with_seed(self, seed: int) -> Self:
        """Returns this with another seed and the same compiled programs."""
        other = dataclasses.replace(self, seed=seed)
        vars(other)["_engines"] = self._engines
        return other

    def pays(self, batches: Iterable[Marked], stops: bool = False) -> tuple[bool, Iterator[Marked]]:
        """Returns whether to decode in slots, and the batches.

        That pays if the decoder can, and if there are several batches or a row may stop early.

        Args:
          batches: what is to be decoded.
          stops: `decode` gets an `is_enough`.
        """
        batches = iter(batches)
        first = list(itertools.islice(batches, 2))
        decoder = self.decoder
        pays = isinstance(decoder, RowDecoder) and (len(first) > 1 or (stops and decoder.in_order))
        return pays, itertools.chain(first, batches)

    @functools.cached_property
    def _engines(self) -> dict[tuple[int, int, int | None], SlotEngine]:
        return {}

    def _engine(self, params: Params, batch: Batch) -> SlotEngine:
        """Returns an engine for the rows of batches like this one."""
        num_slots, length = batch.tokens.shape
        encoder_length = None if batch.encoder_tokens is None else batch.encoder_tokens.shape[1]
        shape = num_slots, length, encoder_length
        if shape not in self._engines:  # without parameters, which it would keep in memory, and for any seed
            self._engines[shape] = SlotEngine(
                self.mesh, self.definition, {}, self.decoder, num_slots=num_slots, length=length,
                encoder_length=encoder_length,
            )  # fmt: skip
        return self._engines[shape].with_params(params, jax.random.key(self.seed))

    def decode(
        self,
        params: Params,
        batches: Iterable[tuple[Batch, Sequence[Any]]],
        samples: int = 1,
        is_enough: IsEnough | None = None,
    ) -> Iterator[tuple[Batch, Sequence[Any], list[Decoded]]]:
        """Yields each batch, in order, with its output for each sample, numpy.

        Args:
          params: the model's parameters.
          batches: numpy batches of one shape, and the examples in their first rows.
          samples: number of times that each row is decoded.
          is_enough: lets rows stop early; see `SlotEngine.decode`.
        """
        batches = iter(batches)
        first = next(batches, None)
        if first is None:
            return
        done, begun = 0, collections.deque[tuple[Batch, Sequence[Any], dict[Place, Decoded]]]()

        def rows() -> Iterator[tuple[tuple[int, Place], Batch, int]]:
            for number, (batch, examples) in enumerate(itertools.chain([first], batches)):
                begun.append((batch, examples, {}))
                for row, sample in itertools.product(range(len(batch.tokens)), range(samples)):
                    yield (number, (row, sample)), jax.tree.map(lambda x: x[row : row + 1], batch), sample  # noqa: B023

        def row_has_enough(name: tuple[int, Place], tokens: list[int]) -> bool:
            number, (row, _) = name
            examples = begun[number - done][1]
            return is_enough is not None and row < len(examples) and is_enough(examples[row], tokens)

        engine, stops = self._engine(params, first[0]), row_has_enough if is_enough else None
        for (number, place), decoded in engine.decode(rows(), stops):
            begun[number - done][2][place] = decoded
            while begun and len(begun[0][2]) == samples * len(begun[0][0].tokens):
                batch, examples, found = begun.popleft()
                done += 1
                of_sample = [[found[row, sample] for row in range(len(batch.tokens))] for sample in range(samples)]
                yield batch, examples, [_joined(rows) for rows in of_sample]


def _joined(rows: Sequence[Decoded]) -> Decoded:
    """Returns the output of a batch of these rows."""
    return jax.tree.map(lambda *x: np.concatenate(x) if x[0].ndim else np.max(x), *rows)
