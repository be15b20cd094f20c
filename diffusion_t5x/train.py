"""Pretrain, adapt or fine-tune: trains a model with an objective on a SeqIO task or mixture.

With --dry_run --topology=v5p:4x4x8 the step is compiled for that TPU slice, which need not be there, and its memory and
least time are printed; --dry_run_output=FILE writes them as JSON, --fit looks for the largest batch that fits.
"""

import dataclasses
import logging
import os
import sys
from collections.abc import Sequence
from contextlib import closing, nullcontext
from typing import Any

import jax
import optax
from jax.sharding import Mesh

from diffusion_t5x import partitioning, records, terminal
from diffusion_t5x.checkpointing import checkpoints as checkpointing
from diffusion_t5x.checkpointing import stored
from diffusion_t5x.checkpointing.assignment import Rule
from diffusion_t5x.checkpointing.record import Record, describe
from diffusion_t5x.checkpointing.start import check_start
from diffusion_t5x.command_line import config
from diffusion_t5x.data.cached_source import CachedDataset
from diffusion_t5x.data.seqio_source import SeqioDataset
from diffusion_t5x.errors import UserError
from diffusion_t5x.evaluation.evaluator import DecodeEval, Evaluator, LossEval, prepared
from diffusion_t5x.evaluation.inference import write_jsonl
from diffusion_t5x.evaluation.loading import check_datasets, load_teacher
from diffusion_t5x.models.config import ModelConfig
from diffusion_t5x.models.transformer import ModelDefinition
from diffusion_t5x.objectives.objective import Objective
from diffusion_t5x.partitioning import MeshConfig
from diffusion_t5x.performance.dry_run import SliceDryRun, from_flags
from diffusion_t5x.training import lora as lora_training
from diffusion_t5x.training.agreement import Agreement
from diffusion_t5x.training.bad_numbers import BadNumbers, Judge
from diffusion_t5x.training.goodput import Goodput
from diffusion_t5x.training.host_batches import HostBatches
from diffusion_t5x.training.lock import locked
from diffusion_t5x.training.loop import Periods, train_loop
from diffusion_t5x.training.metrics import check_writers, make_writer
from diffusion_t5x.training.rollout import OnPolicyBatches, Rollout, check_rollout
from diffusion_t5x.training.run_config import write_config
from diffusion_t5x.training.state import TrainState, abstract_state, fresh_state, init_state, split
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
    if isinstance(dry_run, SliceDryRun):
        dry_run.train(
            mesh=mesh,
            model=model,
            objective=objective,
            dataset=train_dataset,
            optimizer=optimizer,
            lora=lora,
            microbatches=num_microbatches,
            normalizing_factor=loss_normalizing_factor,
            ema_decay=ema_decay,
            teacher_model=teacher_model,
            rollout=rollout,
        )
        return
    for setting, value, is_right, wanted in (
        ("MODEL_DIR", model_dir, model_dir != "", "the path of a folder"),
        ("TRAIN_STEPS", train_steps, train_steps >= 1, "at least 1"),
        ("LOSS_NORMALIZING_FACTOR", loss_normalizing_factor, (loss_normalizing_factor or 1) > 0, "above 0, or None"),
        ("train.train.ema_decay", ema_decay, 0 <= (ema_decay or 0) < 1, "in [0, 1), or None"),
        ("train.train.hang_timeout", hang_timeout, hang_timeout is None or hang_timeout > 0, "above 0, or None"),
    ):
        if not is_right:
            raise UserError(f"{setting} must be {wanted}, not {value!r}.")
    if dry_run:
        checkpointing.ensure_writable(model_dir, dry_run=True)
    goodput = Goodput()
    device_mesh = mesh.make()
    check_writers(metric_writers)
    loss_evals, decode_evals = prepared(loss_evals), prepared(decode_evals)
    with nullcontext() if dry_run else locked(model_dir) as check_folder:
        checkpoint_folder = os.path.join(model_dir, "checkpoints")
        find = stored.latest_whole if allow_older_checkpoint else checkpointing.latest
        resume_path = find(checkpoint_folder)
        if initial_checkpoint_path and not resume_path:
            initial_checkpoint_path = str(checkpointing.find_checkpoint(initial_checkpoint_path))
        datasets = [train_dataset, *(ev.dataset for ev in [*loss_evals, *decode_evals])]
        check_datasets(datasets, model, device_mesh)
        _check_microbatches(device_mesh, train_dataset, num_microbatches)
        check_rollout(objective, model, rollout, train_dataset)
        if objective.needs_teacher and not teacher_checkpoint_path and not dry_run:
            raise UserError(f"{type(objective).__name__} needs a teacher. Set TEACHER_CHECKPOINT_PATH.")
        if teacher_checkpoint_path:
            teacher_checkpoint_path = str(checkpointing.find_checkpoint(teacher_checkpoint_path))

        vocabulary = train_dataset.token_ids()
        definition = lora_training.define(model, vocabulary, lora)
        abstract = abstract_state(device_mesh, definition, optimizer, ema_decay is not None)
        record = Record.of(
            definition.config,
            vocabulary.describe(),
            objective,
            [ev.decoder for ev in decode_evals],
            dataset=describe(train_dataset),
            task=config.registration("MIXTURE_OR_TASK_NAME"),
            lora=lora and lora.describe(),
            **train_dataset.texts(),
        )
        decoders = [*(ev.decoder for ev in decode_evals), *([rollout.decoder] if rollout else [])]
        Agreement("train.objective", record, _ALLOW_MISMATCH, allow_mismatch).check(model, decoders)
        start_path = resume_path or initial_checkpoint_path
        start, restored = None, ""
        if start_path:
            start = checkpointing.open_checkpoint(start_path)
            agreement = Agreement.of(start, _ALLOW_MISMATCH, allow_mismatch)
            if resume_path:
                agreement.check_resumed(model, objective, lora)
            else:
                agreement.check_initial(model, objective)
                restore_rules = definition.restore_rules(restore_rules) if lora else restore_rules
            rules = () if resume_path else restore_rules
            restored = check_start(start, vocabulary, abstract, rules, resumes=bool(resume_path))
        info = _describe(definition, abstract)
        if dry_run:
            batch = next(train_dataset.train_iterator())
            shapes = (f"  {name} {x.dtype}{list(x.shape)}" for name, x in vars(batch).items() if x is not None)
            print(info, "batch:", *shapes, sep="\n")
            teacher = f", taught by {teacher_checkpoint_path}" if teacher_checkpoint_path else ""
            print(f"Would train to step {train_steps} from {start_path or 'scratch'}{teacher}. Nothing was written.")
            if restored:
                print(terminal.safe(f"It starts with:\n{restored}"))
            return

        teacher = None
        if teacher_checkpoint_path:
            teacher = load_teacher(
                teacher_checkpoint_path,
                teacher_model or model,
                vocabulary,
                device_mesh,
                _ALLOW_MISMATCH,
                allow_mismatch,
            )
        data_state, evaluation_due, losses = None, False, ()
        if resume_path:
            state, data_state, metadata = checkpointing.restore(start, abstract)
            evaluation_due, losses = metadata.get("evaluation_due", False), metadata.get("losses", ())
        elif initial_checkpoint_path:
            state = checkpointing.restore_initial(
                start,
                abstract,
                restore_rules,
                init=lambda: fresh_state(definition, optimizer, ema_decay is not None, jax.random.key(random_seed)),
            )
        else:
            state = init_state(abstract, definition, optimizer, random_seed)
        first_step = int(state.step)
        how = f"{'resuming' if resume_path else 'initialised'} from {start_path}" if start_path else "from scratch"
        logger.info("%s at step %d of %d", how, first_step, train_steps)
        if restored:
            logger.info("it starts with:\n%s", restored)
        if first_step >= train_steps and not evaluation_due:
            logger.info("%s: all %d steps are taken already, nothing to do", model_dir, train_steps)
            return

        if resume_path and allow_older_checkpoint:
            stored.set_aside_after(resume_path)
        checkpoints = checkpointing.Checkpoints(checkpoint_folder, **dataclasses.asdict(checkpoint_policy))
        if jax.process_index() == 0:
            write_config(os.path.join(model_dir, "config.gin"), config.operative_text(), first_step)
            records.write_text(os.path.join(model_dir, "model-info.txt"), info + "\n")
        share = partitioning.share_of_rows(device_mesh)
        batches = HostBatches(train_dataset.train_iterator, train_dataset.batch_size, share)
        next_batch = lambda _: next(batches)  # noqa: E731
        if rollout is not None:
            batches = OnPolicyBatches(
                device_mesh,
                definition,
                rollout,
                batches,
                num_inputs=train_dataset.task_feature_lengths["inputs"],
                batch_size=train_dataset.batch_size,
                seed=random_seed,
            )
            next_batch = batches.next_batch
        if data_state is not None:
            batches.load_state_dict(data_state)
        train_step = make_train_step(
            device_mesh,
            abstract,
            definition,
            objective,
            optimizer,
            seed=random_seed,
            microbatches=num_microbatches,
            normalizing_factor=loss_normalizing_factor,
            ema_decay=ema_decay,
            teacher=teacher,
        )
        evaluator = Evaluator(device_mesh, definition, objective, loss_evals, decode_evals, teacher)
        writer = make_writer(model_dir, metric_writers, first_step, config.operative_values())

        def evaluate(state: TrainState, step: int) -> dict[str, float]:
            # Metrics are written when all are known: an evaluation that is broken off is done again.
            losses = evaluator.losses(state.eval_params)
            results = [("training_eval", task, metrics) for task, metrics in losses.items()]

            def keep(task: str, predictions: list[dict[str, Any]]) -> None:
                write_jsonl(os.path.join(model_dir, "inference_eval", task, f"predictions_{step}.jsonl"), predictions)

            for task, metrics, _ in evaluator.decode(state.eval_params, keep):
                results.append(("inference_eval", task, metrics))
            for kind, task, metrics in results:
                writer.write(step, f"{kind}/{task}", metrics)
            found = {f"{task}/{name}": value for _, task, metrics in results for name, value in metrics.items()}
            if found:
                logger.info("step %d: %s", step, "  ".join(f"{name} {value:.4g}" for name, value in found.items()))
            return found

        rows = f"{train_dataset.batch_size} rows of {train_dataset.row_length} tokens"
        with goodput, explained(abstract, rows, model_dir), closing(writer), closing(checkpoints):
            train_loop(
                mesh=device_mesh,
                state=state,
                train_step=train_step,
                next_batch=next_batch,
                data_state=batches.state_dict,
                total_steps=train_steps,
                periods=periods,
                evaluate=evaluate,
                checkpoints=checkpoints,
                metadata={
                    **record.metadata(),
                    "config": config.operative_text(),
                },
                writer=writer,
                judge=Judge(bad_numbers, model_dir, losses),
                goodput=goodput,
                evaluation_due=evaluation_due,
                hang_timeout=hang_timeout,
                check_folder=check_folder,
                description=f"{type(objective).__name__} on {train_dataset.name}",
            )


def _check_microbatches(mesh: Mesh, dataset: SeqioDataset, num_microbatches: int) -> None:
    rows = dataset.batch_size
    if num_microbatches < 1 or rows % num_microbatches:
        raise UserError(f"A batch of {rows} rows cannot be cut into num_microbatches = {num_microbatches}.")
    partitioning.check_batch(mesh, rows // num_microbatches, dataset.row_length)


def _describe(definition: ModelDefinition, state: TrainState) -> str:
    """Size and parameters of the model, one line each with shape, logical axes and partition."""
    names = jax.tree.leaves(definition.axes(), is_leaf=lambda x: isinstance(x, tuple))
    rows = [
        f"  {jax.tree_util.keystr(path, simple=True, separator='/')} {list(leaf.shape)} "
        f"({', '.join(axes)}) {leaf.sharding.spec}"
        for (path, leaf), axes in zip(jax.tree_util.tree_leaves_with_path(state.params), names, strict=True)
    ]
    trained, _ = split(definition, state.params)
    size = sum(leaf.size for leaf in jax.tree.leaves(trained))
    of_which = "" if size == definition.num_params() else f", {size:,} of them trained"
    return "\n".join([f"model: {definition.num_params():,} parameters{of_which}", *rows])


def main(argv: Sequence[str] | None = None) -> None:
    """Reads the flags and runs `train`."""
    with config.program():
        dry_run, rest = from_flags(sys.argv[1:] if argv is None else argv)
    config.run(train, rest, dry_run=dry_run)


if __name__ == "__main__":
    main()
