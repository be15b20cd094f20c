"""Write predictions for a task's examples, or scores of them, as JSON lines, going on where an earlier run stopped."""

import json
import logging
import pathlib
from collections.abc import Sequence
from typing import Literal

import jax

from diffusion_t5x import config
from diffusion_t5x.data.seqio_source import SeqioDataset
from diffusion_t5x.decoding.decoder import Decoder
from diffusion_t5x.errors import UserError
from diffusion_t5x.evaluation.inference import make_decode_step, predict
from diffusion_t5x.evaluation.likelihood import likelihoods, make_likelihood_step
from diffusion_t5x.evaluation.loading import check_datasets, load_model
from diffusion_t5x.models.config import ModelConfig
from diffusion_t5x.objectives.likelihood import check_num_draws
from diffusion_t5x.objectives.objective import Objective
from diffusion_t5x.partitioning import MeshConfig
from diffusion_t5x.training import checkpoints
from diffusion_t5x.training.assignment import Rule
from diffusion_t5x.training.progress import Progress

logger = logging.getLogger(__name__)


def infer(
    *,
    model: ModelConfig,
    checkpoint_path: str,
    dataset: SeqioDataset,
    infer_output_dir: str,
    mode: Literal["predict", "score"] = "predict",
    decoder: Decoder | None = None,
    objective: Objective | None = None,
    num_draws: int = 128,
    num_examples: int | None = None,
    trace: bool = False,
    random_seed: int = 0,
    restore_rules: Sequence[Rule] = (),
    use_ema: bool = True,
    mesh: MeshConfig = MeshConfig(),  # noqa: B008  (frozen)
    dry_run: bool = False,
) -> None:
    """Decodes or scores a task and writes `<task>-<split>.jsonl`, an example a line, in the task's order.

    A line has "example_id", "inputs", "targets", "prediction" and "score" (the decoder says what it means), and
    "trace" on request. A line of scores has "log_likelihood" (of the targets, in nats), "standard_error", "num_tokens"
    and "num_bytes" in place of what was decoded; the file is `<task>-<split>-score.jsonl`. Started again with the same
    settings, it does only what is missing.

    Args:
      model: dimensions of the checkpoint's model.
      checkpoint_path: a checkpoint folder, a folder of them or a MODEL_DIR.
      dataset: task, split, lengths and batch size.
      infer_output_dir: made if it is not there.
      mode: "predict" decodes, "score" says how likely the targets are that the task has.
      decoder: what writes.
      objective: whose likelihood is scored.
      num_draws: for scores that are estimates; an even number.
      num_examples: only the first so many; None takes all.
      trace: write the canvas before the first step and after each, too.
      random_seed: of the decoder or the draws.
      restore_rules: assignment rules, as in training.
      use_ema: take the parameters' moving average where the checkpoint has one.
      mesh: how the devices are arranged.
      dry_run: check everything, print what would be done, and do nothing.

    Raises:
      UserError: anything that does not fit, or the output was begun with other settings; nothing is overwritten.
    """
    device_mesh = mesh.make()
    path = str(checkpoints.find_checkpoint(checkpoint_path))
    if not dry_run:
        checkpoints.ensure_writable(infer_output_dir)
    check_datasets([dataset], model, device_mesh)
    how = _how(mode, decoder, objective, num_draws, dataset.canvas, trace)
    ending = "-score" if mode == "score" else ""
    output = pathlib.Path(infer_output_dir, f"{dataset.name}-{dataset.split}{ending}.jsonl")
    settings = {
        "checkpoint": path,
        **how,
        "random_seed": random_seed,
        "use_ema": use_ema,
        "task": dataset.name,
        "split": dataset.split,
        "task_feature_lengths": dict(dataset.task_feature_lengths),
    }
    done = _done(output, settings)
    if dry_run:
        print(f"Would {mode} {dataset.name} ({dataset.split}) with {how} from {path} to {output}; {done} done.")
        return

    definition, params = load_model(
        path, model, dataset.token_ids(), device_mesh, restore_rules=restore_rules, use_ema=use_ema
    )
    if jax.process_index() == 0:
        _begin(output, settings)
    total = dataset.num_eval_examples(num_examples)
    logger.info("%s: %d of %d examples are there", output, done, total)
    batches = (
        (batch, examples)
        for batch, examples in dataset.eval_batches(num_examples)
        if examples[-1]["example_id"] >= done
    )
    if mode == "score":
        step = make_likelihood_step(device_mesh, definition, objective, num_draws=num_draws, seed=random_seed)
        records = likelihoods(step, params, batches, device_mesh, dataset.to_text)
    else:
        step = make_decode_step(device_mesh, definition, decoder, seed=random_seed, trace=trace)
        records = predict(step, params, batches, device_mesh, dataset.to_text, dataset.show_canvas)
    with output.open("a", encoding="utf-8") as file, Progress(total, done, f"infer {dataset.name}", "example") as bar:
        for record in records:
            if record["example_id"] < done or jax.process_index():
                continue
            file.write(json.dumps(record, ensure_ascii=False) + "\n")
            file.flush()
            bar.update(record["example_id"] + 1)
    logger.info("wrote %s", output)


def _how(
    mode: str, decoder: Decoder | None, objective: Objective | None, num_draws: int, canvas: bool, trace: bool
) -> dict[str, str | int]:
    """The settings that belong to the mode; raises a UserError where one is missing."""
    if mode not in ("predict", "score"):
        raise UserError(f"infer.mode must be predict or score, not {mode!r}.")
    if mode == "predict":
        if decoder is None:
            raise UserError("To predict, set infer.decoder: include a file of decoding/.")
        return {"decoder": repr(decoder), "trace": trace}
    if objective is None:
        raise UserError("To score, set infer.objective: include the file of objectives/ that the model was trained by.")
    check_num_draws(num_draws)
    return {"mode": mode, "objective": repr(objective), "num_draws": num_draws, "canvas": canvas}


def _done(output: pathlib.Path, settings: dict) -> int:
    """How many examples an earlier run with the same settings has written."""
    if not output.exists():
        return 0
    note = _note(output)
    before = json.loads(note.read_text(encoding="utf-8")) if note.exists() else {}
    if changed := [name for name in settings if before.get(name) != settings[name]]:
        raise UserError(
            f"{output} was begun with other settings ({', '.join(changed)}; see {note}). "
            "Choose another INFER_OUTPUT_DIR, or remove that file."
        )
    return output.read_bytes().count(b"\n")


def _begin(output: pathlib.Path, settings: dict) -> None:
    """Writes down the settings, and removes a line that was cut short."""
    _note(output).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    if output.exists():
        with output.open("r+b") as file:
            file.truncate(file.read().rfind(b"\n") + 1)


def _note(output: pathlib.Path) -> pathlib.Path:
    return output.with_suffix(".settings.json")


if __name__ == "__main__":
    config.run(infer)
