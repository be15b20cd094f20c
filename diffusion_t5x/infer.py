"""Write predictions for a task's examples, or scores of them, as JSON lines; a repeated run continues.

With --checkpoint DIR (a MODEL_DIR, a checkpoint or a folder that convert wrote) model, vocabulary, decoder, objective,
task and lengths come from the checkpoint; gin files and --gin.NAME=VALUE change them. The lines go to infer/ in the
MODEL_DIR. With --templates FILE.jsonl the model fills the holes of texts: lines such as {"template": "x =<hole:4> +
1"}, with "inputs" for a task that has some. With --trace a page beside the predictions shows every step.
"""

import itertools
import logging
import pathlib
import sys
from collections.abc import Sequence
from typing import Literal

import jax

from diffusion_t5x.checkpointing import checkpoints
from diffusion_t5x.checkpointing.assignment import Rule
from diffusion_t5x.command_line import config
from diffusion_t5x.command_line.recorded import checkpoint_texts
from diffusion_t5x.command_line.slice_flags import slice_dry_run
from diffusion_t5x.command_line.verbs import own_flags
from diffusion_t5x.console import Console
from diffusion_t5x.data.seqio_source import SeqioDataset
from diffusion_t5x.data.templates import Templates
from diffusion_t5x.decoding.decoder import Decoder
from diffusion_t5x.errors import UserError
from diffusion_t5x.evaluation import traces
from diffusion_t5x.evaluation.inference import make_decode_step, predict
from diffusion_t5x.evaluation.likelihood import likelihoods, make_likelihood_step
from diffusion_t5x.evaluation.loading import check_datasets, load_model
from diffusion_t5x.evaluation.record_file import RecordFile
from diffusion_t5x.models.config import ModelConfig
from diffusion_t5x.objectives.likelihood import check_num_draws
from diffusion_t5x.objectives.objective import Objective
from diffusion_t5x.partitioning import MeshConfig
from diffusion_t5x.performance.dry_run import SliceDryRun
from diffusion_t5x.reporting.trace_page import write_trace_page
from diffusion_t5x.training.agreement import Agreement

logger = logging.getLogger(__name__)

_SHOWN_TRACES = 3


def infer(
    *,
    model: ModelConfig,
    checkpoint_path: str | None,
    dataset: SeqioDataset,
    infer_output_dir: str | None = None,
    mode: Literal["predict", "score"] = "predict",
    decoder: Decoder | None = None,
    objective: Objective | None = None,
    num_draws: int = 128,
    templates: str | None = None,
    num_examples: int | None = None,
    trace: bool = False,
    random_seed: int = 0,
    restore_rules: Sequence[Rule] = (),
    use_ema: bool = True,
    allow_mismatch: bool = False,
    mesh: MeshConfig = MeshConfig(),  # noqa: B008  (frozen)
    dry_run: bool | SliceDryRun = False,
) -> None:
    """Decodes or scores a task and writes `<task>-<split>.jsonl`, one line per example, in the task's order.

    A line has "example_id", "inputs_pretokenized", "targets_pretokenized" and the fields of
    `evaluation.inference.predict`. With templates the file is `infill-<file>.jsonl`; its lines have "template" and
    "holes" (the texts written) instead of the targets, and "prediction" is the whole text. With `mode` "score" the file
    is `<task>-<split>-score.jsonl`; its lines have "log_likelihood" (of the targets, in nats), "standard_error",
    "num_tokens" and "num_bytes" instead of decoded text. A repeated call with the same settings does only what is
    missing.

    Args:
      model: dimensions of the checkpoint's model.
      checkpoint_path: a checkpoint folder, a folder of them or a MODEL_DIR; None for a TPU slice, which needs none.
      dataset: the task, with split, lengths and batch size.
      infer_output_dir: made if needed; None is infer/checkpoint_<step>/ in the checkpoint's MODEL_DIR.
      mode: "predict" decodes, "score" computes log-likelihoods of the task's targets.
      decoder: writes the texts.
      objective: computes the log-likelihoods.
      num_draws: number of draws for estimated scores; an even number.
      templates: a file of texts with holes to fill, in place of the task's examples (see `data.templates`).
      num_examples: number of examples, from the start; None takes all.
      trace: keep every decoding step: in the lines, on a page beside them (`<task>-<split>.trace.html`) and, for the
        first examples, in the terminal.
      random_seed: seed of the decoder or the draws.
      restore_rules: assignment rules, as in training.
      use_ema: use the moving average of the parameters if the checkpoint has one.
      allow_mismatch: use the model other than as it was trained, according to the checkpoint's record: as another
        function, or with another decoder or objective.
      mesh: the arrangement of devices.
      dry_run: check everything, print what would be done, and do nothing. For a TPU slice: compile the decoding of a
        batch for it and print its cost.

    Raises:
      UserError: a mismatch of any kind; or the output was started with other settings or data. Nothing is overwritten.
    """
    if isinstance(dry_run, SliceDryRun):
        if mode != "predict" or templates or decoder is None:
            raise UserError("--topology is for decoding a task: set infer.decoder; leave out mode and templates.")
        dry_run.infer(mesh=mesh, model=model, decoder=decoder, dataset=dataset)
        return
    if checkpoint_path is None:
        raise UserError("No checkpoint: set CHECKPOINT_PATH. None is for a dry run on a --topology.")
    device_mesh = mesh.make()
    checkpoint = checkpoints.open_checkpoint(checkpoint_path)
    path = str(checkpoint)
    infer_output_dir = infer_output_dir or str(checkpoint.model_dir / "infer" / checkpoint.path.name)
    checkpoints.ensure_writable(infer_output_dir, bool(dry_run))
    data = dataset if templates is None else Templates.read(templates, dataset)
    how = _how(mode, decoder, objective, num_draws, data, trace)
    check_datasets([data], model, device_mesh)
    agreement = Agreement.of(checkpoint, "infer.infer.allow_mismatch", allow_mismatch)
    agreement.check(model, [objective if mode == "score" else decoder])
    name = f"{dataset.name}-{dataset.split}" if templates is None else f"infill-{data.name}"
    name += "-score" if mode == "score" else ""
    settings = {
        "checkpoint": path,
        **how,
        "random_seed": random_seed,
        "use_ema": use_ema,
        "task": dataset.name,
        "split": dataset.split,
        "task_feature_lengths": dict(dataset.task_feature_lengths),
    }
    output = RecordFile(pathlib.Path(infer_output_dir, f"{name}.jsonl"), settings)
    if templates is None and output.done:  # templates have a fingerprint among the settings
        output.check_examples(dataset.eval_examples(output.done))
    if dry_run:
        print(f"Would {mode} {name} with {how} from {path} to {output.path}; {output.done} done.")
        return

    definition, params = load_model(
        checkpoint, model, data.token_ids(), device_mesh, restore_rules=restore_rules, use_ema=use_ema
    )
    total = data.num_eval_examples(num_examples)
    logger.info("%s: %d of %d examples are done", output.path, output.done, total)
    batches = (
        (batch, examples)
        for batch, examples in data.eval_batches(num_examples)
        if examples[-1]["example_id"] >= output.done
    )
    if mode == "score":
        assert objective is not None  # see `_how`
        step = make_likelihood_step(device_mesh, definition, objective, num_draws=num_draws, seed=random_seed)
        records = likelihoods(step, params, batches, device_mesh, data.to_text)
    else:
        assert decoder is not None  # see `_how`
        step = make_decode_step(device_mesh, definition, decoder, seed=random_seed, trace=trace)
        text_mask = data.text_mask if isinstance(data, Templates) else None
        records = predict(step, params, batches, device_mesh, data.to_text, data.cells, text_mask=text_mask)
    output.write(records, total, f"infer {dataset.name}")
    logger.info("wrote %s", output.path)
    if trace and jax.process_index() == 0:
        page = output.path.with_suffix(".trace.html")
        write_trace_page(page, output.read(), total, name, repr(decoder))
        traces.show(itertools.islice(output.read(), _SHOWN_TRACES), Console())
        logger.info("wrote %s", page)


def _how(
    mode: str,
    decoder: Decoder | None,
    objective: Objective | None,
    num_draws: int,
    data: SeqioDataset | Templates,
    trace: bool,
) -> dict[str, str | int]:
    """Returns the settings that belong to the mode; raises a UserError if they do not fit together."""
    if mode not in ("predict", "score"):
        raise UserError(f"infer.mode must be predict or score, not {mode!r}.")
    if mode == "score":
        if objective is None:
            raise UserError(
                "To score, set infer.objective: include the file of objectives/ that the model was trained by."
            )
        if isinstance(data, Templates) or trace:
            raise UserError("Scores are of whole texts as they are: leave out --templates and --trace.")
        check_num_draws(num_draws)
        return {"mode": mode, "objective": repr(objective), "num_draws": num_draws, "canvas": data.canvas}
    if decoder is None:
        raise UserError("To predict, set infer.decoder: include a file of decoding/.")
    if not isinstance(data, Templates):
        return {"decoder": repr(decoder), "trace": trace}
    if not decoder.fills_holes:
        raise UserError(
            f"{type(decoder).__name__} writes from left to right and cannot fill holes, whose ends are given: take a "
            "model of masked or SUNDAE diffusion with decoding/masked.gin or decoding/sundae.gin."
        )
    return {"decoder": repr(decoder), "trace": trace, "templates": data.fingerprint}


def main(argv: Sequence[str] | None = None) -> None:
    """Reads the flags and runs `infer`."""
    with config.program():
        dry_run, rest = slice_dry_run(sys.argv[1:] if argv is None else argv)
        flags, rest = own_flags("infer").parse_known_args(rest)
        checkpoint = flags.checkpoint and checkpoints.open_checkpoint(flags.checkpoint)
        rest, texts = checkpoint_texts(checkpoint, rest, ["runs/infer.gin"], {"INFER_OUTPUT_DIR": None})
    if flags.templates:
        rest.append(f"--gin.infer.infer.templates={flags.templates!r}")
    if flags.trace:
        rest.append("--gin.infer.infer.trace=True")
    config.run(infer, rest, dry_run=dry_run, texts=texts)


if __name__ == "__main__":
    main()
