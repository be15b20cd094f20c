"""Block diffusion: autoregressive over blocks, diffusion inside a block (BD3-LM, arXiv 2503.09573, section 3)."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Int

from diffusion_t5x.data.batch import Batch
from diffusion_t5x.data.ends import after_end
from diffusion_t5x.data.vocabularies import TokenIds
from diffusion_t5x.errors import UserError, check_choices
from diffusion_t5x.models.masks import Annealed, AttentionKind, BlocksFrom, Slots
from diffusion_t5x.models.modes import Mode
from diffusion_t5x.models.output import Output, Ratio
from diffusion_t5x.models.reading import Reading, check_blocks, model_reads
from diffusion_t5x.models.readout import LossSoftmax, score
from diffusion_t5x.models.stack import Encoded
from diffusion_t5x.models.streams import row_keys, stream
from diffusion_t5x.models.transformer import ModelDefinition, Transformer
from diffusion_t5x.objectives.annealing import annealed, check_anneal_steps
from diffusion_t5x.objectives.likelihood import masked_bound
from diffusion_t5x.objectives.masked import SCHEDULES, Schedule, Weighting, mask_targets
from diffusion_t5x.objectives.objective import Likelihood, LossSums, Normalize, Objective, Pass, normalized, stratified
from diffusion_t5x.objectives.uniform_bound import uniform_bound
from diffusion_t5x.shapes import AnyBoolBL, FloatBL, FloatBLD, IntBL, IntScalar, KeyB, KeyScalar


def first_targets(batch: Batch) -> IntBL:
    """The position of the first target of the segment that a slot is in."""

    def count_inputs(segment_ids, input_mask):
        return jax.ops.segment_sum(input_mask.astype(jnp.int32), segment_ids, segment_ids.size + 1)[segment_ids]

    return jax.vmap(count_inputs)(batch.segment_ids, batch.input_mask)


def block_starts(batch: Batch, block_size: int | IntScalar, blocks_from: BlocksFrom = "targets") -> IntBL:
    """The row index of the first target of the block that a target is in.

    Undefined for inputs and padding. Arguments as in `AttentionKind`.
    """
    after_first = batch.positions - first_targets(batch)
    in_block = (after_first if blocks_from == "targets" else batch.positions) % block_size
    return jnp.arange(batch.tokens.shape[1]) - jnp.minimum(in_block, jnp.maximum(after_first, 0))


def clean_and_noisy(
    batch: Batch, noisy: IntBL, kind: AttentionKind | Annealed
) -> tuple[Int[jax.Array, "batch 2*length"], Slots]:
    """Rows twice as long: the clean tokens, then the targets once more with noise; and their slots.

    Inputs that share a block with targets come twice, too: what sees noise must not see what the noise hides.
    """
    kind = kind.kind if isinstance(kind, Annealed) else kind
    clean, twice = Slots.of(batch), batch.target_mask
    if kind.blocks_from == "row":
        assert kind.block_size is not None
        first = first_targets(batch)
        twice = (batch.segment_ids > 0) & (batch.positions >= first - first % kind.block_size)
    nothing = jnp.zeros_like(batch.target_mask)
    slots = Slots(
        segment_ids=jnp.concatenate([clean.segment_ids, jnp.where(twice, clean.segment_ids, 0)], axis=1),
        positions=jnp.concatenate([clean.positions] * 2, axis=1),
        is_input=jnp.concatenate([clean.is_input, nothing], axis=1),
        is_noisy=jnp.concatenate([nothing, ~nothing], axis=1),
        index=jnp.tile(jnp.arange(noisy.shape[1]), 2)[None],
    )
    return jnp.concatenate([batch.tokens, noisy], axis=1), slots


def noisy_output(
    model: Transformer,
    reading: Reading,
    starts: IntBL,
    noisy: IntBL,
    kind: AttentionKind | Annealed,
    encoded: Encoded | None,
    dropout_keys: KeyB | None = None,
) -> Output:
    """Runs a pass whose hidden states predict noisy targets; these see all before their block clean.

    Args:
      model: reads the clean tokens, and the noisy ones in the same pass.
      reading: reading of the batch.
      starts: see `block_starts`.
      noisy: the tokens, with noise in place of some targets.
      kind: "block_diffusion", or in transition to it.
      encoded: the inputs of an encoder-decoder.
      dropout_keys: a key for each row; None switches dropout off.
    """
    check_blocks(kind, model.config.shifted)
    tokens, slots = clean_and_noisy(reading.batch, reading.tokens(noisy, model.vocabulary), kind)
    output, width = model(tokens, slots, kind, encoded, dropout_keys), reading.batch.tokens.shape[1]
    if not reading.shifted:
        return output.replace(hidden=output.hidden[:, width:])
    # A block's first token is predicted in the clean slot before it, but not in its own.
    is_first = starts == jnp.arange(noisy.shape[1])
    if not model.vocabulary.reads_start:
        is_first &= reading.batch.positions > 0
    return output.replace(hidden=reading.states(output.hidden, jnp.where(is_first, 0, width)))


@dataclasses.dataclass(frozen=True)
class InBlocks(Objective):
    """The common part of objectives that predict the noisy targets of a block given everything before it, clean.

    Attributes:
      block_size: number of targets per block.
      blocks_from: where blocks are counted from, see `AttentionKind`.
      softmax: what the loss is over, see `Masked`.
    """

    block_size: int = 4
    blocks_from: BlocksFrom = dataclasses.field(default="targets", kw_only=True)
    softmax: LossSoftmax = dataclasses.field(default="allowed", kw_only=True)

    def __post_init__(self) -> None:
        check_choices(self)
        AttentionKind("block_causal", self.block_size, self.blocks_from)  # raises on a bad block size

    @property
    def attention(self) -> AttentionKind:
        return AttentionKind("block_causal", self.block_size, self.blocks_from)

    @property
    def modes(self) -> tuple[Mode, ...]:
        return (Mode.of(self.attention, "mask"),)

    @property
    def passes(self) -> Sequence[Pass]:
        return (Pass(slots=2),)

    def noisy(self, vocabulary: TokenIds, batch: Batch, key: KeyScalar) -> IntBL:
        """Returns the tokens with noise in place of some targets, as `loss` has them with this key."""
        raise NotImplementedError

    def model_inputs(self, model: ModelDefinition, batch: Batch, key: KeyScalar) -> IntBL:
        """Returns the noisy targets among their clean inputs; the model reads the clean targets as well."""
        return model_reads(self.noisy(model.vocabulary, batch, key), batch, model)

    def output(
        self,
        model: Transformer,
        batch: Batch,
        noisy: IntBL,
        dropout_keys: KeyB | None = None,
        kind: AttentionKind | Annealed | None = None,
    ) -> tuple[Batch, Output]:
        """Runs the pass over clean and noisy targets.

        Args:
          model: reads them.
          batch: the clean tokens, of rows that may be packed.
          noisy: see `noisy`.
          dropout_keys: a key for each row; None switches dropout off.
          kind: "block_diffusion", or in transition to it; None: in blocks of `block_size`.

        Returns:
          The batch without the tokens that had no room, and hidden states that predict the noisy targets.
        """
        kind = kind or AttentionKind("block_diffusion", self.block_size, self.blocks_from)
        size = (kind.kind if isinstance(kind, Annealed) else kind).block_size
        assert size is not None
        reading = Reading.of(batch, model.vocabulary, model.config.shifted, packed=True)
        batch = reading.fits(batch)
        starts = block_starts(batch, size, self.blocks_from)
        encoded = model.encode(batch, dropout_keys)
        return batch, noisy_output(model, reading, starts, noisy, kind, encoded, dropout_keys)

    def log_likelihood(self, model: Transformer, batch: Batch, key: KeyScalar, num_draws: int) -> Likelihood:
        """Sums each block's lower bound given the clean blocks before it, up to the block in which the text ends.

        A decoder stops there. The tokens of the last block that it drops count as they are in the batch, which is one
        of the ways to write the text: still a lower bound. Masked blocks of one target need no draws and are exact.
        """
        starts, counted, hidden = self._bounded(model, batch)

        def nll(tokens):
            return score(model, hidden(tokens), batch.tokens)[0]

        num_draws = 2 if self.block_size == 1 else num_draws
        return masked_bound(nll, model.vocabulary, batch, starts, counted, key, num_draws)

    def _bounded(self, model: Transformer, batch: Batch) -> tuple[IntBL, AnyBoolBL, Callable[[IntBL], FloatBLD]]:
        """Returns the targets' block starts, the targets that a bound counts, and `noisy -> hidden states`."""
        encoded = model.encode(batch)
        starts = jnp.clip(block_starts(batch, self.block_size, self.blocks_from), 0)
        ended = after_end(batch.tokens, batch, model.vocabulary)
        counted = batch.target_mask & ~jnp.take_along_axis(ended, starts, axis=-1)
        reading = Reading.of(batch, model.vocabulary, model.config.shifted)
        kind = AttentionKind("block_diffusion", self.block_size, self.blocks_from)
        return starts, counted, lambda tokens: noisy_output(model, reading, starts, tokens, kind, encoded).hidden


@dataclasses.dataclass(frozen=True)
class Block(InBlocks):
    """Cross-entropy of the noisy targets of each block given the rest of the block and everything before it, clean.

    One pass over `[clean tokens | noisy targets]` gives the loss of every block. Each block draws its own time,
    stratified over the batch.

    A shifted model (`ModelConfig.shifted`) predicts the first token of a block in the clean slot before the block
    (Fast-dLLM v2, arXiv 2509.26328). At block size 1, with everything masked, its loss is the autoregressive one.

    Attributes:
      block_size: number of targets per block. 1 is autoregressive (but reads MASK where an autoregressive model reads
        the previous token); a block as long as the targets is one diffusion over all of them.
      stages: `((0, size), (step, size), ...)`, block sizes from these training steps on; the last is `block_size`
        (the warm-up phase of LLaDA2.0's schedule, arXiv 2512.15745). None trains with `block_size` alone.
      noise: "mask" hides tokens, and the loss is that of hidden tokens. "uniform" replaces tokens, and the loss is that
        of all tokens, without weights: not a bound (SUNDAE's first term, inside blocks).
      schedule: see `Masked`.
      weighting: weighting of a masked token, see `Masked`; noise "uniform" needs "uniform".
      epsilon: minimum time, which bounds the weights.
      anneal_steps: training steps over which attention inside blocks becomes bidirectional, see `annealed`; None: no
        annealing.
      normalize: what the summed loss is divided by.
      blocks_from: where blocks are counted from, see `AttentionKind`.
      softmax: what the loss is over, see `Masked`.
    """

    stages: tuple[tuple[int, int], ...] | None = None
    noise: Literal["mask", "uniform"] = "mask"
    schedule: Schedule = "linear"
    weighting: Weighting = "elbo"
    epsilon: float = 1e-3
    anneal_steps: int | None = None
    normalize: Normalize = "target_tokens"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_anneal_steps(self.anneal_steps)
        if not 0 <= self.epsilon < 1:
            raise UserError(f"Block.epsilon must lie in [0, 1); got {self.epsilon}.")
        if self.noise == "uniform" and self.weighting != "uniform":
            raise UserError('Block.weighting must be "uniform" with uniform noise: no bound is known here for it.')
        if self.stages is not None:
            self._check_stages(self.stages)

    def _check_stages(self, stages: Sequence[Sequence[int]]) -> None:
        pairs = all(isinstance(stage, tuple | list) and len(stage) == 2 for stage in stages)
        steps, sizes = zip(*stages, strict=True) if stages and pairs else ((), ())
        if not sizes or list(steps) != sorted({0, *steps}) or min(sizes) < 1 or sizes[-1] != self.block_size:
            raise UserError(
                "Block.stages must be pairs (step, block size) whose steps begin with 0 and grow, the last size being "
                f"block_size = {self.block_size}; got {stages}."
            )

    @property
    def modes(self) -> tuple[Mode, ...]:
        return (Mode.of(self.attention, self.noise),)

    def noisy(self, vocabulary: TokenIds, batch: Batch, key: KeyScalar) -> IntBL:
        return self.corrupt(vocabulary, batch, key)[0]

    def corrupt(
        self, vocabulary: TokenIds, batch: Batch, key: KeyScalar, size: int | IntScalar | None = None
    ) -> tuple[IntBL, FloatBL]:
        """Returns for every position the token or noise, and its weight in the bound if it is masked.

        Blocks have `size` targets, by default `block_size`.
        """
        starts = block_starts(batch, self.block_size if size is None else size, self.blocks_from)
        share = stratified(stream(key, "time"), batch.example_ids, starts)
        probability, weights = SCHEDULES[self.schedule](1 - (1 - self.epsilon) * share)
        noisy = mask_targets(batch, vocabulary, probability, row_keys(stream(key, "where"), batch.example_ids))
        if self.noise == "uniform":
            noise_keys = row_keys(stream(key, "noise"), batch.example_ids)
            noise = jax.vmap(vocabulary.sample_noise, (0, None))(noise_keys, batch.tokens.shape[1:])
            noisy = jnp.where(noisy == vocabulary.mask_id, noise, batch.tokens)
        return noisy, weights

    def _size_at(self, step: IntScalar | None) -> int | IntScalar:
        """Returns the block size of a training step: a traced number, so that all stages are one program."""
        if self.stages is None or step is None:
            return self.block_size
        steps, sizes = (jnp.asarray(numbers) for numbers in zip(*self.stages, strict=True))
        return sizes[jnp.searchsorted(steps, step, side="right") - 1]

    def loss(
        self,
        model: Transformer,
        batch: Batch,
        key: KeyScalar,
        train: bool = True,
        step: IntScalar | None = None,
        teacher: Transformer | None = None,
    ) -> LossSums:
        dropout_keys = row_keys(stream(key, "dropout"), batch.example_ids) if train else None
        size = self._size_at(step)
        noisy, weights = self.corrupt(model.vocabulary, batch, key, size)
        kind = annealed(AttentionKind("block_diffusion", size, self.blocks_from), self.anneal_steps, step, key)
        batch, output = self.output(model, batch, noisy, dropout_keys, kind)
        nll, correct = score(model, output.hidden, batch.tokens, self.softmax)
        scored = batch.target_mask
        metrics = {"noise_fraction": normalized(batch, noisy != batch.tokens, "target_tokens")}
        loss = nll
        if self.noise == "mask":
            scored &= noisy == model.vocabulary.mask_id
            nll = jnp.where(scored, nll, 0)
            metrics["nll_bound"] = normalized(batch, nll * weights, "target_tokens")
            loss = nll * weights if self.weighting == "elbo" else nll
        count = jnp.sum(scored, dtype=jnp.float32)
        metrics["accuracy"] = Ratio(jnp.sum(scored & correct, dtype=jnp.float32), count)
        return LossSums(normalized(batch, loss, self.normalize), metrics, output.auxiliary)

    def log_likelihood(self, model: Transformer, batch: Batch, key: KeyScalar, num_draws: int) -> Likelihood:
        """The bound of `InBlocks`; with uniform noise, inside a block, the one of `uniform_bound`."""
        if self.noise == "mask":
            return super().log_likelihood(model, batch, key, num_draws)
        starts, counted, hidden = self._bounded(model, batch)
        return uniform_bound(model, hidden, batch, starts, counted, key, num_draws)
