"""Writes answers one at a time, and times them."""

import dataclasses
import time

import jax
import numpy as np
from jax.sharding import Mesh

from diffusion_t5x import partitioning
from diffusion_t5x.data.batch import Batch
from diffusion_t5x.decoding.decoder import Decoder, Watch
from diffusion_t5x.evaluation.inference import make_decode_step
from diffusion_t5x.models.transformer import ModelDefinition, Params


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
    """Decodes batches of one row; rows of the same length share a program.

    Args:
      mesh: the device mesh.
      definition, params: the model.
      decoder: writes the texts.
      seed: random seed, see `make_decode_step`.
      watch: shown every step; None decodes with the same program as `infer`.
    """

    def __init__(
        self,
        mesh: Mesh,
        definition: ModelDefinition,
        params: Params,
        decoder: Decoder,
        seed: int,
        watch: Watch | None = None,
    ):
        self._mesh = mesh
        self._params = params
        self._step = make_decode_step(mesh, definition, decoder, seed=seed, trace=watch or False)
        self._programs: dict[tuple[tuple[int, ...], ...], jax.stages.Compiled] = {}

    def write(self, batch: Batch, sample: int = 0) -> Answer:
        """Answers a batch's only row; each `sample` number has random draws of its own."""
        with jax.set_mesh(self._mesh):
            arguments = self._params, partitioning.put_batch(self._mesh, batch), np.int32(sample)
            shapes = tuple(x.shape for x in jax.tree.leaves(batch))
            start = compiled = time.perf_counter()
            if shapes not in self._programs:
                self._programs[shapes] = self._step.lower(*arguments).compile()
                compiled = time.perf_counter()
            decoded = jax.device_get(self._programs[shapes](*arguments))
            end = time.perf_counter()
        return Answer(
            tokens=decoded.tokens[0, batch.target_mask[0]].tolist(),
            num_tokens=int(decoded.num_tokens[0]),
            num_steps=int(decoded.row_steps[0]),
            seconds=end - compiled,
            compile_seconds=compiled - start,
        )
