"""Makes on-policy batches: the student itself writes the texts that it is trained on (OPDLM, arXiv 2606.06712)."""

import dataclasses
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from diffusion_t5x import partitioning
from diffusion_t5x.data.batch import Batch
from diffusion_t5x.data.dataset import Dataset
from diffusion_t5x.decoding.block import BlockDecoder
from diffusion_t5x.errors import UserError
from diffusion_t5x.models.config import ModelConfig
from diffusion_t5x.models.streams import stream
from diffusion_t5x.models.transformer import ModelDefinition, Params
from diffusion_t5x.objectives.objective import Objective
from diffusion_t5x.training.loop import BatchIterator
from diffusion_t5x.training.state import TrainState

_STORED = "rollout_"  # texts in the data's state


@dataclasses.dataclass(frozen=True)
class Rollout:
    """Settings for decoding the student's own texts. Prompts are the training data's inputs; its targets are unused.

    Attributes:
      decoder: writes the texts, in the objective's blocks.
      num_batches: number of training batches decoded at once, with the same parameters.
      min_length, max_length: maximum tokens of a text at the beginning and at the end; the growth is linear.
      growth_steps: number of training steps over which they grow.
      num_buckets: number of row lengths: `max_length`, half of it, a quarter and so on; each is compiled once.
    """

    decoder: BlockDecoder
    num_batches: int = 16
    min_length: int = 100
    max_length: int = 4000
    growth_steps: int = 100
    num_buckets: int = 4

    def __post_init__(self) -> None:
        if not self.decoder.inner.keeps_written:
            raise UserError(f"Rollout.decoder must write masked blocks: a step's state is what is masked; got {self}.")
        if min(self.num_batches, self.min_length, self.num_buckets) < 1 or self.growth_steps < 0:
            raise UserError(f"Rollout needs numbers of at least 1, growth_steps of at least 0; got {self}.")
        if self.min_length > self.max_length:
            raise UserError(f"Rollout.min_length must not exceed max_length; got {self}.")

    def length(self, step: int) -> int:
        """Returns the maximum number of tokens of a text written at this training step."""
        grown = min(1.0, step / self.growth_steps) if self.growth_steps else 1.0
        return round(self.min_length + grown * (self.max_length - self.min_length))

    def bucket(self, length: int) -> int:
        """Returns the row length, in tokens, for texts of this length."""
        sizes = [-(-self.max_length // 2**i) for i in range(self.num_buckets)]
        return min(size for size in sizes if size >= length)


def prompts(batch: Batch, num_inputs: int, length: int, bucket: int) -> Batch:
    """Returns the inputs of a batch, each followed by `length` empty targets; rows of `num_inputs + bucket` slots.

    Args:
      batch: numpy, one example per row, inputs of at most `num_inputs` tokens.
      num_inputs: number of slots for the inputs.
      length: number of targets.
      bucket: number of slots for the targets.
    """
    slots = np.arange(num_inputs + bucket, dtype=np.int32)
    given = np.sum(batch.input_mask, axis=-1, keepdims=True)
    tokens = np.zeros((len(given), len(slots)), np.int32)
    tokens[:, :num_inputs] = np.where(batch.input_mask, batch.tokens, 0)[:, :num_inputs]
    there = slots < given + length
    return Batch(
        tokens=tokens,
        target_mask=there & (slots >= given),
        segment_ids=there.astype(np.int32),
        positions=np.where(there, slots, 0),
        example_ids=batch.example_ids,
    )


def make_rollout_step(
    mesh: Mesh, definition: ModelDefinition, decoder: BlockDecoder, *, seed: int
) -> Callable[[Params, Batch, int | jax.Array], Batch]:
    """Returns the jitted `(params, prompts, step) -> texts`: prompts with written texts, and when each was written.

    A text extends to the end of the block in which it ended, as its decoder did. The tokens after its end are those
    that the student saw as it wrote the block. Draws are keyed by `(seed, step, example_ids)`.
    """

    base = stream(jax.random.key(seed), "rollouts")

    def write(params: Params, batch: Batch, step: int | jax.Array) -> Batch:
        key = jax.random.fold_in(base, step)
        decoded = decoder.decode(definition.bind(params), batch, key)
        there = batch.input_mask | (decoded.written_at >= 0)
        return batch.replace(
            tokens=jnp.where(there, decoded.canvas, definition.vocabulary.pad_id),
            target_mask=batch.target_mask & there,
            segment_ids=jnp.where(there, batch.segment_ids, 0),
            positions=jnp.where(there, batch.positions, 0),
            written_at=decoded.written_at,
        )

    return jax.jit(write, out_shardings=partitioning.batch_sharding(mesh))


class OnPolicyBatches:
    """Training batches that the student writes, `num_batches` at once; they have a position, like other data.

    Args:
      mesh: the mesh for the rows.
      definition: the student.
      rollout: settings of the rollout.
      prompts: this process's share of batches of prompts, one per row.
      num_inputs: number of tokens of the longest prompt.
      batch_size: number of rows in a training batch over all processes.
      seed: seed of the draws.
    """

    def __init__(
        self,
        mesh: Mesh,
        definition: ModelDefinition,
        rollout: Rollout,
        prompts: BatchIterator,
        num_inputs: int,
        batch_size: int,
        seed: int,
    ):
        self._mesh, self._rollout, self._prompts, self._num_inputs = mesh, rollout, prompts, num_inputs
        self._batch_size = batch_size
        self._write = make_rollout_step(mesh, definition, rollout.decoder, seed=seed)
        self._texts: list[Batch] = []

    def next_batch(self, state: TrainState) -> Batch:
        """Returns the next batch, numpy; if none is left, writes new ones with the parameters of this state."""
        if not self._texts:
            step = int(state.step)
            length = self._rollout.length(step)
            asked = [self._ask(number, length) for number in range(self._rollout.num_batches)]
            batch = partitioning.put_rows(self._mesh, jax.tree.map(lambda *x: np.concatenate(x), *asked))
            written = partitioning.whole(self._write(state.params, batch, step))
            order = np.argsort(written.example_ids).reshape(len(asked), self._batch_size)
            self._texts = [jax.tree.map(lambda x: x[rows], written) for rows in order]  # noqa: B023  (called at once)
            # In training a row's id is its index in the global batch again.
            self._texts = [text.replace(example_ids=text.example_ids % self._batch_size) for text in self._texts]
        share, num_shares = partitioning.share_of_rows(self._mesh)
        size = self._batch_size // num_shares
        return jax.tree.map(lambda x: x[share * size : (share + 1) * size], self._texts.pop(0))

    def _ask(self, number: int, length: int) -> Batch:
        batch = next(self._prompts)
        batch = batch.replace(example_ids=batch.example_ids + number * self._batch_size)
        return prompts(batch, self._num_inputs, length, self._rollout.bucket(length))

    def state_dict(self) -> dict[str, np.ndarray]:
        """Returns the prompts' position, and the texts that are written and not used yet."""
        texts = jax.tree.map(lambda *x: np.stack(x), *self._texts) if self._texts else None
        stored = {_STORED + name: x for name, x in vars(texts).items() if x is not None} if texts else {}
        return self._prompts.state_dict() | stored

    def load_state_dict(self, state: Mapping[str, np.ndarray]) -> None:
        stored = {name.removeprefix(_STORED): x for name, x in state.items() if name.startswith(_STORED)}
        self._prompts.load_state_dict({name: x for name, x in state.items() if not name.startswith(_STORED)})
        number = len(stored["tokens"]) if stored else 0
        self._texts = [Batch(**{name: x[i] for name, x in stored.items()}) for i in range(number)]


def check_rollout(objective: Objective, model: ModelConfig, rollout: Rollout | None, dataset: Dataset) -> None:
    """Raises a UserError if objective, rollout and data do not match."""
    name = type(objective).__name__
    if rollout is None:
        if objective.needs_rollouts:
            raise UserError(
                f"{name} needs texts that the model writes: set train.rollout. (Distillation with "
                'states = "random" takes the data\'s own.)'
            )
        return
    if not objective.takes_rollouts:
        raise UserError(f"A rollout needs an objective that learns from it, such as Distillation, not {name}.")
    if model.architecture != "decoder_only":
        raise UserError("A rollout is for decoder-only models: include models/decoder_only.gin.")
    size = objective.attention.block_size
    if rollout.decoder.block_size != size:
        raise UserError(
            f"Rollout.decoder writes blocks of {rollout.decoder.block_size}, but {name} has blocks of {size}."
        )
    if (here := rollout.decoder.blocks_from) != (there := objective.attention.blocks_from):
        raise UserError(
            f'Rollout.decoder has blocks_from = "{here}", but {name} has "{there}": set both by --gin.BLOCKS_FROM.'
        )
    if dataset.pack or "inputs" not in dataset.task_feature_lengths:
        raise UserError(f"A rollout needs prompts, one a row: {dataset.name} with a feature 'inputs' and pack = False.")
    rows = dataset.task_feature_lengths["inputs"] + rollout.max_length
    model.check_length(rows, f"the inputs of {dataset.name} with Rollout.max_length")
