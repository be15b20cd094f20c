"""Evaluate a checkpoint: decode a task's examples, score them, and write down how it was done."""

import importlib.metadata
import json
import logging
import os
import pathlib
from collections.abc import Sequence

import jax

from diffusion_t5x import config
from diffusion_t5x.errors import UserError
from diffusion_t5x.evaluation.evaluator import DecodeEval, Evaluator, LossEval
from diffusion_t5x.evaluation.inference import write_jsonl
from diffusion_t5x.evaluation.loading import check_datasets, load_model, load_teacher
from diffusion_t5x.models.config import ModelConfig
from diffusion_t5x.objectives.objective import Objective
from diffusion_t5x.partitioning import MeshConfig
from diffusion_t5x.training import checkpoints
from diffusion_t5x.training.assignment import Rule

logger = logging.getLogger(__name__)
_PACKAGES = ("diffusion_t5x", "jax", "flax", "seqio", "tensorflow", "sacrebleu")


def evaluate(
    *,
    model: ModelConfig,
    checkpoint_path: str,
    eval_output_dir: str,
    decode_evals: Sequence[DecodeEval] = (),
    objective: Objective | None = None,
    loss_evals: Sequence[LossEval] = (),
    restore_rules: Sequence[Rule] = (),
    use_ema: bool = True,
    teacher_checkpoint_path: str | None = None,
    teacher_model: ModelConfig | None = None,
    mesh: MeshConfig = MeshConfig(),  # noqa: B008  (frozen)
    dry_run: bool = False,
) -> None:
    """Scores one checkpoint.

    `eval_output_dir` gets results.json (metrics, and all it takes to repeat them) and, for each decoded task,
    `<task>_predictions.jsonl`.

    Args:
      model: dimensions of the checkpoint's model.
      checkpoint_path: a checkpoint folder, a folder of them or a MODEL_DIR.
      eval_output_dir: made if it is not there.
      decode_evals: what to decode and score.
      objective: whose loss `loss_evals` measure.
      loss_evals: losses to measure.
      restore_rules: assignment rules, as in training.
      use_ema: take the parameters' moving average where the checkpoint has one.
      teacher_checkpoint_path: of an autoregressive model that judges what is decoded ("teacher_nll",
        "teacher_agreement"), and that a distillation's loss needs.
      teacher_model: its dimensions; None takes the model's.
      mesh: how the devices are arranged.
      dry_run: check everything, print what would be done, and evaluate nothing.

    Raises:
      UserError: anything that does not fit, before anything is compiled.
    """
    device_mesh = mesh.make()
    path = str(checkpoints.find_checkpoint(checkpoint_path))
    if not dry_run:
        checkpoints.ensure_writable(eval_output_dir)
    evals = [*loss_evals, *decode_evals]
    if not evals:
        raise UserError("Nothing to evaluate: set evaluate.decode_evals or evaluate.loss_evals.")
    if loss_evals and objective is None:
        raise UserError("evaluate.loss_evals needs evaluate.objective: whose loss?")
    check_datasets([ev.dataset for ev in evals], model, device_mesh)
    vocabulary = evals[0].dataset.token_ids()
    definition, params = load_model(path, model, vocabulary, device_mesh, restore_rules=restore_rules, use_ema=use_ema)
    teacher = None
    if teacher_checkpoint_path:
        teacher = load_teacher(teacher_checkpoint_path, teacher_model or model, vocabulary, device_mesh)
    if dry_run:
        print(f"Would evaluate {path} ({definition.num_params():,} parameters):", *evals, sep="\n  ")
        return

    evaluator = Evaluator(device_mesh, definition, objective, loss_evals, decode_evals, teacher)
    results = {name: dict(metrics) for name, metrics in evaluator.losses(params).items()}
    for task, metrics, records in evaluator.decode(params):
        results[task] = results.get(task, {}) | metrics | {"num_examples": len(records)}
        write_jsonl(os.path.join(eval_output_dir, f"{task}_predictions.jsonl"), records)
    for name, metrics in results.items():
        logger.info("%s: %s", name, "  ".join(f"{metric} {value:.4g}" for metric, value in metrics.items()))
    report = {
        "results": results,
        "checkpoint": path,
        "teacher": teacher_checkpoint_path,
        "step": checkpoints.read_metadata(path)["step"],
        "evaluations": [repr(ev) for ev in evals],
        "vocabulary": vocabulary.describe(),
        "versions": {name: importlib.metadata.version(name) for name in _PACKAGES},
        "config": config.operative_text(),
    }
    if jax.process_index() == 0:
        output = pathlib.Path(eval_output_dir, "results.json")
        output.write_text(json.dumps(report, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        logger.info("wrote %s", output)


if __name__ == "__main__":
    config.run(evaluate)
