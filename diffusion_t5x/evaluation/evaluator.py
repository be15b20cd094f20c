"""Evaluations of a run: losses, likelihoods, and decoding with scores."""

import dataclasses
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol, TypeVar

import jax
import numpy as np
from jax.sharding import Mesh

from diffusion_t5x.data.dataset import Dataset
from diffusion_t5x.data.vocabulary import AnyVocabulary
from diffusion_t5x.decoding.decoder import Decoder
from diffusion_t5x.decoding.language import Language
from diffusion_t5x.decoding.structured import checked
from diffusion_t5x.errors import UserError
from diffusion_t5x.evaluation.in_slots import SlotDecoding
from diffusion_t5x.evaluation.inference import Example, make_decode_step, predict
from diffusion_t5x.evaluation.likelihood import likelihoods, make_likelihood_step, summarize
from diffusion_t5x.evaluation.loading import abstract_batch
from diffusion_t5x.evaluation.losses import evaluate_loss
from diffusion_t5x.evaluation.noise_times import TimesEval, make_times_step, search_times
from diffusion_t5x.evaluation.teacher import make_judge
from diffusion_t5x.models.transformer import ModelDefinition, Params
from diffusion_t5x.objectives.distillation import Teacher
from diffusion_t5x.objectives.likelihood import check_num_draws
from diffusion_t5x.objectives.objective import Objective
from diffusion_t5x.training.step import make_loss_step

logger = logging.getLogger(__name__)


class EvalDataset(Dataset, Protocol):
    """The data-set interface that evaluation needs; `data.seqio_source.SeqioDataset` implements it."""

    def vocabulary(self) -> AnyVocabulary:
        """Returns the vocabulary of the targets."""

    def to_text(self, tokens: Sequence[int]) -> str:
        """Returns the text of target tokens, up to EOS."""

    def cells(self, tokens: Sequence[int]) -> list[str]:
        """Returns the texts of target tokens, one each, including EOS and padding."""

    def check_scoring(self) -> None:
        """Raises a UserError if `score` cannot run here."""

    def score(self, records: Sequence[Example]) -> Mapping[str, float]:
        """Returns the task's metrics of predictions (see `inference.predict`)."""


@dataclasses.dataclass(frozen=True)
class LossEval:
    """The objective's loss on a data set.

    Attributes:
      dataset: the data set to evaluate on.
      num_batches: maximum number of batches; None takes all, 0 skips this evaluation.
    """

    dataset: Dataset
    num_batches: int | None = None

    def __post_init__(self) -> None:
        _check_number("LossEval.num_batches", self.num_batches)


@dataclasses.dataclass(frozen=True)
class DecodeEval:
    """Metrics of a decoder's output on a data set.

    Attributes:
      dataset: the data set to evaluate on.
      decoder: writes the texts.
      num_examples: number of examples, from the start; None takes all, 0 skips this evaluation.
      seed: seed of the decoder's randomness.
      samples_per_example: number of samples per example, for metrics such as pass@k; other metrics use the first. (A
        decoder may have samples of its own, of which it keeps the best.)
    """

    dataset: EvalDataset
    decoder: Decoder
    num_examples: int | None = None
    seed: int = 0
    samples_per_example: int = 1

    def __post_init__(self) -> None:
        _check_number("DecodeEval.num_examples", self.num_examples)
        if self.samples_per_example < 1:
            raise UserError(f"DecodeEval.samples_per_example must be at least 1, not {self.samples_per_example}.")


@dataclasses.dataclass(frozen=True)
class LikelihoodEval:
    """Likelihood of a data set's targets under the objective: see `evaluation.likelihood.summarize`.

    Attributes:
      dataset: the data set to evaluate on.
      num_examples: number of examples, from the start; None takes all, 0 skips this evaluation.
      num_draws: number of draws per example, an even number; exact objectives need none.
      seed: seed of the draws.
    """

    dataset: EvalDataset
    num_examples: int | None = None
    num_draws: int = 128
    seed: int = 0

    def __post_init__(self) -> None:
        _check_number("LikelihoodEval.num_examples", self.num_examples)
        check_num_draws(self.num_draws)


AnyEval = TypeVar("AnyEval", bound=LossEval | DecodeEval | LikelihoodEval | TimesEval)


def prepared(evals: Sequence[AnyEval]) -> list[AnyEval]:
    """Returns the evaluations without those of 0 examples or batches, which are logged."""
    found = []
    for ev in evals:
        if 0 in (getattr(ev, "num_batches", None), getattr(ev, "num_examples", None)):
            logger.info("%s of %s is skipped: 0 examples were requested", type(ev).__name__, ev.dataset.name)
            continue
        found.append(ev)
    return found


def check_decoders(mesh: Mesh, definition: ModelDefinition, evals: Sequence[DecodeEval], params: Params) -> None:
    """Traces the decoding of each evaluation with only the shapes of its batches. Nothing is compiled or run.

    A decoder that does not fit the model or the lengths raises here what it would raise in the first evaluation.
    """
    for ev in evals:
        step = make_decode_step(mesh, definition, ev.decoder, seed=ev.seed)
        with jax.set_mesh(mesh):
            jax.eval_shape(step, params, abstract_batch(mesh, ev.dataset, ev.dataset.batch_size), np.int32(0))


def _check_number(name: str, value: int | None) -> None:
    if value is not None and value < 0:
        raise UserError(f"{name} must be at least 0, or None for all; got {value}.")


def for_tasks(
    tasks: Sequence[str], dataset: Callable[..., EvalDataset], decode_eval: Callable[..., AnyEval]
) -> list[AnyEval]:
    """Returns one evaluation per task: `decode_eval(dataset=dataset(mixture_or_task_name=task))`.

    Args:
      tasks: names of tasks or mixtures.
      dataset: makes the data set for a `mixture_or_task_name`.
      decode_eval: makes the evaluation for a `dataset`.
    """
    if isinstance(tasks, str) or not tasks:
        raise UserError(f'EVAL_TASKS must be a list of task names, such as ["my_task"], not {tasks!r}.')
    return [decode_eval(dataset=dataset(mixture_or_task_name=task)) for task in tasks]


class Evaluator:
    """Runs evaluations on parameters; each program is compiled once.

    Args:
      mesh: the mesh for the rows.
      definition: the model.
      objective: the objective of losses and likelihoods; None if there are none.
      loss_evals, decode_evals: the evaluations to run.
      teacher: the objective's teacher; also judges decoded texts, unless the objective is taught by its start.
      likelihood_evals: likelihood evaluations to run.
      times_evals: searches to run.
      language: decoded texts are of it; None: they are any texts.

    Raises:
      UserError: two evaluations of one kind on one data set, whose results could not be distinguished.
    """

    def __init__(
        self,
        mesh: Mesh,
        definition: ModelDefinition,
        objective: Objective | None,
        loss_evals: Sequence[LossEval],
        decode_evals: Sequence[DecodeEval],
        teacher: Teacher | None = None,
        likelihood_evals: Sequence[LikelihoodEval] = (),
        times_evals: Sequence[TimesEval] = (),
        language: Language | None = None,
    ):
        for evals in (loss_evals, decode_evals, likelihood_evals, times_evals):
            names = [ev.dataset.name for ev in evals]
            if twice := {name for name in names if names.count(name) > 1}:
                raise UserError(f"Two evaluations of the same kind on {twice.pop()!r}: run them separately.")
        self._mesh = mesh
        judges = teacher is not None and not (objective and objective.taught_by_start)  # it reads token by token
        self._judge = make_judge(mesh, teacher) if teacher and judges else None
        self._language = language
        decoders = [ev.decoder if language is None else ev.decoder.within(language) for ev in decode_evals]
        self._decode_evals = [
            (
                ev,
                make_decode_step(mesh, definition, decoder, seed=ev.seed),
                SlotDecoding(mesh, definition, decoder, ev.seed),
            )
            for ev, decoder in zip(decode_evals, decoders, strict=True)
        ]
        self._times_evals = [(ev, make_times_step(mesh, definition, objective, seed=ev.seed)) for ev in times_evals]
        self._loss_evals, self._likelihood_evals = [], []
        if loss_evals or likelihood_evals:
            assert objective is not None
            loss_step = make_loss_step(mesh, definition, objective, seed=0, teacher=teacher)
            self._loss_evals = [(ev, loss_step) for ev in loss_evals]
            self._likelihood_evals = [
                (ev, make_likelihood_step(mesh, definition, objective, num_draws=ev.num_draws, seed=ev.seed))
                for ev in likelihood_evals
            ]

    def losses(self, params: Params) -> dict[str, dict[str, float]]:
        """Returns the loss and its metrics, by data set."""
        return {
            ev.dataset.name: evaluate_loss(
                step, params, (batch for batch, _ in ev.dataset.eval_batches()), self._mesh, ev.num_batches
            )
            for ev, step in self._loss_evals
        }

    def times(self, params: Params) -> dict[str, dict[str, float]]:
        """Returns the variances over times, by data set (see `evaluation.noise_times`)."""
        return {
            ev.dataset.name: search_times(
                step, params, (batch for batch, _ in ev.dataset.eval_batches()), self._mesh, ev
            )
            for ev, step in self._times_evals
        }

    def likelihoods(self, params: Params) -> Iterator[tuple[str, dict[str, float], list[dict[str, Any]]]]:
        """Yields name, summary and records for each data set (see `evaluation.likelihood`)."""
        for ev, step in self._likelihood_evals:
            batches = ev.dataset.eval_batches(ev.num_examples)
            records = list(likelihoods(step, params, batches, self._mesh, ev.dataset.to_text))
            yield ev.dataset.name, summarize(records), records

    def decode(
        self, params: Params, keep: Callable[[str, list[dict[str, Any]]], None] = lambda name, records: None
    ) -> Iterator[tuple[str, dict[str, float], list[dict[str, Any]]]]:
        """Yields name, metrics and predictions for each data set.

        `keep` gets name and predictions before scoring, so that decoded texts survive a failing metric.

        Besides the task's own metrics there are "tokens_per_step" over all texts, "acceptance" of a decoder that
        speculates (the share of drafted tokens that it accepted), "decode_seconds" including compilation and reading,
        and with a teacher "teacher_nll" (nats per token) and "teacher_agreement" (share of tokens).
        """
        for ev, step, slots in self._decode_evals:
            start = time.monotonic()
            dataset = ev.dataset
            batches = checked(self._language, dataset.eval_batches(ev.num_examples))
            texts, samples = (dataset.to_text, dataset.cells), ev.samples_per_example
            records = list(predict(step, params, batches, self._mesh, *texts, self._judge, samples, slots=slots))
            seconds = time.monotonic() - start
            keep(dataset.name, records)
            yield dataset.name, {**dataset.score(records), **_totals(records), "decode_seconds": seconds}, records


def _totals(records: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Sums the records' figures over all texts."""
    sums = {
        name: sum(record[name] for record in records)
        for name in ("num_tokens", "num_steps", "teacher_nll", "teacher_agreement", "num_drafted", "num_accepted")
        if records and name in records[0]
    }
    tokens, steps = sums.pop("num_tokens", 0), sums.pop("num_steps", 0)
    found = {"tokens_per_step": tokens / max(steps, 1)}
    if "num_drafted" in sums:
        found["acceptance"] = sums.pop("num_accepted") / max(sums.pop("num_drafted"), 1)
    return found | {name: value / max(tokens, 1) for name, value in sums.items()}
