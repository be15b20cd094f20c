"""Distillation of an autoregressive teacher into a block-diffusion student (OPDLM, arXiv 2606.06712).

The student reads `[clean text | noisy targets]` in one pass, as in `objectives/blocks.py`; the teacher reads only
the clean text, causally. For tokens hidden from the student, the loss pulls the student's distribution towards the
teacher's given the tokens before. On-policy, the text is the student's own, and the noisy targets are states of its
decoding (`training/rollout.py`).
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Literal, NamedTuple

import jax
import jax.numpy as jnp

from diffusion_t5x.data.batch import Batch
from diffusion_t5x.data.ends import text_of
from diffusion_t5x.data.vocabularies import TokenIds
from diffusion_t5x.errors import UserError
from diffusion_t5x.models.masks import Annealed, AttentionKind, BlocksFrom
from diffusion_t5x.models.output import Output, Ratio
from diffusion_t5x.models.reading import Reading
from diffusion_t5x.models.readout import cross_entropy
from diffusion_t5x.models.sampling import Sampling, filter_logits, forbid, is_likeliest, likeliest
from diffusion_t5x.models.streams import row_keys, stream
from diffusion_t5x.models.transformer import ModelDefinition, Params, Transformer
from diffusion_t5x.objectives.autoregressive import Autoregressive
from diffusion_t5x.objectives.block import InBlocks
from diffusion_t5x.objectives.blocks import block_starts, noisy_output
from diffusion_t5x.objectives.divergences import Divergence, divergence
from diffusion_t5x.objectives.estimators import Estimate, drawn_now, sampled_kl
from diffusion_t5x.objectives.objective import LossSums, Normalize, Pass, no_teacher
from diffusion_t5x.objectives.texts import over_texts, random_states, scored_tokens
from diffusion_t5x.shapes import AnyBoolBL, IntBL, IntScalar, KeyScalar


class Teacher(NamedTuple):
    """A frozen model.

    Attributes:
      definition: its structure.
      params: its own parameters, which are not updated.
      joined: `(own parameters, the student's) -> parameters`, for a teacher that shares what of the student is frozen.
        None: all are its own.
    """

    definition: ModelDefinition
    params: Params
    joined: Callable[[Params, Params], Params] | None = None

    def model(self, params: Params, student: Params) -> Transformer:
        """Returns the model; inside a program its own parameters and the student's are arguments of that."""
        return self.definition.bind(params if self.joined is None else self.joined(params, student))


def visited_states(
    batch: Batch, vocabulary: TokenIds, block_size: int, key: KeyScalar, blocks_from: BlocksFrom = "targets"
) -> IntBL:
    """Returns the tokens, with each block of targets in one of the states in which its decoder saw it.

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
class Distillation(InBlocks):
    """Divergence from the teacher's next-token distribution, at the masked targets up to the end of the text.

    Without a rollout stage the text comes from the data (off-policy), with it from the student (on-policy). Defaults
    are those of the released code (github.com/divelab/OPDLM at 3bb8bf6, train/rl_sdar.py, `forward_process`).

    Attributes:
      block_size: number of targets per block.
      divergence: "forward_kl", "reverse_kl", "mixed_kl" or "jsd", see `divergences.divergence`.
      top_k: restriction to the teacher's k most likely tokens, see `divergence`; None takes all. The released
        launchers use 16 for 4B and 8B, and None for smaller models.
      states: "visited": what the student saw when it wrote the text; a text that the student did not write, such as
        one of an evaluation, has random ones. "random": masks drawn as `random_states` draws them.
      score_end: include the token that ends a text. The released code leaves it out.
      normalize: "sequences", as in the released code, averages over each text's masked targets first.
      blocks_from: where blocks are counted from, see `AttentionKind`.
      softmax: what the student's distribution is over, see `Masked`. The teacher's is over what may be written.
      mix: weight of the reverse KL in "mixed_kl", or of the teacher in "jsd".
      teacher_sampling: the teacher's distribution is the one that this would sample from; renormalised, unlike `top_k`.
      estimate: "exact": the divergence is summed over all tokens. "k1", "k3": the reverse KL is estimated from the
        tokens that the student drew in the state that it sees, each with its importance weight (see
        `estimators.sampled_kl`); those drawn in later states do not count. A batch without draws, as in an evaluation,
        uses the exact divergence.
      max_weight: maximum of the importance weights of "k1" and "k3"; None does not clip them.
      teacher_fill: what the teacher reads for targets that the student sees masked: the text's own tokens ("clean"), or
        the student's most likely ones ("argmax"), which needs a pass over `[clean text | filled targets]`.
    """

    takes_rollouts: ClassVar[bool] = True

    divergence: Divergence = "forward_kl"
    top_k: int | None = None
    states: Literal["visited", "random"] = "visited"
    score_end: bool = False
    normalize: Normalize = "sequences"
    mix: float = 0.5
    teacher_sampling: Sampling = Sampling()  # noqa: RUF009  (frozen)
    teacher_fill: Literal["clean", "argmax"] = "clean"
    estimate: Estimate = "exact"
    max_weight: float | None = 2.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.top_k is not None and self.top_k < 1:
            raise UserError(f"Distillation.top_k must be at least 1, or None for all; got {self.top_k}.")
        if not 0 < self.mix < 1:
            raise UserError(f"Distillation.mix must lie strictly between 0 and 1; got {self.mix}.")
        if self.teacher_sampling.temperature == 0:
            raise UserError(
                "Distillation.teacher_sampling must have a temperature above 0: at 0 the teacher has no distribution."
            )

        if self.max_weight is not None and self.max_weight < 1:
            raise UserError(f"Distillation.max_weight must be at least 1, or None; got {self.max_weight}.")
        if self.estimate != "exact":
            self._check_estimate()

    def _check_estimate(self) -> None:
        """Raises a UserError for settings whose divergence has no estimate from the student's draws."""
        needed: dict[str, Any] = {"divergence": "reverse_kl", "states": "visited", "softmax": "allowed", "top_k": None}
        for name, value in needed.items():
            if getattr(self, name) != value:
                raise UserError(
                    f"Distillation.estimate = {self.estimate!r} assumes draws from the student's own distribution and "
                    f"needs {name} = {value!r}; got {getattr(self, name)!r}."
                )
        if self.teacher_sampling != Sampling(self.teacher_sampling.temperature):
            raise UserError(
                f"Distillation.estimate = {self.estimate!r} needs a teacher that gives every token a probability: no "
                f"top_k, top_p or min_p; got {self.teacher_sampling}."
            )

    @property
    def needs_teacher(self) -> bool:
        return True

    @property
    def needs_samples(self) -> bool:
        return self.estimate != "exact"

    @property
    def needs_rollouts(self) -> bool:
        return self.states == "visited"

    @property
    def passes(self) -> Sequence[Pass]:
        return (Pass(slots=2), Pass(slots=1 if self.teacher_fill == "clean" else 2, by_teacher=True))

    def noisy(self, vocabulary: TokenIds, batch: Batch, key: KeyScalar) -> IntBL:
        among = (batch, vocabulary, self.block_size, stream(key, "noise"), self.blocks_from)
        if self.states == "random" or batch.written_at is None:
            return random_states(*among)
        by_student = jnp.any(batch.written_at >= 0, axis=-1, keepdims=True)
        return jnp.where(by_student, visited_states(*among), random_states(*among))

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
            raise no_teacher(self)
        vocabulary = model.vocabulary
        dropout_keys = row_keys(stream(key, "dropout"), batch.example_ids) if train else None
        noisy = self.noisy(vocabulary, batch, key)
        kept, output, _ = self.output(model, batch, noisy, dropout_keys)
        if self.teacher_fill == "clean":
            batch, taught = kept, Autoregressive().output(teacher, kept)
        else:
            filler = model.map_logits(lambda x: likeliest(forbid(x, vocabulary)), output.hidden)
            batch, taught = self._taught(teacher, batch, jnp.where(noisy == vocabulary.mask_id, filler, noisy), key)

        scored = scored_tokens(batch, vocabulary, noisy, self.score_end)
        drawn = batch.written_log_probability if self.needs_samples else None
        if drawn is not None:
            scored &= self._drawn_now(batch, noisy == vocabulary.mask_id)

        def compare(logits, teacher_hidden, labels, scored, drawn):
            allowed = forbid(logits, vocabulary)
            student = allowed if self.softmax == "allowed" else logits
            target = jax.lax.stop_gradient(forbid(teacher.logits(teacher_hidden), vocabulary))
            nll, _ = cross_entropy(target, labels)
            agree = is_likeliest(allowed, likeliest(target))
            target = filter_logits(target, self.teacher_sampling)
            if self.estimate == "exact" or drawn is None:
                return divergence(target, student, self.divergence, self.top_k, self.mix), nll, agree, None
            # What is not scored may be MASK, whose logarithm is infinite.
            log_q, log_p, drawn = (
                jnp.where(scored, x, 0)
                for x in (-cross_entropy(student, labels)[1], -cross_entropy(target, labels)[1], drawn)
            )
            distance, weight = sampled_kl(log_q, log_p, drawn, self.estimate, self.max_weight)
            return distance, nll, agree, weight

        arguments = (taught.hidden, batch.tokens, scored, drawn)
        distance, teacher_nll, agree, weight = model.map_logits(compare, output.hidden, *arguments)
        text = text_of(batch, vocabulary)
        count, in_texts, texts = (jnp.sum(x, dtype=jnp.float32) for x in (scored, text, jnp.any(text, axis=-1)))
        weights = {} if weight is None else {"importance_weight": over_texts(batch, scored, weight, "target_tokens")}
        return LossSums(
            loss=over_texts(batch, scored, distance, self.normalize),
            metrics={
                "divergence": over_texts(batch, scored, distance, "target_tokens"),
                "agreement": over_texts(batch, scored, agree, "target_tokens"),
                "teacher_nll": over_texts(batch, text, teacher_nll, "target_tokens"),
                "mask_fraction": Ratio(count, in_texts),
                "text_length": Ratio(in_texts, texts),
                **weights,
            },
            auxiliary=output.auxiliary,
        )

    def _drawn_now(self, batch: Batch, masked: AnyBoolBL) -> AnyBoolBL:
        """Returns the masked targets that the student drew in the state that it sees here."""
        assert batch.written_at is not None
        starts = block_starts(batch, self.block_size, self.blocks_from)
        return drawn_now(batch.target_mask & masked, batch.written_at, starts)

    def _taught(self, teacher: Transformer, batch: Batch, filled: IntBL, key: KeyScalar) -> tuple[Batch, Output]:
        """Runs the teacher over `[clean text | filled targets]`; returns the batch without tokens that did not fit."""
        reading = Reading.of(batch, teacher.vocabulary, True, packed=True)
        batch = reading.fits(batch)
        starts = block_starts(batch, self.block_size, self.blocks_from)
        # Causal inside the blocks of filled targets, too: annealing at its start, with no later edge open.
        causal = Annealed(AttentionKind("block_diffusion", self.block_size, self.blocks_from), jnp.float32(0), key)
        return batch, noisy_output(teacher, reading, starts, filled, causal, teacher.encode(batch))
