"""Pretrain, adapt or fine-tune: trains a model with an objective on a SeqIO task or mixture.

With --dry_run --topology=v5p:4x4x8 the step is compiled for that TPU slice, which need not be there, and its memory and
least time are printed; --dry_run_output=FILE writes them as JSON, --fit looks for the largest batch that fits.
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
from diffusion_t5x.checkpointing.assignment import Rule, named_leaves
from diffusion_t5x.checkpointing.checkpoints import Checkpoints, ensure_writable, find_checkpoint
from diffusion_t5x.checkpointing.record import Record, describe
from diffusion_t5x.command_line import config
from diffusion_t5x.command_line.slice_flags import slice_dry_run
from diffusion_t5x.data.batch import Batch
from diffusion_t5x.data.cached_source import CachedDataset
from diffusion_t5x.data.seqio_source import SeqioDataset
from diffusion_t5x.errors import UserError
from diffusion_t5x.evaluation.evaluator import DecodeEval, Evaluator, LossEval, check_decoders, prepared
from diffusion_t5x.evaluation.inference import write_jsonl
from diffusion_t5x.evaluation.loading import Dataset, check_datasets, load_teacher
from diffusion_t5x.evaluation.screen import evaluation_block, next_commands
from diffusion_t5x.models.config import ModelConfig
from diffusion_t5x.models.transformer import ModelDefinition
from diffusion_t5x.objectives.objective import Objective
from diffusion_t5x.partitioning import MeshConfig
from diffusion_t5x.performance.dry_run import SliceDryRun
from diffusion_t5x.training import lora as lora_training
from diffusion_t5x.training.agreement import Agreement
from diffusion_t5x.training.bad_numbers import BadNumbers, Judge
from diffusion_t5x.training.beginning import Start
from diffusion_t5x.training.goodput import Goodput
from diffusion_t5x.training.host_batches import HostBatches
from diffusion_t5x.training.lock import locked
from diffusion_t5x.training.loop import Periods, train_loop
from diffusion_t5x.training.metrics import Writer, check_writers, make_writer
from diffusion_t5x.training.rollout import OnPolicyBatches, Rollout, check_rollout
from diffusion_t5x.training.run_config import write_config
from diffusion_t5x.training.state import TrainState, abstract_state, split
from diffusion_t5x.training.step import make_train_step
from diffusion_t5x.training.surroundings import explained

logger = logging.getLogger(__name__)

_ALLOW_MISMATCH = "train.train.allow_mismatch"


@dataclasses.dataclass(frozen=True)
class CheckpointPolicy:
    """Which checkpoints stay.

    Attributes:
      keep_last: how many of the newest.
      keep_best: how many of the best by `best_metric`, beside those.
      best_metric: of the evaluation that goes with a checkpoint, such as "my_task/exact_match" or "my_task/loss".
      best_mode: "max" where more is better, "min" where less is.
    """

    keep_last: int = 1
    keep_best: int = 0
    best_metric: str = ""
    best_mode: str = "max"


def train(
    *,
    model_dir: str,
    model: ModelConfig,
    objective: Objective,
    train_dataset: SeqioDataset | CachedDataset,
    optimizer: optax.GradientTransformation,
    train_steps: int,
    lora: lora_training.Lora | None = None,
    random_seed: int = 0,
    initial_checkpoint_path: str | None = None,
    restore_rules: Sequence[Rule] = (),
    teacher_checkpoint_path: str | None = None,
    teacher_model: ModelConfig | None = None,
    rollout: Rollout | None = None,
    mesh: MeshConfig = MeshConfig(),  # noqa: B008  (frozen)
    num_microbatches: int = 1,
    loss_normalizing_factor: float | None = None,
    ema_decay: float | None = None,
    periods: Periods = Periods(),  # noqa: B008  (frozen)
    loss_evals: Sequence[LossEval] = (),
    decode_evals: Sequence[DecodeEval] = (),
    checkpoint_policy: CheckpointPolicy = CheckpointPolicy(),  # noqa: B008  (frozen)
    allow_older_checkpoint: bool = False,
    allow_mismatch: bool = False,
    bad_numbers: BadNumbers = BadNumbers(),  # noqa: B008  (frozen)
    hang_timeout: float | None = 1800.0,
    metric_writers: Sequence[str] = ("jsonl", "tensorboard"),
    dry_run: bool | SliceDryRun = False,
) -> None:
    """Trains up to `train_steps` and leaves everything in `model_dir`.

    It goes on from the latest checkpoint in `model_dir`; where there is none, it starts from
    `initial_checkpoint_path` by the assignment rules; without that, from scratch. The log says which.

    Args:
      model_dir: gets config.gin, model-info.txt, checkpoints/, train/, training_eval/ and inference_eval/.
      model: dimensions; the vocabulary's size comes from the task.
      objective: what is minimised.
      train_dataset: what is read.
      optimizer: see `training.optimizers`.
      train_steps: steps in all, those before a resumption (or in the initial checkpoint) counted.
      lora: what is trained in place of the whole model, which stays as it is; None trains all of it.
      random_seed: of initialisation, noise and dropout. The data have a seed of their own.
      initial_checkpoint_path: a checkpoint folder, a folder of them or a MODEL_DIR.
      restore_rules: `(target regex, source template or None)`, as in T5X; only for `initial_checkpoint_path`.
      teacher_checkpoint_path: of the autoregressive model that a distillation learns from; it also judges what is
        decoded ("teacher_nll", "teacher_agreement").
      teacher_model: its dimensions; None takes the student's.
      rollout: trains on what the model itself writes to the inputs of `train_dataset`; None on the data's targets.
      mesh: how the devices are arranged.
      num_microbatches: pieces in which a step goes through its batch.
      loss_normalizing_factor: divides the summed loss in place of the objective's own denominator.
      ema_decay: keeps a moving average of the parameters that evaluation uses; None keeps none.
      periods: of logging, evaluation and saving.
      loss_evals: losses measured at each evaluation.
      decode_evals: decoding and scoring at each evaluation.
      checkpoint_policy: which checkpoints stay.
      allow_older_checkpoint: where the latest checkpoint in `model_dir` is broken, go on from the newest whole one.
      allow_mismatch: go on, or start, from a checkpoint whose record says that it is of another model or was trained
        otherwise; decode by decoders that do not suit the objective.
      bad_numbers: which steps are not applied, and how many of them end the run.
      hang_timeout: seconds; a step that takes longer ends the run, with where every thread stands; None waits for ever.
      metric_writers: "jsonl", "tensorboard", "wandb" (Weights & Biases, an extra).
      dry_run: build model, data and shapes, check the checkpoint, print what it would start with, and train nothing.
        For a TPU slice: compile the step for it and print what it would take.

    Raises:
      UserError: anything that does not fit, before training data are read and before anything is compiled.
      SystemExit: told to stop, it has saved; see `training.preemption` for the exit codes.
    """
    step: dict[str, Any] = {"objective": objective, "optimizer": optimizer, "microbatches": num_microbatches}
    step |= {"normalizing_factor": loss_normalizing_factor, "ema_decay": ema_decay}
    if isinstance(dry_run, SliceDryRun):
        dry_run.train(
            mesh=mesh,
            model=model,
            dataset=train_dataset,
            lora=lora,
            teacher_model=teacher_model,
            rollout=rollout,
            **step,
        )
        return
    _check_settings(model_dir, train_steps, loss_normalizing_factor, ema_decay, hang_timeout, bool(dry_run))
    goodput = Goodput()
    device_mesh = mesh.make()
    check_writers(metric_writers)
    loss_evals, decode_evals = prepared(loss_evals), prepared(decode_evals)
    with nullcontext(lambda: None) if dry_run else locked(model_dir) as check_folder:
        folder = os.path.join(model_dir, "checkpoints")
        start = Start.find(folder, initial_checkpoint_path, restore_rules, allow_older_checkpoint)
        teacher_path = _find_teacher(objective, teacher_checkpoint_path, bool(dry_run))
        _check_data(device_mesh, model, train_dataset, loss_evals, decode_evals, num_microbatches)
        check_rollout(objective, model, rollout, train_dataset)
        definition = lora_training.define(model, train_dataset.token_ids(), lora)
        abstract = abstract_state(device_mesh, definition, optimizer, ema_decay is not None)
        record = _record(definition, objective, train_dataset, decode_evals, lora)
        decoders = [*(ev.decoder for ev in decode_evals), *([rollout.decoder] if rollout else [])]
        Agreement("train.objective", record, _ALLOW_MISMATCH, allow_mismatch).check(model, decoders)
        check_decoders(device_mesh, definition, decode_evals, abstract.eval_params)
        assignment = start.check(definition, abstract, objective, lora, _ALLOW_MISMATCH, allow_mismatch)
        info = _describe(definition, abstract)
        if dry_run:
            _show_plan(info, train_dataset, train_steps, start, teacher_path, assignment)
            return

        teacher = None
        if teacher_path:
            judged = (definition.vocabulary, device_mesh, _ALLOW_MISMATCH, allow_mismatch)
            teacher = load_teacher(teacher_path, teacher_model or model, *judged)
        begun = start.begin(definition, optimizer, abstract, random_seed)
        first_step = int(begun.state.step)
        _log_start(start, first_step, train_steps, assignment)
        if first_step >= train_steps and not begun.evaluation_due:
            logger.info("%s: all %d steps are taken already, nothing to do", model_dir, train_steps)
            return

        if start.checkpoint and start.resumes and allow_older_checkpoint:
            stored.set_aside_after(start.checkpoint.named)
        checkpoints = Checkpoints(folder, **dataclasses.asdict(checkpoint_policy))
        _write_description(model_dir, info, first_step)
        batches, next_batch = _batches(device_mesh, definition, train_dataset, rollout, random_seed)
        if begun.data_state is not None:
            batches.load_state_dict(begun.data_state)
        train_step = make_train_step(device_mesh, abstract, definition, seed=random_seed, teacher=teacher, **step)
        evaluator = Evaluator(device_mesh, definition, objective, loss_evals, decode_evals, teacher)
        writer = make_writer(model_dir, metric_writers, first_step, config.operative_values())
        rows = f"{train_dataset.batch_size} rows of {train_dataset.row_length} tokens"
        with goodput, explained(abstract, rows, model_dir), closing(writer), closing(checkpoints):
            train_loop(
                mesh=device_mesh,
                state=begun.state,
                train_step=train_step,
                next_batch=next_batch,
                data_state=batches.state_dict,
                total_steps=train_steps,
                periods=periods,
                evaluate=functools.partial(_evaluate, evaluator, writer, model_dir),
                checkpoints=checkpoints,
                metadata={**record.metadata(), "config": config.operative_text()},
                writer=writer,
                judge=Judge(bad_numbers, model_dir, begun.losses),
                goodput=goodput,
                evaluation_due=begun.evaluation_due,
                hang_timeout=hang_timeout,
                check_folder=check_folder,
                description=f"{type(objective).__name__} on {train_dataset.name}",
            )
        _log_next(model_dir, record, train_dataset)


def _write_description(model_dir: str, info: str, first_step: int) -> None:
    if jax.process_index() == 0:
        write_config(os.path.join(model_dir, "config.gin"), config.operative_text(), first_step)
        records.write_text(os.path.join(model_dir, "model-info.txt"), info + "\n")


def _log_next(model_dir: str, record: Record, dataset: SeqioDataset | CachedDataset) -> None:
    scored = isinstance(dataset, SeqioDataset) and dataset.has_metrics
    logger.info("%s", next_commands(model_dir, writes=record.decoder is not None, scored=scored))


def _check_settings(
    model_dir: str,
    train_steps: int,
    loss_normalizing_factor: float | None,
    ema_decay: float | None,
    hang_timeout: float | None,
    dry_run: bool,
) -> None:
    def above_0(value: float | None) -> bool:
        return value is None or value > 0

    for name, value, is_right, wanted in (
        ("MODEL_DIR", model_dir, model_dir != "", "the path of a folder"),
        ("TRAIN_STEPS", train_steps, train_steps >= 1, "at least 1"),
        ("LOSS_NORMALIZING_FACTOR", loss_normalizing_factor, above_0(loss_normalizing_factor), "above 0, or None"),
        ("train.train.ema_decay", ema_decay, ema_decay is None or 0 <= ema_decay < 1, "in [0, 1), or None"),
        ("train.train.hang_timeout", hang_timeout, above_0(hang_timeout), "above 0, or None"),
    ):
        if not is_right:
            raise UserError(f"{name} must be {wanted}, not {value!r}.")
    if dry_run:
        ensure_writable(model_dir, dry_run=True)


def _check_data(
    mesh: Mesh,
    model: ModelConfig,
    dataset: SeqioDataset | CachedDataset,
    loss_evals: Sequence[LossEval],
    decode_evals: Sequence[DecodeEval],
    num_microbatches: int,
) -> None:
    """Raises a UserError where a data set does not fit the model or the mesh, or batches do not divide."""
    datasets: list[Dataset] = [dataset, *(ev.dataset for ev in loss_evals), *(ev.dataset for ev in decode_evals)]
    check_datasets(datasets, model, mesh)
    for ev in decode_evals:
        ev.dataset.check_scoring()
    rows = dataset.batch_size
    if num_microbatches < 1 or rows % num_microbatches:
        raise UserError(f"A batch of {rows} rows cannot be cut into num_microbatches = {num_microbatches}.")
    partitioning.check_batch(mesh, rows // num_microbatches, dataset.row_length)


def _find_teacher(objective: Objective, path: str | None, may_be_missing: bool) -> str | None:
    if objective.needs_teacher and not path and not may_be_missing:
        raise UserError(f"{type(objective).__name__} needs a teacher. Set TEACHER_CHECKPOINT_PATH.")
    return str(find_checkpoint(path)) if path else None


def _record(
    definition: ModelDefinition,
    objective: Objective,
    dataset: SeqioDataset | CachedDataset,
    decode_evals: Sequence[DecodeEval],
    lora: lora_training.Lora | None,
) -> Record:
    """What the checkpoints will say of this training."""
    return Record.of(
        definition.config,
        definition.vocabulary.describe(),
        objective,
        [ev.decoder for ev in decode_evals],
        dataset=describe(dataset),
        task=config.registration("MIXTURE_OR_TASK_NAME"),
        lora=lora and lora.describe(),
        **dataset.texts(),
    )


def _show_plan(
    info: str,
    dataset: SeqioDataset | CachedDataset,
    train_steps: int,
    start: Start,
    teacher_path: str | None,
    assignment: str,
) -> None:
    """Prints what a run would do, for a dry run."""
    batch = next(dataset.train_iterator())
    shapes = (f"  {name} {x.dtype}{list(x.shape)}" for name, x in vars(batch).items() if x is not None)
    print(info, "batch:", *shapes, sep="\n")
    teacher = f", taught by {teacher_path}" if teacher_path else ""
    source = start.checkpoint.named if start.checkpoint else "scratch"
    print(f"Would train to step {train_steps} from {source}{teacher}. Nothing was written.")
    if assignment:
        print(terminal.safe(f"It starts with:\n{assignment}"))


def _log_start(start: Start, step: int, train_steps: int, assignment: str) -> None:
    logger.info("%s at step %d of %d", start, step, train_steps)
    if assignment:
        logger.info("it starts with:\n%s", assignment)


def _batches(
    mesh: Mesh,
    definition: ModelDefinition,
    dataset: SeqioDataset | CachedDataset,
    rollout: Rollout | None,
    seed: int,
) -> tuple[HostBatches | OnPolicyBatches, Callable[[TrainState], Batch]]:
    """This process's share of the batches, of the data or of what the model writes to them; and the next."""
    batches = HostBatches(dataset.train_iterator, dataset.batch_size, partitioning.share_of_rows(mesh))
    if rollout is None:
        return batches, lambda _: next(batches)
    num_inputs = dataset.task_feature_lengths["inputs"]
    written = OnPolicyBatches(mesh, definition, rollout, batches, num_inputs, dataset.batch_size, seed)
    return written, written.next_batch


def _evaluate(evaluator: Evaluator, writer: Writer, model_dir: str, state: TrainState, step: int) -> dict[str, float]:
    """Metrics of a state by "<task>/<name>". They are written when all are known: an evaluation that is broken off is
    done again."""
    losses = evaluator.losses(state.eval_params)
    results = [("training_eval", task, metrics) for task, metrics in losses.items()]

    def keep(task: str, predictions: list[dict[str, Any]]) -> None:
        write_jsonl(os.path.join(model_dir, "inference_eval", task, f"predictions_{step}.jsonl"), predictions)

    samples = {}
    for task, metrics, predictions in evaluator.decode(state.eval_params, keep):
        results.append(("inference_eval", task, metrics))
        samples[task] = predictions[:2]
    for kind, task, metrics in results:
        writer.write(step, f"{kind}/{task}", metrics)
    found = {f"{task}/{name}": value for _, task, metrics in results for name, value in metrics.items()}
    if found:
        scores = [(task, metrics) for _, task, metrics in results]
        logger.info("%s", evaluation_block(f"evaluation at step {step:,} [95 % interval]", scores, samples))
    return found


def _describe(definition: ModelDefinition, state: TrainState) -> str:
    """Size and parameters of the model, one line each with shape, logical axes and partition."""
    names = jax.tree.leaves(definition.axes(), is_leaf=lambda x: isinstance(x, tuple))
    rows = [
        f"  {name} {list(leaf.shape)} ({', '.join(axes)}) {leaf.sharding.spec}"
        for (name, leaf), axes in zip(named_leaves(state.params).items(), names, strict=True)
    ]
    trained, _ = split(definition, state.params)
    size = sum(leaf.size for leaf in jax.tree.leaves(trained))
    of_which = "" if size == definition.num_params() else f", {size:,} of them trained"
    return "\n".join([f"model: {definition.num_params():,} parameters{of_which}", *rows])


class _CallableModule(types.ModuleType):
    """This module is the attribute `train` of its package, and so it can be called: `diffusion_t5x.train(...)`."""

    __call__ = staticmethod(train)


sys.modules[__name__].__class__ = _CallableModule


def main(argv: Sequence[str] | None = None) -> None:
    """Reads the flags and runs `train`."""
    with config.program():
        dry_run, rest = slice_dry_run(sys.argv[1:] if argv is None else argv)
    config.run(train, rest, dry_run=dry_run)


if __name__ == "__main__":
    main()
