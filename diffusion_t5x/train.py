"""Pretrain, adapt or fine-tune: trains a model with an objective on a SeqIO task or mixture.

With --dry_run --topology=v5p:4x4x8 it compiles the step for that TPU slice, even if you don't have one, and prints its
memory and minimum time; --dry_run_output=FILE writes them as JSON, --fit searches for the largest batch that fits.
"""

import dataclasses
import functools
import logging
import os
import sys
import types
from collections.abc import Callable, Sequence
from contextlib import closing, nullcontext
from typing import Any

import jax
import optax
from jax.sharding import Mesh

from diffusion_t5x import partitioning, records, terminal
from diffusion_t5x.checkpointing import stored
from diffusion_t5x.checkpointing.assignment import Rule
from diffusion_t5x.checkpointing.checkpoints import Checkpoints, ensure_writable, find_checkpoint
from diffusion_t5x.checkpointing.record import Record, describe
from diffusion_t5x.command_line import config
from diffusion_t5x.command_line.runnable import verb
from diffusion_t5x.command_line.slice_flags import slice_dry_run
from diffusion_t5x.data.cached_source import CachedDataset
from diffusion_t5x.data.dataset import Dataset
from diffusion_t5x.data.pair_source import check_pairs
from diffusion_t5x.data.seqio_source import SeqioDataset
from diffusion_t5x.errors import UserError
from diffusion_t5x.evaluation.evaluator import DecodeEval, Evaluator, LossEval, check_decoders, prepared
from diffusion_t5x.evaluation.loading import check_datasets, load_start, load_teacher
from diffusion_t5x.evaluation.of_run import evaluate_run
from diffusion_t5x.evaluation.screen import next_commands
from diffusion_t5x.models.config import ModelConfig
from diffusion_t5x.models.quantized import FewBits
from diffusion_t5x.models.transformer import ModelDefinition
from diffusion_t5x.objectives.distillation import Teacher
from diffusion_t5x.objectives.objective import Objective, no_teacher
from diffusion_t5x.partitioning import MeshConfig
from diffusion_t5x.performance.training_run import StepReader, TrainingRun
from diffusion_t5x.training import lora as lora_training
from diffusion_t5x.training.agreement import Agreement
from diffusion_t5x.training.bad_numbers import BadNumbers, Judge
from diffusion_t5x.training.beginning import Begun, Start
from diffusion_t5x.training.goodput import Goodput
from diffusion_t5x.training.host_batches import HostBatches
from diffusion_t5x.training.lock import locked
from diffusion_t5x.training.loop import Periods, Reporting, Saving, TrainLoop
from diffusion_t5x.training.metrics import Writer, check_writers, make_writer
from diffusion_t5x.training.rewards import make_grader
from diffusion_t5x.training.rollout import OnPolicyBatches, Rollout, check_rollout
from diffusion_t5x.training.run_config import write_config
from diffusion_t5x.training.state import TrainState, abstract_state, describe_model
from diffusion_t5x.training.step import make_train_step
from diffusion_t5x.training.surroundings import explained

logger = logging.getLogger(__name__)

_ALLOW_MISMATCH = "train.train.allow_mismatch"


@dataclasses.dataclass(frozen=True)
class CheckpointPolicy:
    """Policy for keeping checkpoints.

    Attributes:
      keep_last: number of newest checkpoints to keep.
      keep_best: number of best checkpoints to keep in addition, by `best_metric`.
      best_metric: a metric of the checkpoint's evaluation, such as "my_task/exact_match" or "my_task/loss".
      best_mode: "max" if higher is better, "min" if lower is better.
    """

    keep_last: int = 1
    keep_best: int = 0
    best_metric: str = ""
    best_mode: str = "max"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Training:
    """Trains up to `train_steps` steps and writes everything to `model_dir`.

    It continues from the latest checkpoint in `model_dir`; if there is none, it starts from `initial_checkpoint_path`
    by the assignment rules; without that, from scratch. The log says which.

    Attributes:
      model_dir: gets config.gin, model-info.txt, checkpoints/, train/, training_eval/ and inference_eval/.
      model: the model's dimensions; the vocabulary's size comes from the task.
      objective: the loss to minimise.
      train_dataset: the training data.
      optimizer: the optimizer, see `training.optimizers`.
      train_steps: total number of steps, including those before a resumption (or in the initial checkpoint).
      lora: train low-rank updates, with the model frozen; None trains the whole model.
      frozen_dtype: quantize the layers' matrices of what is frozen, LoRA's base and the teacher: "int8", "nf4" or None.
      random_seed: seed of initialisation, noise and dropout. The data have their own seed.
      initial_checkpoint_path: a checkpoint folder, a folder of them or a MODEL_DIR; also the model near which an
        objective holds the trained one, if it does (`Objective.taught_by_start`).
      restore_rules: `(target regex, source template or None)`, as in T5X; only for `initial_checkpoint_path`.
      teacher_checkpoint_path: checkpoint of the autoregressive teacher for distillation, which also scores decoded
        texts ("teacher_nll", "teacher_agreement").
      teacher_model: the teacher's dimensions; None takes the student's.
      rollout: train on texts that the model itself writes to the inputs of `train_dataset`; None trains on the data's
        targets.
      mesh: the arrangement of devices.
      num_microbatches: number of parts in which a step processes its batch.
      loss_normalizing_factor: denominator of the summed loss, instead of the objective's own.
      ema_decay: decay of a moving average of the parameters, which evaluation uses; None keeps none.
      periods: periods of logging, evaluation and saving.
      loss_evals: losses measured at each evaluation.
      decode_evals: decoding and scoring at each evaluation.
      checkpoint_policy: which checkpoints are kept.
      allow_older_checkpoint: if the latest checkpoint in `model_dir` is broken, continue from the newest intact one.
      allow_mismatch: continue or start from a checkpoint whose record names another model or training; decode with
        decoders that do not suit the objective.
      bad_numbers: which steps are not applied, and how many of them end the run.
      hang_timeout: seconds; a step that takes longer ends the run with a stack trace of every thread; None waits
        forever.
      metric_writers: "jsonl", "tensorboard", "wandb" (Weights & Biases, an extra).
      dry_run: build model, data and shapes, check the checkpoint, print what it would start with, and train nothing.
        A reader of the step, such as `SliceDryRun`, gets the settings of the step instead.
    """

    model_dir: str
    model: ModelConfig
    objective: Objective
    train_dataset: SeqioDataset | CachedDataset
    optimizer: optax.GradientTransformation
    train_steps: int
    lora: lora_training.Lora | None = None
    frozen_dtype: FewBits | None = None
    random_seed: int = 0
    initial_checkpoint_path: str | None = None
    restore_rules: Sequence[Rule] = ()
    teacher_checkpoint_path: str | None = None
    teacher_model: ModelConfig | None = None
    rollout: Rollout | None = None
    mesh: MeshConfig = MeshConfig()
    num_microbatches: int = 1
    loss_normalizing_factor: float | None = None
    ema_decay: float | None = None
    periods: Periods = Periods()
    loss_evals: Sequence[LossEval] = ()
    decode_evals: Sequence[DecodeEval] = ()
    checkpoint_policy: CheckpointPolicy = CheckpointPolicy()
    allow_older_checkpoint: bool = False
    allow_mismatch: bool = False
    bad_numbers: BadNumbers = BadNumbers()
    hang_timeout: float | None = 1800.0
    metric_writers: Sequence[str] = ("jsonl", "tensorboard")
    dry_run: bool | StepReader = False

    def __post_init__(self) -> None:
        taught = self.objective.needs_teacher or self.teacher_checkpoint_path is not None
        object.__setattr__(self, "lora", lora_training.over(self.frozen_dtype, self.lora, taught))

    def run(self) -> None:
        """Trains; a dry run prints the plan.

        Raises:
          UserError: a mismatch of any kind, before training data are read and before anything is compiled.
          SystemExit: it was told to stop, and has saved; see `training.preemption` for the exit codes.
        """
        if not isinstance(self.dry_run, bool):
            given = {
                name: getattr(self, name)
                for name in ("mesh", "model", "lora", "frozen_dtype", "teacher_model", "rollout")
            }
            self.dry_run.train(TrainingRun(dataset=self.train_dataset, **given, **self._of_step()))
            return
        self._check_settings()
        goodput = Goodput()
        mesh = self.mesh.make()
        check_writers(self.metric_writers)
        evals = (prepared(self.loss_evals), prepared(self.decode_evals))
        with nullcontext(lambda: None) if self.dry_run else locked(self.model_dir) as check_folder:
            plan = self._plan(mesh, *evals)
            if self.dry_run:
                self._show(plan)
                return
            teacher = self._load_teacher(plan)
            begun = plan.start.begin(plan.definition, self.optimizer, plan.abstract, self.random_seed)
            step = int(begun.state.step)
            logger.info("%s at step %d of %d", plan.start, step, self.train_steps)
            if plan.assignment:
                logger.info("it starts with:\n%s", plan.assignment)
            if step >= self.train_steps and not begun.evaluation_due:
                logger.info("%s: all %d steps are done already, nothing to do", self.model_dir, self.train_steps)
                return
            self._train(plan, begun, teacher, goodput, check_folder)
            scored = isinstance(self.train_dataset, SeqioDataset) and self.train_dataset.has_metrics
            logger.info("%s", next_commands(self.model_dir, writes=plan.record.decoder is not None, scored=scored))

    def _plan(self, mesh: Mesh, loss_evals: Sequence[LossEval], decode_evals: Sequence[DecodeEval]) -> "_Plan":
        """Checks that all settings fit together, before data and parameters are read."""
        folder = os.path.join(self.model_dir, "checkpoints")
        start = Start.find(folder, self.initial_checkpoint_path, self.restore_rules, self.allow_older_checkpoint)
        path = self._teacher_path()
        if self.objective.needs_teacher and not path and not self.dry_run:
            raise no_teacher(self.objective)
        teacher_path = str(find_checkpoint(path)) if path else None
        with_losses = [self.train_dataset, *(ev.dataset for ev in loss_evals)]
        check_pairs(type(self.objective).__name__, self.objective.reads_pairs, with_losses)
        self._check_data(mesh, [*(ev.dataset for ev in loss_evals), *(ev.dataset for ev in decode_evals)])
        for ev in decode_evals:
            ev.dataset.check_scoring()
        lora_training.check_drafts(self.lora, self.objective)
        check_rollout(self.objective, self.model, self.rollout, self.train_dataset)
        definition = lora_training.define(self.model, self.train_dataset.token_ids(), self.lora)
        abstract = abstract_state(mesh, definition, self.optimizer, self.ema_decay is not None)
        record = self._record(definition, decode_evals)
        decoders = [*(ev.decoder for ev in decode_evals), *([self.rollout.decoder] if self.rollout else [])]
        Agreement("train.objective", record, _ALLOW_MISMATCH, self.allow_mismatch).check(self.model, decoders)
        check_decoders(mesh, definition, decode_evals, abstract.eval_params)
        checked = (definition, abstract, self.objective, self.lora, _ALLOW_MISMATCH, self.allow_mismatch)
        assignment = start.check(*checked)
        evals = (loss_evals, decode_evals)
        return _Plan(mesh, definition, abstract, *evals, record, start, assignment, teacher_path)

    def _teacher_path(self) -> str | None:
        """Returns the path of the teacher's checkpoint, as the user gave it: of a teacher, or of the start."""
        if not self.objective.taught_by_start:
            return self.teacher_checkpoint_path
        if self.teacher_checkpoint_path:
            raise UserError(
                f"{type(self.objective).__name__} is held near INITIAL_CHECKPOINT_PATH, and has no other teacher. Set "
                "TEACHER_CHECKPOINT_PATH = None."
            )
        return self.initial_checkpoint_path

    def _check_settings(self) -> None:
        factor, ema, timeout = self.loss_normalizing_factor, self.ema_decay, self.hang_timeout
        for name, value, is_right, wanted in (
            ("MODEL_DIR", self.model_dir, self.model_dir != "", "the path of a folder"),
            ("TRAIN_STEPS", self.train_steps, self.train_steps >= 1, "at least 1"),
            ("LOSS_NORMALIZING_FACTOR", factor, factor is None or factor > 0, "above 0, or None"),
            ("train.train.ema_decay", ema, ema is None or 0 <= ema < 1, "in [0, 1), or None"),
            ("train.train.hang_timeout", timeout, timeout is None or timeout > 0, "above 0, or None"),
        ):
            if not is_right:
                raise UserError(f"{name} must be {wanted}, not {value!r}.")
        if self.dry_run:
            ensure_writable(self.model_dir, dry_run=True)

    def _check_data(self, mesh: Mesh, evaluated: Sequence[Dataset]) -> None:
        """Raises a UserError if a data set does not fit the model or the mesh, or batches do not divide."""
        data, pieces = self.train_dataset, self.num_microbatches
        check_datasets([data, *evaluated], self.model, mesh)
        if pieces < 1 or data.batch_size % pieces:
            raise UserError(f"A batch of {data.batch_size} rows cannot be split into num_microbatches = {pieces}.")
        partitioning.check_batch(mesh, data.batch_size // pieces, data.row_length)

    def _record(self, definition: ModelDefinition, decode_evals: Sequence[DecodeEval]) -> Record:
        """Returns the record of this training for its checkpoints."""
        return Record.of(
            definition.config,
            definition.vocabulary.describe(),
            self.objective,
            [ev.decoder for ev in decode_evals],
            dataset=describe(self.train_dataset),
            task=config.registration("MIXTURE_OR_TASK_NAME"),
            lora=self.lora and self.lora.describe(),
            **self.train_dataset.texts(),
        )

    def _show(self, plan: "_Plan") -> None:
        """Prints the plan of a run, for a dry run."""
        batch = next(self.train_dataset.train_iterator())
        shapes = (f"  {name} {x.dtype}{list(x.shape)}" for name, x in vars(batch).items() if x is not None)
        print(describe_model(plan.definition, plan.abstract), "batch:", *shapes, sep="\n")
        teacher = f", taught by {plan.teacher_path}" if plan.teacher_path else ""
        source = plan.start.checkpoint.named if plan.start.checkpoint else "scratch"
        print(f"Would train to step {self.train_steps} from {source}{teacher}. Nothing was written.")
        if plan.assignment:
            print(terminal.safe(f"It starts with:\n{plan.assignment}"))

    def _load_teacher(self, plan: "_Plan") -> Teacher | None:
        if plan.teacher_path is None:
            return None
        if self.objective.taught_by_start:
            return load_start(plan.teacher_path, plan.definition, plan.mesh, self.frozen_dtype)
        judged = (plan.definition.vocabulary, plan.mesh, _ALLOW_MISMATCH, self.allow_mismatch, self.frozen_dtype)
        return load_teacher(plan.teacher_path, self.teacher_model or self.model, *judged)

    def _of_step(self) -> dict[str, Any]:
        """Returns the settings of a training step, on these devices or on a slice."""
        settings = {"objective": self.objective, "optimizer": self.optimizer, "microbatches": self.num_microbatches}
        return settings | {"normalizing_factor": self.loss_normalizing_factor, "ema_decay": self.ema_decay}

    def _train(
        self, plan: "_Plan", begun: Begun, teacher: Teacher | None, goodput: Goodput, check_folder: Callable[[], None]
    ) -> None:
        """Runs the training loop and writes to `model_dir`."""
        if plan.start.checkpoint and plan.start.resumes and self.allow_older_checkpoint:
            stored.set_aside_after(plan.start.checkpoint.named)
        folder = os.path.join(self.model_dir, "checkpoints")
        checkpoints = Checkpoints(folder, **dataclasses.asdict(self.checkpoint_policy))
        step = int(begun.state.step)
        if jax.process_index() == 0:
            write_config(os.path.join(self.model_dir, "config.gin"), config.operative_text(), step)
            records.write_text(
                os.path.join(self.model_dir, "model-info.txt"), describe_model(plan.definition, plan.abstract) + "\n"
            )
        writer = make_writer(self.model_dir, self.metric_writers, step, config.operative_values())
        batches = self._batches(plan, writer)
        if begun.data_state is not None:
            batches.load_state_dict(begun.data_state)
        on_mesh = (plan.mesh, plan.abstract, plan.definition)
        train_step = make_train_step(*on_mesh, seed=self.random_seed, teacher=teacher, **self._of_step())
        evals = (plan.loss_evals, plan.decode_evals)
        evaluator = Evaluator(plan.mesh, plan.definition, self.objective, *evals, teacher)
        judge = Judge(self.bad_numbers, self.model_dir, begun.losses)
        description = f"{type(self.objective).__name__} on {self.train_dataset.name}"
        loop = TrainLoop(
            mesh=plan.mesh,
            train_step=train_step,
            batches=batches,
            evaluate=functools.partial(evaluate_run, evaluator, writer, self.model_dir),
            total_steps=self.train_steps,
            periods=self.periods,
            saving=Saving(checkpoints, {**plan.record.metadata(), "config": config.operative_text()}, check_folder),
            reporting=Reporting(writer, judge, goodput, description, self.hang_timeout),
        )
        rows = f"{self.train_dataset.batch_size} rows of {self.train_dataset.row_length} tokens"
        with goodput, explained(plan.abstract, rows, self.model_dir), closing(writer), closing(checkpoints):
            loop.run(begun.state, begun.evaluation_due)

    def _batches(self, plan: "_Plan", writer: Writer) -> HostBatches | OnPolicyBatches:
        """Returns this process's batches, from the data or written by the model."""
        data, rollout = self.train_dataset, self.rollout
        if rollout is not None:
            data = dataclasses.replace(data, batch_size=data.batch_size // rollout.group_size)
        batches = HostBatches(data.train_iterator, data.batch_size, partitioning.share_of_rows(plan.mesh))
        if rollout is None:
            return batches
        asked = (batches, data.task_feature_lengths["inputs"], self.train_dataset.batch_size, self.random_seed)
        grader = None
        if rollout.rewards is not None:
            assert isinstance(data, SeqioDataset)  # see check_rollout
            grader = make_grader(rollout.rewards, data)
        prepare = self.objective.prepare_rollout
        return OnPolicyBatches(plan.mesh, plan.definition, rollout, *asked, prepare, grader, writer)


train = verb("train", Training)


@dataclasses.dataclass(frozen=True)
class _Plan:
    """A training whose settings fit together.

    Attributes:
      mesh: the devices.
      definition: the model.
      abstract: shapes and shardings of the state.
      loss_evals, decode_evals: evaluations, prepared.
      record: the record of this training for its checkpoints.
      start: the starting point.
      assignment: text that says how each array of the starting checkpoint is used; "" from scratch.
      teacher_path: the teacher's checkpoint folder, or None.
    """

    mesh: Mesh
    definition: ModelDefinition
    abstract: TrainState
    loss_evals: Sequence[LossEval]
    decode_evals: Sequence[DecodeEval]
    record: Record
    start: Start
    assignment: str
    teacher_path: str | None


class _CallableModule(types.ModuleType):
    """Makes the module callable, since it is the attribute `train` of its package: `diffusion_t5x.train(...)`."""

    __call__ = staticmethod(train)


sys.modules[__name__].__class__ = _CallableModule


def main(argv: Sequence[str] | None = None) -> None:
    """Reads the flags and runs `train`."""
    with config.program():
        dry_run, rest = slice_dry_run(sys.argv[1:] if argv is None else argv)
    config.run(train, rest, dry_run=dry_run)


if __name__ == "__main__":
    main()
