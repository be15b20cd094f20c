"""Distillation of an autoregressive teacher into a block-diffusion student (OPDLM, arXiv 2606.06712).

The student reads `[clean text | noisy targets]` in one pass, as in `objectives/block.py`; the teacher reads the clean
text alone, causally. For tokens hidden from the student, the loss pulls the student's distribution towards the
teacher's given the tokens before. On-policy, the text is the student's own, and the noisy targets are states of its
decoding (`training/rollout.py`).
"""

import dataclasses
from collections.abc import Sequence
from typing import ClassVar, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Float

from diffusion_t5x.data.batch import Batch
from diffusion_t5x.data.ends import text_of
from diffusion_t5x.data.vocabularies import TokenIds
from diffusion_t5x.errors import UserError, check_choices
from diffusion_t5x.models.masks import AttentionKind, BlocksFrom
from diffusion_t5x.models.modes import Mode
from diffusion_t5x.models.output import Ratio
from diffusion_t5x.models.reading import Reading, model_reads
from diffusion_t5x.models.readout import LossSoftmax, cross_entropy
from diffusion_t5x.models.sampling import forbid
from diffusion_t5x.models.streams import row_keys, stream
from diffusion_t5x.models.transformer import ModelDefinition, Params, Transformer
from diffusion_t5x.objectives.autoregressive import Autoregressive
from diffusion_t5x.objectives.block import Block, block_starts, noisy_output
from diffusion_t5x.objectives.objective import Likelihood, LossSums, Normalize, Objective, Pass, normalized
from diffusion_t5x.shapes import IntBL, IntScalar, KeyScalar

Divergence = Literal["forward_kl", "reverse_kl", "jsd"]


class Teacher(NamedTuple):
    """A frozen model: its structure, and parameters that nobody else owns or updates."""

    definition: ModelDefinition
    params: Params


def divergence(
    teacher: Float[jax.Array, "*shape vocab"],
    student: Float[jax.Array, "*shape vocab"],
    kind: Divergence = "forward_kl",
    top_k: int | None = None,
) -> Float[jax.Array, "*shape"]:
    """Returns the divergence of a student's distribution from its teacher's, in nats.

    Ids that the teacher excludes (a logit of -inf) add exactly nothing to the forward KL, and their limit to the JSD.
    The reverse KL would be infinite there, so it is taken over the teacher's support alone.

    Args:
      teacher, student: logits.
      kind: "forward_kl": KL(teacher || student). "reverse_kl": KL(student || teacher). "jsd": the Jensen-Shannon
        divergence, at most log 2.
      top_k: only the terms of the teacher's k most likely tokens, with probabilities as they are (not renormalised).
        The sum may exceed the full one, and may be negative.
    """
    log_p, log_q = jax.nn.log_softmax(teacher), jax.nn.log_softmax(student)
    if top_k is not None and top_k < log_p.shape[-1]:
        log_p, ids = jax.lax.top_k(log_p, top_k)
        log_q = jnp.take_along_axis(log_q, ids, axis=-1)
    # Where a probability is 0 its logarithm is replaced before anything is computed: no NaN, in gradients neither.
    p, q = jnp.exp(log_p), jnp.exp(log_q)
    has_p, has_q = p > 0, q > 0
    if kind == "forward_kl":
        terms = p * (jnp.where(has_p, log_p, 0) - jnp.where(has_p, log_q, 0))
    elif kind == "reverse_kl":
        both = has_q & (log_p > -jnp.inf)
        terms = jnp.where(both, q, 0) * (jnp.where(both, log_q, 0) - jnp.where(both, log_p, 0))
    else:
        some = has_p | has_q
        log_m = jnp.logaddexp(jnp.where(some, log_p, 0), jnp.where(some, log_q, 0)) - jnp.log(2.0)
        terms = p * (jnp.where(has_p, log_p, 0) - jnp.where(has_p, log_m, 0))
        terms = (terms + q * (jnp.where(has_q, log_q, 0) - jnp.where(has_q, log_m, 0))) / 2
    return jnp.sum(terms, axis=-1)


def visited_states(
    batch: Batch, vocabulary: TokenIds, block_size: int, key: KeyScalar, blocks_from: BlocksFrom = "targets"
) -> IntBL:
    """The tokens: for each block of targets one of the states in which its decoder saw it, the rest as it is.

    A decoder that writes a block in n steps sees n states with masks; each is equally likely, and each block has its
    own draw.

    Args:
      batch: a rollout, with `written_at`.
      vocabulary: defines MASK.
      block_size: number of targets per block, as in decoding.
      key: rows draw from it by their `example_ids`.
      blocks_from: see `AttentionKind`.
    """
    starts = jnp.maximum(block_starts(batch, block_size, blocks_from), 0)
    length = batch.tokens.shape[1]
    assert batch.written_at is not None
    at = jnp.where(batch.target_mask, batch.written_at, -1)
    last = jax.vmap(lambda at, starts: jax.ops.segment_max(at, starts, length)[starts])(at, starts)
    draws = jax.vmap(lambda k: jax.random.uniform(k, (length,), jnp.float32))(row_keys(key, batch.example_ids))
    draw = jnp.take_along_axis(draws, starts, axis=-1)
    step = jnp.floor(draw * (last + 1))
    return jnp.where(batch.target_mask & (at >= step), vocabulary.mask_id, batch.tokens)


@dataclasses.dataclass(frozen=True)
class Distillation(Objective):
    """Divergence from the teacher's next-token distribution, at the masked targets up to the end of the text.

    Without a rollout stage the text comes from the data (off-policy), with it from the student (on-policy).

    Attributes:
      block_size: number of targets per block.
      divergence: "forward_kl", "reverse_kl" or "jsd", see `divergence`.
      top_k: of the teacher's support, see `divergence`; None takes all of it (the paper names 16).
      states: "visited": what the student saw when it wrote the text; a text that nobody wrote here, such as that of an
        evaluation, has random ones. "random": masks drawn as `Block` draws them.
      score_end: the token that ends a text counts too. The paper's code leaves it out.
      normalize: "sequences", as in the paper, averages over each text's masked targets first.
      blocks_from: where blocks are counted from, see `AttentionKind`.
      softmax: what the student's distribution is over, see `Masked`. The teacher's is over what may be written.
    """

    needs_teacher: ClassVar[bool] = True
    takes_rollouts: ClassVar[bool] = True

    block_size: int = 4
    divergence: Divergence = "forward_kl"
    top_k: int | None = None
    states: Literal["visited", "random"] = "visited"
    score_end: bool = False
    normalize: Normalize = "sequences"
    blocks_from: BlocksFrom = "targets"
    softmax: LossSoftmax = "allowed"

    def __post_init__(self) -> None:
        check_choices(self)
        AttentionKind("block_causal", self.block_size, self.blocks_from)  # raises on a bad block size
        if self.top_k is not None and self.top_k < 1:
            raise UserError(f"Distillation.top_k must be at least 1, or None for all; got {self.top_k}.")

    @property
    def needs_rollouts(self) -> bool:
        return self.states == "visited"

    @property
    def attention(self) -> AttentionKind:
        return AttentionKind("block_causal", self.block_size, self.blocks_from)

    @property
    def modes(self) -> tuple[Mode, ...]:
        return (Mode.of(self.attention, "mask"),)

    @property
    def passes(self) -> Sequence[Pass]:
        return (Pass(slots=2), Pass(by_teacher=True))

    def model_inputs(self, model: ModelDefinition, batch: Batch, key: KeyScalar) -> IntBL:
        """Returns the noisy targets among their clean inputs; the student reads the clean targets as well."""
        return model_reads(self._noisy(model.vocabulary, batch, key), batch, model)

    @property
    def _block(self) -> Block:
        return Block(self.block_size, blocks_from=self.blocks_from)

    def _noisy(self, vocabulary: TokenIds, batch: Batch, key: KeyScalar) -> IntBL:
        noise_key = stream(key, "noise")
        if self.states == "visited" and batch.written_at is not None:
            return visited_states(batch, vocabulary, self.block_size, noise_key, self.blocks_from)
        return self._block.corrupt(vocabulary, batch, noise_key)[0]

    def loss(
        self,
        model: Transformer,
        batch: Batch,
        key: KeyScalar,
        train: bool = True,
        step: IntScalar | None = None,
        teacher: Transformer | None = None,
    ) -> LossSums:
        """Returns the loss of the student `model`."""
        if teacher is None:
            raise UserError("Distillation needs a teacher. Set TEACHER_CHECKPOINT_PATH.")
        vocabulary = model.vocabulary
        dropout_keys = row_keys(stream(key, "dropout"), batch.example_ids) if train else None
        noisy = self._noisy(vocabulary, batch, key)
        reading = Reading.of(batch, vocabulary, model.config.shifted, packed=True)
        batch = reading.fits(batch)
        kind = AttentionKind("block_diffusion", self.block_size, self.blocks_from)
        starts = block_starts(batch, self.block_size, self.blocks_from)
        output = noisy_output(model, reading, starts, noisy, kind, model.encode(batch, dropout_keys), dropout_keys)

        def compare(logits, teacher_hidden, labels):
            allowed = forbid(logits, vocabulary)
            student = allowed if self.softmax == "allowed" else logits
            target = jax.lax.stop_gradient(forbid(teacher.logits(teacher_hidden), vocabulary))
            nll, _ = cross_entropy(target, labels)
            agree = jnp.argmax(allowed, axis=-1) == jnp.argmax(target, axis=-1)
            return divergence(target, student, self.divergence, self.top_k), nll, agree

        distance, teacher_nll, agree = model.map_logits(
            compare, output.hidden, Autoregressive().output(teacher, batch).hidden, batch.tokens
        )
        text = text_of(batch, vocabulary)
        scored = text & (noisy == vocabulary.mask_id)
        if not self.score_end:
            scored &= ~vocabulary.is_end(batch.tokens)
        is_scored, is_text = batch.replace(target_mask=scored), batch.replace(target_mask=text)
        return LossSums(
            loss=normalized(is_scored, distance, self.normalize),
            metrics={
                "divergence": normalized(is_scored, distance, "target_tokens"),
                "agreement": normalized(is_scored, agree, "target_tokens"),
                "teacher_nll": normalized(is_text, teacher_nll, "target_tokens"),
                "mask_fraction": Ratio(jnp.sum(scored, dtype=jnp.float32), jnp.sum(text, dtype=jnp.float32)),
                "text_length": Ratio(
                    jnp.sum(text, dtype=jnp.float32), jnp.sum(jnp.any(text, axis=-1), dtype=jnp.float32)
                ),
            },
            auxiliary=output.auxiliary,
        )

    def log_likelihood(self, model: Transformer, batch: Batch, key: KeyScalar, num_draws: int) -> Likelihood:
        """The student's likelihood, as a block diffusion model: that of `Block`."""
        return self._block.log_likelihood(model, batch, key, num_draws)
