"""Block diffusion: autoregressive over blocks, diffusion inside a block (BD3-LM, arXiv 2503.09573, section 3)."""

import abc
import dataclasses
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp

from diffusion_t5x.data.batch import Batch
from diffusion_t5x.data.ends import after_end
from diffusion_t5x.data.vocabularies import TokenIds
from diffusion_t5x.errors import UserError, check_choices
from diffusion_t5x.models.masks import Annealed, AttentionKind, BlocksFrom
from diffusion_t5x.models.modes import Mode
from diffusion_t5x.models.output import Output, Ratio
from diffusion_t5x.models.reading import Reading, model_reads
from diffusion_t5x.models.readout import LossSoftmax, score
from diffusion_t5x.models.streams import row_keys, stream
from diffusion_t5x.models.transformer import ModelDefinition, Transformer
from diffusion_t5x.objectives.annealing import annealed, check_anneal_steps
from diffusion_t5x.objectives.blocks import block_starts, noisy_output, read_twice
from diffusion_t5x.objectives.likelihood import masked_bound
from diffusion_t5x.objectives.masked import ALL_TIMES, SCHEDULES, Schedule, Times, Weighting, check_times, mask_targets
from diffusion_t5x.objectives.objective import Likelihood, LossSums, Normalize, Objective, Pass, normalized, stratified
from diffusion_t5x.objectives.uniform_bound import uniform_bound
from diffusion_t5x.shapes import AnyBoolBL, FloatBL, FloatBLD, FloatScalar, IntBL, IntScalar, KeyB, KeyScalar


class Read(NamedTuple):
    """A pass over clean and noisy targets.

    Attributes:
      batch: without the tokens that had no room.
      output: hidden states that predict the noisy targets.
      clean: hidden states of the clean tokens, each in its token's slot.
    """

    batch: Batch
    output: Output
    clean: FloatBLD


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

    @abc.abstractmethod
    def noisy(self, vocabulary: TokenIds, batch: Batch, key: KeyScalar) -> IntBL:
        """Returns the tokens with noise in place of some targets, as `loss` uses them with this key."""

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
    ) -> Read:
        """Runs the pass over clean and noisy targets.

        Args:
          model: reads them.
          batch: the clean tokens, of rows that may be packed.
          noisy: see `noisy`.
          dropout_keys: a key for each row; None switches dropout off.
          kind: "block_diffusion", or in transition to it; None: in blocks of `block_size`.
        """
        kind = kind or AttentionKind("block_diffusion", self.block_size, self.blocks_from)
        size = (kind.kind if isinstance(kind, Annealed) else kind).block_size
        assert size is not None
        reading = Reading.of(batch, model.vocabulary, model.config.shifted, packed=True)
        batch = reading.fits(batch)
        starts = block_starts(batch, size, self.blocks_from)
        encoded = model.encode(batch, dropout_keys)
        return Read(batch, *read_twice(model, reading, starts, noisy, kind, encoded, dropout_keys))

    def log_likelihood(self, model: Transformer, batch: Batch, key: KeyScalar, num_draws: int) -> Likelihood:
        """Sums each block's lower bound given the clean blocks before it, up to the block in which the text ends.

        A decoder stops there. The tokens of the last block that it drops count as they are in the batch. That is one of
        the ways to write the text, so this is still a lower bound. Masked blocks of one target need no draws and are
        exact.
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

    Training may draw times from only a part of [0, 1], in which the loss varies less (clipped schedules: BD3-LM,
    section 5.2). The weights stay the same, so it is a weighted loss and not a bound; evaluation and likelihoods
    draw from all of [0, 1]. Blocks of one target are the exception: their loss has the same mean for any times.

    Attributes:
      block_size: number of targets per block. 1 is autoregressive (but reads MASK where an autoregressive model reads
        the previous token); a block as long as the targets is one diffusion over all of them.
      stages: `((0, size), (step, size), ...)`, block sizes from these training steps on; the last is `block_size`
        (the warm-up phase of LLaDA2.0's schedule, arXiv 2512.15745). None trains only with `block_size`.
      noise: "mask" hides tokens, and the loss is that of hidden tokens. "uniform" replaces tokens, and the loss is that
        of all tokens, without weights: not a bound (SUNDAE's first term, inside blocks).
      schedule: see `Masked`.
      weighting: weighting of a masked token, see `Masked`; noise "uniform" needs "uniform".
      epsilon: minimum time, which bounds the weights.
      times: `(low, high)`, from which training draws; `runs/search_times.gin` finds those of least variance. (1, 1)
        masks everything, which suits blocks of one target.
      anneal_steps: training steps over which attention inside blocks becomes bidirectional, see `annealed`; None: no
        annealing.
      normalize: denominator of the summed loss.
      blocks_from: where blocks are counted from, see `AttentionKind`.
      softmax: what the loss is over, see `Masked`.
    """

    stages: tuple[tuple[int, int], ...] | None = None
    noise: Literal["mask", "uniform"] = "mask"
    schedule: Schedule = "linear"
    weighting: Weighting = "elbo"
    epsilon: float = 1e-3
    times: Times = ALL_TIMES
    anneal_steps: int | None = None
    normalize: Normalize = "target_tokens"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_anneal_steps(self.anneal_steps)
        if not 0 <= self.epsilon < 1:
            raise UserError(f"Block.epsilon must lie in [0, 1); got {self.epsilon}.")
        check_times(self.times)
        if self.noise == "uniform" and self.weighting != "uniform":
            raise UserError('Block.weighting must be "uniform" with uniform noise: no bound is implemented for it.')
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

    def interval(self, times: Times) -> Times:
        """Returns the times without those below `epsilon`; the low end is open, the high one is not."""
        low, high = times
        return min(max(low, self.epsilon), high), high

    def block_losses(
        self, model: Transformer, batch: Batch, key: KeyScalar, times: tuple[FloatScalar, FloatScalar]
    ) -> tuple[FloatBL, AnyBoolBL]:
        """Returns one draw of each block's loss, in nats per target, at the block's first target; and where these are.

        Args:
          model: without dropout.
          batch: clean tokens.
          key: rows draw from it by their `example_ids`: the same for all times.
          times: see `interval`.
        """
        noisy, weights = self.corrupt(model.vocabulary, batch, key, times=times)
        batch, output, _ = self.output(model, batch, noisy)
        nll, _ = score(model, output.hidden, batch.tokens, self.softmax)
        masked = batch.target_mask & (noisy == model.vocabulary.mask_id)
        loss = jnp.where(masked, nll * weights if self.weighting == "elbo" else nll, 0)
        slots = jnp.arange(noisy.shape[1])
        starts = jnp.where(batch.target_mask, block_starts(batch, self.block_size, self.blocks_from), slots)
        summed = jax.vmap(lambda x, starts: jax.ops.segment_sum(x, starts, slots.size))
        sizes = summed(batch.target_mask.astype(jnp.float32), starts)
        return summed(loss, starts) / jnp.maximum(sizes, 1), sizes > 0

    def corrupt(
        self,
        vocabulary: TokenIds,
        batch: Batch,
        key: KeyScalar,
        size: int | IntScalar | None = None,
        times: tuple[float | FloatScalar, float | FloatScalar] | None = None,
    ) -> tuple[IntBL, FloatBL]:
        """Returns for every position the token or noise, and its weight in the bound if it is masked.

        Blocks have `size` targets, by default `block_size`; their times are from `times` as `interval` returns them, by
        default those of training.
        """
        low, high = times or self.interval(self.times)
        starts = block_starts(batch, self.block_size if size is None else size, self.blocks_from)
        share = stratified(stream(key, "time"), batch.example_ids, starts)
        probability, weights = SCHEDULES[self.schedule](high - (high - low) * share)
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
        return self._scored(model, batch, key, train, step)[0]

    def _scored(
        self, model: Transformer, batch: Batch, key: KeyScalar, train: bool, step: IntScalar | None
    ) -> tuple[LossSums, Read, AnyBoolBL]:
        """Returns the loss, the pass behind it, and which targets are scored."""
        dropout_keys = row_keys(stream(key, "dropout"), batch.example_ids) if train else None
        size = self._size_at(step)
        times = self.interval(self.times if train or self.block_size == 1 else ALL_TIMES)
        noisy, weights = self.corrupt(model.vocabulary, batch, key, size, times)
        kind = annealed(AttentionKind("block_diffusion", size, self.blocks_from), self.anneal_steps, step, key)
        read = self.output(model, batch, noisy, dropout_keys, kind)
        batch, output, _ = read

        nll, correct = score(model, output.hidden, batch.tokens, self.softmax)
        scored = batch.target_mask
        metrics = {"noise_fraction": normalized(batch, noisy != batch.tokens, "target_tokens")}
        loss = nll
        if self.noise == "mask":
            scored &= noisy == model.vocabulary.mask_id
            nll = jnp.where(scored, nll, 0)
            # At block size 1 the mean is the same for any times.
            if times == self.interval(ALL_TIMES) or (self.block_size == 1 and self.stages is None):
                metrics["nll_bound"] = normalized(batch, nll * weights, "target_tokens")
            loss = nll * weights if self.weighting == "elbo" else nll
        count = jnp.sum(scored, dtype=jnp.float32)
        metrics["accuracy"] = Ratio(jnp.sum(scored & correct, dtype=jnp.float32), count)
        return LossSums(normalized(batch, loss, self.normalize), metrics, output.auxiliary), read, scored

    def log_likelihood(self, model: Transformer, batch: Batch, key: KeyScalar, num_draws: int) -> Likelihood:
        """The bound of `InBlocks`; with uniform noise, inside a block, the one of `uniform_bound`."""
        if self.noise == "mask":
            return super().log_likelihood(model, batch, key, num_draws)
        starts, counted, hidden = self._bounded(model, batch)
        return uniform_bound(model, hidden, batch, starts, counted, key, num_draws)
