"""Evaluations within a training run: metrics go to its writers, predictions into its folder."""

import logging
import os
from typing import Any

from diffusion_t5x.evaluation.evaluator import Evaluator
from diffusion_t5x.evaluation.inference import write_jsonl
from diffusion_t5x.evaluation.screen import evaluation_block
from diffusion_t5x.training.metrics import Writer
from diffusion_t5x.training.state import TrainState

logger = logging.getLogger(__name__)


def evaluate_run(
    evaluator: Evaluator, writer: Writer, model_dir: str, state: TrainState, step: int
) -> dict[str, float]:
    """Returns metrics of a state by "<task>/<name>".

    They are written once all are known: an interrupted evaluation is repeated.

    Args:
      evaluator: measures losses, decodes and scores.
      writer: gets the metrics.
      model_dir: gets the predictions.
      state: the state.
      step: its number of training steps.
    """
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
