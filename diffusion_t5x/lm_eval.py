"""Evaluate a checkpoint with EleutherAI's lm-evaluation-harness, on its tasks or your own.

With --checkpoint DIR (a MODEL_DIR, a checkpoint or what convert wrote) model, vocabulary, objective, decoder and
lengths come from the checkpoint; gin files and --gin.NAME=VALUE change them. Results go to lm_eval/ in the MODEL_DIR.
--tasks=NAME,NAME ...; --include_path=DIR adds your own task files; --limit=N takes the first N examples of each task;
--num_fewshot=N puts N examples before each.
"""

import hashlib
import json
import logging
import pathlib
import types
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jax

from diffusion_t5x import partitioning
from diffusion_t5x.checkpointing import checkpoints
from diffusion_t5x.checkpointing.assignment import Rule
from diffusion_t5x.command_line import config
from diffusion_t5x.command_line.recorded import checkpoint_texts
from diffusion_t5x.command_line.verbs import own_flags
from diffusion_t5x.data.vocabularies import token_ids
from diffusion_t5x.decoding.decoder import Decoder
from diffusion_t5x.errors import UserError, did_you_mean
from diffusion_t5x.evaluation import results
from diffusion_t5x.evaluation.harness import Harness, Rows
from diffusion_t5x.evaluation.inference import write_jsonl
from diffusion_t5x.evaluation.lm_adapter import adapt
from diffusion_t5x.evaluation.loading import load_model
from diffusion_t5x.models.config import ModelConfig
from diffusion_t5x.objectives.likelihood import check_num_draws
from diffusion_t5x.objectives.objective import Objective
from diffusion_t5x.partitioning import MeshConfig
from diffusion_t5x.training.agreement import Agreement

if TYPE_CHECKING:
    import lm_eval.tasks

    from diffusion_t5x.data.vocabulary import AnyVocabulary

logger = logging.getLogger(__name__)


def evaluate(
    *,
    model: ModelConfig,
    checkpoint_path: str,
    vocabulary: "AnyVocabulary",
    rows: Rows,
    objective: Objective,
    decoder: Decoder,
    eval_output_dir: str | None = None,
    tasks: Sequence[str] = (),
    include_path: str | None = None,
    num_fewshot: int | None = None,
    limit: int | None = None,
    num_draws: int = 128,
    random_seed: int = 0,
    restore_rules: Sequence[Rule] = (),
    use_ema: bool = True,
    allow_mismatch: bool = False,
    mesh: MeshConfig = MeshConfig(),  # noqa: B008  (frozen)
    dry_run: bool = False,
) -> None:
    """Runs tasks of lm-evaluation-harness on a checkpoint.

    `eval_output_dir` gets results.json, as `eval` writes it, and for each task `<task>_samples.jsonl`, the harness's
    own records of requests and responses. A repeated call with the same settings does nothing.

    Args:
      model: dimensions of the checkpoint's model.
      checkpoint_path: a checkpoint folder, a folder of them or a MODEL_DIR.
      vocabulary: of the model.
      rows: layout of requests in rows.
      objective: computes likelihoods.
      decoder: writes the texts.
      eval_output_dir: made if it is not there; None is lm_eval/checkpoint_<step>/ in the checkpoint's MODEL_DIR.
      tasks: names that the harness knows: tasks, groups, tags.
      include_path: a folder with your own task files.
      num_fewshot: examples before each, but where a task says 0; None leaves it to the task.
      limit: number of examples of each task, from the start.
      num_draws: for likelihoods that are estimates; an even number.
      random_seed: of draws and decoder.
      restore_rules: assignment rules, as in training.
      use_ema: take the parameters' moving average where the checkpoint has one.
      allow_mismatch: use the model other than as trained, according to the checkpoint's record: with another
        function, decoder or objective.
      mesh: how the devices are arranged.
      dry_run: check everything, print what would be done, and evaluate nothing.

    Raises:
      UserError: anything that does not fit, before anything is compiled; or the output has results of other settings:
        nothing is overwritten.
    """
    lm_eval = _library()
    manager = _task_manager(lm_eval, tasks, include_path)
    device_mesh = mesh.make()
    checkpoint = checkpoints.open_checkpoint(checkpoint_path)
    path = str(checkpoint)
    eval_output_dir = eval_output_dir or str(checkpoint.model_dir / "lm_eval" / checkpoint.path.name)
    check_num_draws(num_draws)
    if rows.architecture != model.architecture:
        raise UserError(f"Rows.architecture is {rows.architecture}, but ModelConfig.architecture {model.architecture}.")
    model.check_length(rows.row_length)
    partitioning.check_batch(device_mesh, rows.batch_size, rows.row_length)
    checkpoints.ensure_writable(eval_output_dir, dry_run)
    settings = results.describe(
        {
            "tasks": tasks,
            "task_files": include_path and _fingerprint(pathlib.Path(include_path).expanduser()),
            "num_fewshot": num_fewshot,
            "limit": limit,
            "rows": rows,
            "objective": objective,
            "num_draws": num_draws,
            "decoder": decoder,
            "random_seed": random_seed,
            "model": model,
            "restore_rules": restore_rules,
            "use_ema": use_ema,
        }
    )
    agreement = Agreement.of(checkpoint, "lm_eval.evaluate.allow_mismatch", allow_mismatch)
    agreement.check(model, [objective, decoder])
    if results.is_done(pathlib.Path(eval_output_dir), path, settings):
        logger.info("%s has these results already", eval_output_dir)
        return
    ids = token_ids(vocabulary)
    definition, params = load_model(checkpoint, model, ids, device_mesh, restore_rules=restore_rules, use_ema=use_ema)
    if dry_run:
        print(f"Would evaluate {path} ({definition.num_params():,} parameters) on {', '.join(tasks)}.")
        return
    harness = Harness(device_mesh, definition, params, objective, decoder, rows, num_draws, random_seed)
    found = lm_eval.simple_evaluate(
        adapt(harness, vocabulary, rows),
        tasks=list(tasks),
        num_fewshot=num_fewshot,
        limit=limit,
        task_manager=manager,
        torch_random_seed=None,  # there need be no torch
    )
    found = json.loads(json.dumps(found, default=str))
    samples = found.pop("samples")
    scores = {task: _plain_metrics(metrics) for task, metrics in found["results"].items()}
    report = {
        "results": scores,
        "checkpoint": path,
        "step": checkpoint.metadata["step"],
        "evaluations": [f"lm_eval(task={task!r}, rows={rows!r})" for task in tasks],
        "settings": settings,
        "data": {task: results.fingerprint(map(_asked, records)) for task, records in samples.items()},
        "training_objective": checkpoint.record.trained_by,
        "num_parameters": definition.num_params(),
        "vocabulary": ids.describe(),
        "devices": f"{jax.device_count()} × {jax.devices()[0].device_kind}",
        **results.provenance(scores),
        "lm_eval": found,
        "config": config.operative_text(),
    }
    for task, records in samples.items():
        write_jsonl(str(pathlib.Path(eval_output_dir, f"{task}_samples.jsonl")), records)
    for task, metrics in scores.items():
        logger.info("%s: %s", task, results.summary(metrics))
    if jax.process_index() == 0:
        results.write_results(eval_output_dir, report)
        logger.info("wrote %s", pathlib.Path(eval_output_dir, "results.json"))


def _library() -> types.ModuleType:
    try:
        import lm_eval
        import lm_eval.tasks
    except ImportError as error:
        raise UserError(
            f"lm-evaluation-harness cannot be imported ({error}): pip install 'diffusion_t5x[lm-eval]'."
        ) from error
    return lm_eval


def _task_manager(
    lm_eval: types.ModuleType, tasks: Sequence[str], include_path: str | None
) -> "lm_eval.tasks.TaskManager":
    """The harness's task manager; raises a UserError if it does not know a task."""
    if isinstance(tasks, str) or not tasks:
        raise UserError("No tasks. Give --tasks=NAME,NAME.")
    if include_path and not pathlib.Path(include_path).expanduser().is_dir():
        raise UserError(f"There is no folder {include_path}, which --include_path names.")
    manager = lm_eval.tasks.TaskManager(include_path=include_path and str(pathlib.Path(include_path).expanduser()))
    for task in tasks:
        if task not in manager.all_tasks:
            raise UserError(
                f"lm-evaluation-harness knows no task {task!r}.{did_you_mean(task, manager.all_tasks)} "
                "--include_path=DIR adds your own task files."
            )
    return manager


def _fingerprint(folder: pathlib.Path) -> str:
    """SHA-256 of the task files in a folder."""
    files = sorted(path for path in folder.rglob("*") if path.suffix in (".yaml", ".yml", ".py"))
    contents = (f"{path.relative_to(folder)} {hashlib.sha256(path.read_bytes()).hexdigest()}" for path in files)
    return hashlib.sha256("\n".join(contents).encode()).hexdigest()


def _plain_metrics(metrics: Mapping[str, Any]) -> dict[str, float]:
    """Numbers by name: "acc" where the harness says "acc,none", after the filter that the answers went through."""
    return {name.removesuffix(",none"): value for name, value in metrics.items() if isinstance(value, int | float)}


def _asked(record: Mapping[str, Any]) -> dict[str, Any]:
    return {"inputs_pretokenized": record["arguments"], "targets_pretokenized": record["target"]}


def main(argv: Sequence[str] | None = None) -> None:
    """Reads the flags and runs `evaluate`."""
    with config.program():
        flags, rest = own_flags("lm_eval").parse_known_args(argv)
        checkpoint = flags.checkpoint and checkpoints.open_checkpoint(flags.checkpoint)
        rest, texts = checkpoint_texts(checkpoint, rest, ["runs/lm_eval.gin"], {"EVAL_OUTPUT_DIR": None})
    given = {name: value for name, value in vars(flags).items() if value is not None and name != "checkpoint"}
    bindings = [f"--gin.lm_eval.evaluate.{name}={value!r}" for name, value in given.items()]
    config.run(evaluate, [*rest, *bindings], texts=texts)


if __name__ == "__main__":
    main()
