"""Makes on-policy batches: the model itself writes the texts that it is trained on.

A teacher judges them token by token (OPDLM, arXiv 2606.06712; `objectives.distillation`), or a reward judges each as a
whole (`training.rewards`, `objectives.clipped`).
"""

import dataclasses
from collections.abc import Mapping

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Bool

from diffusion_t5x import partitioning
from diffusion_t5x.data import scoring
from diffusion_t5x.data.batch import Batch
from diffusion_t5x.data.dataset import Dataset, OfTexts
from diffusion_t5x.data.ends import text_of
from diffusion_t5x.data.examples import Example
from diffusion_t5x.decoding.absorbing import AbsorbingRule
from diffusion_t5x.decoding.block import BlockDecoder
from diffusion_t5x.decoding.sundae import SundaeDecoder
from diffusion_t5x.errors import UserError
from diffusion_t5x.models.config import ModelConfig
from diffusion_t5x.models.transformer import ModelDefinition, Params
from diffusion_t5x.objectives.objective import Objective
from diffusion_t5x.training.judging import Judging, Written
from diffusion_t5x.training.loop import BatchIterator
from diffusion_t5x.training.metrics import Writer
from diffusion_t5x.training.ramps import Ramp
from diffusion_t5x.training.rewards import Grader, Rewards
from diffusion_t5x.training.rollout_texts import Prepare, RolloutDecoder, TextWriter, own_targets, prompts
from diffusion_t5x.training.state import TrainState

_STORED, _AHEAD = "rollout_", "ahead_"  # texts in the data's state


@dataclasses.dataclass(frozen=True)
class Rollout:
    """Settings for decoding the model's own texts, by default those of OPDLM's released code.

    Prompts are the training data's inputs.

    Attributes:
      decoder: writes the texts, in the objective's mode.
      num_batches: number of training batches written with the same parameters.
      batches_at_once: number of these batches that have a slot for each row; a text that ends makes room for one of the
        rest. None: half of them; a SundaeDecoder has no slots. Fewer write in less time where time grows with the rows
        (CPU), and need less memory; more use an accelerator better.
      passes: number of times that each of these batches is trained on. The states are redrawn in each.
      lengths: maximum tokens of a text, in whole blocks.
      data_share: probability that the data's own targets, truncated to that length, replace a text of the student. Its
        states are random masks.
      num_buckets: number of row lengths: the longest text, half of it, a quarter and so on; each is compiled once.
      rewards: how the texts are judged, in groups for the same prompt. None: they are not.
      ahead: the texts of the next rollout are written before the updates of the present one, by parameters that are one
        rollout older, and judged on the host during these updates.
    """

    decoder: RolloutDecoder
    num_batches: int = 16
    batches_at_once: int | None = None
    passes: int = 1
    lengths: Ramp = Ramp(100, 4000)  # noqa: RUF009  (frozen)
    data_share: Ramp = Ramp(0, 0)  # noqa: RUF009  (frozen)
    num_buckets: int = 4
    rewards: Rewards | None = None
    ahead: bool = False

    def __post_init__(self) -> None:
        if isinstance(self.decoder, BlockDecoder | AbsorbingRule):
            rule = self.decoder.inner if isinstance(self.decoder, BlockDecoder) else self.decoder
            if not rule.keeps_written:
                raise UserError(
                    "Rollout.decoder must write masked blocks, or a masked canvas, and what it wrote must stay: a "
                    f"step's state is what is masked; got {self}."
                )
        numbers = self.num_batches, self.passes, self.lengths.start, self.num_buckets
        if min(numbers) < 1 or (self.batches_at_once is not None and self.batches_at_once < 1):
            raise UserError(f"Rollout needs numbers and lengths of at least 1; got {self}.")
        if self.lengths.start > self.lengths.end:
            raise UserError(
                f"Texts of a rollout must not get shorter: they have {self.lengths.start} tokens at first and "
                f"{self.lengths.end} at the end. Set MIN_ROLLOUT_LENGTH to at most MAX_ROLLOUT_LENGTH."
            )
        if not all(0 <= share <= 1 for share in (self.data_share.start, self.data_share.end)):
            raise UserError(f"Rollout.data_share must lie in [0, 1]; got {self.data_share}. Set DATA_SHARE.")
        if isinstance(self.decoder, SundaeDecoder) and self.batches_at_once is not None:
            raise UserError(
                "Rollout.batches_at_once counts slots, but a SundaeDecoder writes a training batch at a time: set "
                "Rollout.batches_at_once = None."
            )
        if self.ahead and self.rewards is None:
            raise UserError("Rollout.ahead hides the time of rewards, and there are none: set Rollout.ahead = False.")

    @property
    def group_size(self) -> int:
        """The number of texts for each prompt."""
        return self.rewards.group_size if self.rewards else 1

    def num_slots(self, batch_size: int) -> int:
        """Returns the number of texts that are written at once, of training batches of this size."""
        half = -(-self.num_batches // 2)
        return batch_size * min(self.batches_at_once or half, self.num_batches)

    @property
    def max_length(self) -> int:
        """The maximum number of tokens of a text of any rollout."""
        return int(self.lengths.end)

    @property
    def num_updates(self) -> int:
        """The number of training steps that take the texts of one rollout."""
        return self.num_batches * self.passes

    def number(self, step: int) -> int:
        """Returns the rollout, counted from 0, whose texts this training step takes."""
        return step // self.num_updates

    def length(self, number: int) -> int:
        """Returns the maximum number of tokens of a text of this rollout: whole blocks, the last one may be shorter."""
        size = self.decoder.block_size if isinstance(self.decoder, BlockDecoder) else 1
        return min(max(round(self.lengths.at(number) / size), 1) * size, self.max_length)

    def bucket(self, length: int) -> int:
        """Returns the row length, in tokens, for texts of this length."""
        sizes = [-(-self.max_length // 2**i) for i in range(self.num_buckets)]
        return min(size for size in sizes if size >= length)


class OnPolicyBatches:
    """Training batches that the student writes, `num_batches` at a time; they have a position, like other data.

    Args:
      mesh: the mesh for the rows.
      definition: the student.
      rollout: settings of the rollout.
      prompts: this process's share of batches of prompts, one per row: as many as a training batch has groups.
      num_inputs: number of tokens of the longest prompt.
      batch_size: number of rows in a training batch over all processes.
      seed: seed of the draws.
      prepare: see `Objective.prepare_rollout`.
      grader: gives texts their advantages, if the rollout has rewards.
      writer: gets the metrics of each rollout that is graded, in folder "rollout".
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
        prepare: Prepare = lambda model, batch, key: batch,
        grader: Grader | None = None,
        writer: Writer | None = None,
    ):
        self._mesh, self._rollout, self._prompts, self._num_inputs = mesh, rollout, prompts, num_inputs
        self._batch_size, self._seed, self._grader = batch_size, seed, grader
        self._vocabulary = definition.vocabulary
        sizes = {"num_slots": rollout.num_slots(batch_size), "batch_size": batch_size}
        self._text_writer = TextWriter(mesh, definition, rollout.decoder, prepare, **sizes, seed=seed)
        self._judging = None if grader is None else Judging(grader, writer, rollout.num_batches)
        self._step: int | None = None  # number of updates before the batch that was taken last; None: not known yet
        self._texts: list[Written] = []  # in the order in which they are taken
        self._ahead: list[Written] = []  # those of the next rollout

    def next_batch(self, state: TrainState) -> Batch:
        """Returns the next batch, numpy; if none is left, writes new ones with the parameters of this state.

        Each call judges one batch, the first that is not judged yet, while the update before may still be running.
        """
        # To read the step is to wait for the update.
        self._step = int(state.step) if self._step is None else self._step + 1
        if self._judging is not None and self._judging.num_waiting:
            self._judging.judge_next(self._step + 1, state.step)
        if not self._texts:
            self._begin_rollout(state)
        if self._judging is not None and self._texts[0].examples is not None:  # the first after a rollout
            self._judging.judge_next(self._step + 1, state.step)
        share, num_shares = partitioning.share_of_rows(self._mesh)
        size = self._batch_size // num_shares
        return jax.tree.map(lambda x: x[share * size : (share + 1) * size], self._texts.pop(0).texts)

    def _begin_rollout(self, state: TrainState) -> None:
        """Takes the texts that were written ahead, or writes them now; then those that are to be ahead."""
        self._step = int(state.step)
        self._texts = self._ahead or self._write_texts(state.params, self._step)
        self._ahead = []
        if self._rollout.ahead:
            self._ahead = self._write_texts(state.params, self._step + self._rollout.num_updates)

    def _write_texts(self, params: Params, step: int) -> list[Written]:
        """Returns the batches of a rollout, each as often as it is taken.

        Args:
          params: the student's parameters.
          step: the first training step that takes them.
        """
        number_of_batches, number = self._rollout.num_batches, self._rollout.number(step)
        length, share = self._rollout.length(number), self._rollout.data_share.at(number)
        # Keyed by the row, so that a process need not know the others' rows.
        draws = np.random.default_rng([self._seed % 2**32, number]).random(number_of_batches * self._batch_size)
        read = [self._read(index) for index in range(number_of_batches)]
        asked = [self._ask(batch, length, draws < share) for batch in read]
        here = partitioning.put_rows(self._mesh, jax.tree.map(lambda *x: np.concatenate(x), *asked))
        batch, given = partitioning.whole(here)
        order = np.argsort(batch.example_ids)
        batch, given = jax.tree.map(lambda x: x[order], (batch, given))
        written = self._text_writer.write(params, batch, step, given)
        in_text = np.asarray(text_of(written, self._vocabulary))  # computed now, not behind an update
        found = []
        for index, rows in enumerate(np.arange(len(order)).reshape(number_of_batches, self._batch_size)):
            texts = jax.tree.map(lambda x: x[rows], written)  # noqa: B023  (called at once)
            # In training a row's id is its index in the global batch again.
            texts = texts.replace(example_ids=texts.example_ids % self._batch_size)
            examples = None if self._grader is None else self._examples(self._grader, read[index])
            found.append(Written(texts, in_text[rows], examples))
        if self._judging is not None:
            self._judging.add(found)
        return found * self._rollout.passes

    def _read(self, index: int) -> Batch:
        """Returns the data of the rollout's next batch, each prompt as often as a group has texts."""
        size = self._rollout.group_size
        batch = jax.tree.map(lambda x: np.repeat(x, size, axis=0), next(self._prompts))
        members = np.tile(np.arange(size, dtype=np.int32), len(batch.tokens) // size)
        return batch.replace(example_ids=batch.example_ids * size + members + index * self._batch_size)

    def _ask(
        self, batch: Batch, length: int, from_data: Bool[np.ndarray, " rows"]
    ) -> tuple[Batch, Bool[np.ndarray, "batch length"] | None]:
        """Returns the prompts of a batch of data, and which targets are given; None: of no row ever."""
        asked = prompts(batch, self._num_inputs, length, self._rollout.bucket(length))
        if self._rollout.data_share.start == self._rollout.data_share.end == 0:
            return asked, None
        return own_targets(batch, asked, from_data[batch.example_ids])

    def _examples(self, grader: Grader, read: Batch) -> dict[int, Example]:
        """Returns the example of each row of a batch that this process read, by the row's index in the batch."""
        size = self._rollout.group_size
        once = grader.examples(jax.tree.map(lambda x: x[::size], read))
        of_rows = [example for example in once for _ in range(size)]
        return dict(zip((read.example_ids % self._batch_size).tolist(), of_rows, strict=True))

    def state_dict(self) -> dict[str, np.ndarray]:
        """Returns the prompts' position, and the texts that are written and not used yet; judges those that wait."""
        while self._judging is not None and self._judging.num_waiting:
            assert self._step is not None
            self._judging.judge_next(self._step + 1, None)
        stored: dict[str, np.ndarray] = {}
        for prefix, batches in ((_STORED, self._texts), (_AHEAD, self._ahead)):
            if batches:
                texts = jax.tree.map(lambda *x: np.stack(x), *(batch.texts for batch in batches))
                stored |= {prefix + name: x for name, x in vars(texts).items() if x is not None}
        return self._prompts.state_dict() | stored

    def load_state_dict(self, state: Mapping[str, np.ndarray]) -> None:
        self._texts, self._ahead = (_restored(state, prefix) for prefix in (_STORED, _AHEAD))
        of_texts = (_STORED, _AHEAD)
        self._prompts.load_state_dict({name: x for name, x in state.items() if not name.startswith(of_texts)})


def _restored(state: Mapping[str, np.ndarray], prefix: str) -> list[Written]:
    """Returns the batches that `state_dict` stored under a prefix, judged."""
    stored = {name.removeprefix(prefix): x for name, x in state.items() if name.startswith(prefix)}
    number = len(stored["tokens"]) if stored else 0
    return [Written(Batch(**{name: x[i] for name, x in stored.items()})) for i in range(number)]


def check_rollout(objective: Objective, model: ModelConfig, rollout: Rollout | None, dataset: Dataset) -> None:
    """Raises a UserError if objective, rollout and data do not match."""
    name = type(objective).__name__
    if rollout is None:
        if objective.needs_rollouts:
            raise UserError(
                f"{name} needs texts that the model writes: set train.rollout. (Distillation with "
                'states = "random" uses the data\'s texts.)'
            )
        return
    if not objective.takes_rollouts:
        raise UserError(
            f"A rollout needs an objective that learns from it, such as Distillation or PolicyGradient, not {name}."
        )
    _check_mode(objective, rollout.decoder)
    if model.architecture != "decoder_only" and objective.attention.block_size:
        raise UserError("A rollout in blocks is for decoder-only models: include models/decoder_only.gin.")
    _check_rewards(objective, rollout, dataset)
    if objective.needs_samples:
        _check_samples(name, rollout)
    if dataset.pack or "inputs" not in dataset.task_feature_lengths:
        raise UserError(f"A rollout needs one prompt per row: {dataset.name} with a feature 'inputs' and pack = False.")
    inputs = dataset.task_feature_lengths["inputs"] if model.architecture == "decoder_only" else 0
    model.check_length(inputs + rollout.max_length, f"the inputs of {dataset.name} with Rollout.max_length")


def _check_mode(objective: Objective, decoder: RolloutDecoder) -> None:
    """Raises a UserError if the decoder writes otherwise than the objective reads."""
    if not objective.modes or decoder.modes[0] == objective.modes[0]:
        return
    name, learned, written = type(objective).__name__, objective.modes[0], decoder.modes[0]
    if written.block_size and learned.block_size and written.block_size != learned.block_size:
        raise UserError(
            f"Rollout.decoder writes blocks of {written.block_size}, but {name} has blocks of {learned.block_size}."
        )
    if written.blocks_from != learned.blocks_from:
        raise UserError(
            f'Rollout.decoder has blocks_from = "{written.blocks_from}", but {name} has "{learned.blocks_from}": set '
            "both by --gin.BLOCKS_FROM."
        )
    raise UserError(
        f"Rollout.decoder writes {written}; {name} reads {learned}. An autoregressive model needs "
        "objectives/autoregressive_policy_gradient.gin and runs/reinforce_autoregressive.gin; a SUNDAE model "
        "objectives/sundae_policy_gradient.gin and runs/reinforce_sundae.gin; a masked model without blocks "
        "objectives/masked_policy_gradient.gin and runs/reinforce_masked.gin; a model of masked blocks "
        "objectives/policy_gradient.gin and runs/reinforce.gin."
    )


def _check_rewards(objective: Objective, rollout: Rollout, dataset: Dataset) -> None:
    """Raises a UserError if the objective and the rollout disagree about rewards, or groups do not fill batches."""
    name = type(objective).__name__
    if rollout.rewards is None:
        if objective.needs_rewards:
            raise UserError(f"{name} learns from rewards: set Rollout.rewards (see runs/reinforce.gin).")
        return
    if not objective.needs_rewards:
        raise UserError(f"{name} reads no rewards: set Rollout.rewards = None, or take the objective PolicyGradient.")
    if dataset.batch_size % rollout.group_size:
        raise UserError(
            f"A batch of {dataset.batch_size} texts does not divide into groups of {rollout.group_size}: change "
            "BATCH_SIZE or GROUP_SIZE."
        )
    if not isinstance(dataset, OfTexts):
        raise UserError(f"Rewards need the texts of a SeqIO task; the cached {dataset.name} has only tokens.")
    scoring.check_metrics([rollout.rewards.reward])


def _check_samples(name: str, rollout: Rollout) -> None:
    """Raises a UserError if the texts' tokens are not samples from the student's distributions."""
    if not rollout.decoder.samples_model:
        raise UserError(
            f"{name} learns from tokens that the model drew, but the rollout's decoder draws "
            "others or chooses positions by what it drew. Set temperature = 1.0, no top_k or top_p, guidance = 0, a "
            "SundaeDecoder's num_samples = 1, update_share = 1 and stop_when_unchanged = False, and an order other "
            """than confidence, such as --gin.rollout/MaskedDecoder.order='"random"' """
            "--gin.rollout/MaskedDecoder.threshold=None."
        )
    if rollout.data_share.start or rollout.data_share.end:
        raise UserError(f"{name} learns from tokens that the model drew: set DATA_SHARE = 0; got {rollout.data_share}.")
