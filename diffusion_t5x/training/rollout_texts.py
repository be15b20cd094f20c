"""The texts of a rollout: prompts, and what the model writes to them in slots."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Bool

from diffusion_t5x import partitioning
from diffusion_t5x.data.batch import Batch
from diffusion_t5x.decoding.absorbing import AbsorbingRule
from diffusion_t5x.decoding.autoregressive import AutoregressiveDecoder
from diffusion_t5x.decoding.block import BlockDecoder
from diffusion_t5x.decoding.slots import SlotEngine
from diffusion_t5x.decoding.sundae import SundaeDecoder
from diffusion_t5x.models.streams import stream
from diffusion_t5x.models.transformer import ModelDefinition, Params, Transformer
from diffusion_t5x.shapes import AnyBoolBL, FloatBL, IntBL, KeyScalar

RolloutDecoder = BlockDecoder | AutoregressiveDecoder | SundaeDecoder | AbsorbingRule
Prepare = Callable[[Transformer, Batch, KeyScalar], Batch]  # an objective's `prepare_rollout`


def prompts(batch: Batch, num_inputs: int, length: int, bucket: int) -> Batch:
    """Returns the inputs of a batch, each followed by `length` empty targets; rows of `num_inputs + bucket` slots.

    An encoder's inputs stay where they are, and rows have `bucket` slots.

    Args:
      batch: numpy, one example per row, inputs of at most `num_inputs` tokens.
      num_inputs: number of slots for the inputs.
      length: number of targets.
      bucket: number of slots for the targets.
    """
    num_inputs = num_inputs if batch.encoder_tokens is None else 0
    slots = np.arange(num_inputs + bucket, dtype=np.int32)
    given = np.sum(batch.input_mask, axis=-1, keepdims=True)
    tokens = np.zeros((len(given), len(slots)), np.int32)
    tokens[:, :num_inputs] = np.where(batch.input_mask, batch.tokens, 0)[:, :num_inputs]
    there = slots < given + length
    return batch.replace(
        tokens=tokens,
        target_mask=there & (slots >= given),
        segment_ids=there.astype(np.int32),
        positions=np.where(there, slots, 0),
    )


def own_targets(
    batch: Batch, asked: Batch, rows: Bool[np.ndarray, " batch"]
) -> tuple[Batch, Bool[np.ndarray, "batch length"]]:
    """Returns the prompts with the data's own targets in some rows, truncated to the canvas, and where these are.

    Args:
      batch: numpy, as in `prompts`.
      asked: the prompts made of it.
      rows: True for rows that get their targets.
    """
    room = max(asked.tokens.shape[1] - batch.tokens.shape[1], 0)
    tokens, mask = (
        np.pad(x, ((0, 0), (0, room)))[:, : asked.tokens.shape[1]] for x in (batch.tokens, batch.target_mask)
    )
    given = mask & asked.target_mask & rows[:, None]
    return asked.replace(tokens=np.where(given, tokens, asked.tokens)), given


def rollout_key(seed: int | np.integer, step: int) -> KeyScalar:
    """Returns the key of all draws of the rollout that is written at this training step."""
    return jax.random.fold_in(stream(jax.random.key(seed), "rollouts"), step)


def texts_of(
    asked: Batch,
    canvas: IntBL,
    written_at: IntBL,
    log_probability: FloatBL,
    pad_id: int,
    given: AnyBoolBL | None = None,
) -> Batch:
    """Returns prompts with the texts that were written to them; texts record when each token was written.

    A text extends to the end of the block, or of the canvas, in which it ended, as its decoder did. The tokens after
    its end are those that the student saw as it wrote.

    Args:
      asked: the prompts.
      canvas, written_at, log_probability: what was written; see `Decoded`.
      pad_id: the token in all other slots.
      given: targets that were not written, see `own_targets`.
    """
    there = asked.input_mask | (written_at >= 0)
    if given is not None:
        there |= given
    return asked.replace(
        tokens=jnp.where(there, canvas, pad_id),
        target_mask=asked.target_mask & there,
        segment_ids=jnp.where(there, asked.segment_ids, 0),
        positions=jnp.where(there, asked.positions, 0),
        written_at=written_at,
        written_log_probability=log_probability,
    )


def denoised(decoder: SundaeDecoder, model: Transformer, asked: Batch, key: KeyScalar) -> Batch:
    """Returns prompts with the texts that were written to them, and what each step read and drew."""
    decoded = decoder.decode(model, asked, key, trace=True)
    assert decoded.trace is not None
    steps = jnp.swapaxes(decoded.trace.tokens, 0, 1)[:, :-1]
    probability = jnp.swapaxes(decoded.trace.confidence, 0, 1)[:, 1:]
    is_target = jnp.asarray(asked.target_mask)[:, None]
    return asked.replace(
        tokens=jnp.where(asked.target_mask, decoded.canvas, asked.tokens),
        written_at=decoded.written_at,
        written_log_probability=jnp.zeros(asked.tokens.shape, jnp.float32),
        canvases=steps,
        canvas_log_probability=jnp.where(is_target, jnp.log(jnp.where(is_target, probability, 1)), 0),
    )


class TextWriter:
    """Writes the texts of rollouts in slots, or chains of canvases in batches; compiled once for each length of rows.

    Args:
      mesh: the mesh for the rows.
      definition: the student.
      decoder: writes the texts.
      prepare: the objective's.
      num_slots: number of texts that are written at once.
      batch_size: number of texts that are prepared at once.
      seed: seed of the draws, which are keyed by `(seed, step, example_ids)`.
    """

    def __init__(
        self,
        mesh: Mesh,
        definition: ModelDefinition,
        decoder: RolloutDecoder,
        prepare: Prepare,
        *,
        num_slots: int,
        batch_size: int,
        seed: int,
    ):
        self._mesh, self._definition, self._decoder = mesh, definition, decoder
        self._num_slots, self._batch_size, self._seed = num_slots, batch_size, np.uint32(seed % 2**32)
        self._engines: dict[int, SlotEngine] = {}

        def finish(params, asked, canvas, written_at, log_probability, given, key_data):
            texts = texts_of(asked, canvas, written_at, log_probability, definition.vocabulary.pad_id, given)
            key = stream(jax.random.wrap_key_data(key_data), "prepare")
            return prepare(definition.bind(params), texts, key)

        def denoise(params, asked, key_data):
            assert isinstance(decoder, SundaeDecoder)
            return denoised(decoder, definition.bind(params), asked, jax.random.wrap_key_data(key_data))

        self._denoise = jax.jit(denoise, out_shardings=partitioning.replicated(mesh))
        self._finish = jax.jit(finish, out_shardings=partitioning.replicated(mesh))

    def write(
        self, params: Params, asked: Batch, step: int, given: Bool[np.ndarray, "batch length"] | None = None
    ) -> Batch:
        """Returns the prompts with their texts, numpy; see `texts_of`.

        Args:
          params: the student's parameters.
          asked: numpy, the prompts of whole batches; every process has all of them.
          step: number of training steps taken before.
          given: targets that are kept; a row that has some is not written.
        """
        key = rollout_key(self._seed, step)
        if isinstance(self._decoder, SundaeDecoder):
            return self._in_batches(self._denoise, params, asked, key)
        canvas = np.array(asked.tokens)
        written_at, log_probability = np.full(canvas.shape, -1, np.int32), np.zeros(canvas.shape, np.float32)
        wanted = range(len(canvas)) if given is None else np.flatnonzero(~given.any(axis=-1)).tolist()
        rows = ((row, jax.tree.map(lambda x: x[row : row + 1], asked), 0) for row in wanted)  # noqa: B023
        for row, decoded in self._engine(asked).with_params(params, key).decode(rows):
            assert decoded.log_probability is not None  # all of these decoders have it
            canvas[row], written_at[row] = decoded.canvas[0], decoded.written_at[0]
            log_probability[row] = decoded.log_probability[0]
        written = (asked, canvas, written_at, log_probability, given)
        return self._in_batches(lambda params, rows, key: self._finish(params, *rows, key), params, written, key)

    def _in_batches(self, function: Callable[..., Batch], params: Params, rows: Any, key: KeyScalar) -> Batch:
        """Returns a jitted function's batches of some rows, put together, numpy."""
        key_data = partitioning.put_whole(self._mesh, np.asarray(jax.random.key_data(key)))
        done = []
        for first in range(0, len(jax.tree.leaves(rows)[0]), self._batch_size):
            some = jax.tree.map(lambda x: x[first : first + self._batch_size], rows)  # noqa: B023
            done.append(jax.device_get(function(params, partitioning.put_batch(self._mesh, some), key_data)))
        return jax.tree.map(lambda *x: np.concatenate(x), *done)

    def _engine(self, asked: Batch) -> SlotEngine:
        """Returns an engine for rows of these widths, without parameters."""
        pieces = partitioning.pieces_of("length", self._mesh)
        length = -(-asked.tokens.shape[1] // pieces) * pieces
        encoder_length = None if asked.encoder_tokens is None else asked.encoder_tokens.shape[1]
        if length not in self._engines:
            self._engines[length] = SlotEngine(
                self._mesh,
                self._definition,
                {},
                self._decoder,
                num_slots=self._num_slots,
                length=length,
                encoder_length=encoder_length,
            )
        return self._engines[length]
