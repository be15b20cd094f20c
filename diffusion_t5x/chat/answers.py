"""Writes answers one at a time, and times them."""

import dataclasses
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from diffusion_t5x import partitioning
from diffusion_t5x.data.batch import Batch
from diffusion_t5x.decoding.decoder import Decoded, Decoder, Watch
from diffusion_t5x.decoding.rows import RowDecoder
from diffusion_t5x.decoding.slot_programs import SlotPrograms
from diffusion_t5x.decoding.slots import cut_short, key_data
from diffusion_t5x.evaluation.inference import make_decode_step
from diffusion_t5x.models.transformer import ModelDefinition, Params

IsEnough = Callable[[list[int]], bool]
Write = Callable[[Batch, int], Decoded]


@dataclasses.dataclass(frozen=True)
class Answer:
    """A decoded answer and its figures.

    Attributes:
      tokens: the canvas, padded after the end of the text.
      num_tokens: number of tokens in the text, including the one that ends it.
      num_steps: number of model passes, not counting one over the prompt alone.
      seconds: decode time.
      compile_seconds: compile time before it; 0 if an earlier answer used the same program.
    """

    tokens: list[int]
    num_tokens: int
    num_steps: int
    seconds: float
    compile_seconds: float

    def figures(self) -> str:
        """Tokens, steps and speed of this answer, on one line."""
        text = (
            f"{self.num_tokens} token{'' if self.num_tokens == 1 else 's'} in {self.seconds:.3g} s, "
            f"{self.num_tokens / self.seconds:.0f} tokens/s, "
            f"{self.num_steps} pass{'' if self.num_steps == 1 else 'es'} of the model"
        )
        return f"{text}; compiled in {self.compile_seconds:.1f} s before" if self.compile_seconds else text


class Answers:
    """Decodes batches of one row; rows of the same length share programs.

    Args:
      mesh: the device mesh.
      definition, params: the model.
      decoder: writes the texts.
      seed: random seed, see `make_decode_step`.
      watch: shown every step; None decodes with the same program as `infer`.
      is_enough: told what is written so far, after each stride of a decoder that writes in order; True ends the answer.
    """

    def __init__(
        self,
        mesh: Mesh,
        definition: ModelDefinition,
        params: Params,
        decoder: Decoder,
        seed: int,
        watch: Watch | None = None,
        is_enough: IsEnough | None = None,
    ):
        self._mesh, self._definition, self._params, self._seed = mesh, definition, params, seed
        self._step = make_decode_step(mesh, definition, decoder, seed=seed, trace=watch or False)
        self._pieces = None
        if is_enough is not None and isinstance(decoder, RowDecoder) and decoder.in_order:
            self._pieces = SlotPrograms(mesh, definition, decoder, 1, None, decoder.stride, watch)
            self._is_enough = is_enough
        self._programs: dict[tuple[tuple[int, ...], ...], Write] = {}

    def write(self, batch: Batch, sample: int = 0) -> Answer:
        """Answers a batch's only row; each `sample` number has random draws of its own."""
        with jax.set_mesh(self._mesh):
            shapes = tuple(x.shape for x in jax.tree.leaves(batch))
            start = compiled = time.perf_counter()
            if shapes not in self._programs:
                self._programs[shapes] = self._compiled_whole(batch) if self._pieces is None else self._compiled(batch)
                compiled = time.perf_counter()
            decoded = self._programs[shapes](batch, sample)
            end = time.perf_counter()
        return Answer(
            tokens=decoded.tokens[0, batch.target_mask[0]].tolist(),
            num_tokens=int(decoded.num_tokens[0]),
            num_steps=int(decoded.row_steps[0]),
            seconds=end - compiled,
            compile_seconds=compiled - start,
        )

    def _compiled_whole(self, batch: Batch) -> Write:
        """Compiles the decoding of a row like this one, and returns it."""

        def arguments(batch: Batch, sample: int) -> tuple[Any, ...]:
            return self._params, partitioning.put_batch(self._mesh, batch), np.int32(sample)

        program = self._step.lower(*arguments(batch, 0)).compile()
        return lambda batch, sample: jax.device_get(program(*arguments(batch, sample)))

    def _compiled(self, batch: Batch) -> Write:
        """Compiles the decoding of a row like this one in pieces, and returns it."""
        assert self._pieces is not None
        pad_id = self._definition.vocabulary.pad_id

        def arguments(batch: Batch, sample: int) -> tuple[Any, ...]:
            row = batch, key_data(self._seed)[None], np.array([sample], np.int32)
            return self._params, *partitioning.put_batch(self._mesh, row)

        begin = self._pieces.begin.lower(*arguments(batch, 0)).compile()
        carry = jax.eval_shape(self._pieces.begin, *arguments(batch, 0))
        advance = self._pieces.advance.lower(self._params, carry).compile()
        finish = self._pieces.finish.lower(carry).compile()

        def write(batch: Batch, sample: int) -> Decoded:
            carry, finished = begin(*arguments(batch, sample)), False
            while not finished:
                carry, ended = advance(self._params, carry)
                finished, decoded = bool(ended[0]), jax.device_get(finish(carry))
                if not finished and self._is_enough(decoded.canvas[decoded.written_at >= 0].tolist()):
                    return cut_short(decoded, batch, pad_id)
            return decoded

        return write
