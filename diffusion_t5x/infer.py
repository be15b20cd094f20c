"""Write predictions for a task's examples as JSON lines, going on where an earlier run stopped.

With --templates FILE.jsonl the model fills the holes of texts: lines such as {"template": "x =<hole:4> + 1"}, with
"inputs" for a task that has some. With --trace a page beside the predictions shows how they came to be, step by step.
"""

import itertools
import logging
import pathlib
from collections.abc import Sequence

import jax
import rich.console

from diffusion_t5x import config
from diffusion_t5x.data.seqio_source import SeqioDataset
from diffusion_t5x.data.templates import Templates
from diffusion_t5x.decoding.decoder import Decoder
from diffusion_t5x.decoding.masked import MaskedDecoder
from diffusion_t5x.decoding.sundae import SundaeDecoder
from diffusion_t5x.errors import UserError
from diffusion_t5x.evaluation import traces
from diffusion_t5x.evaluation.inference import make_decode_step, predict
from diffusion_t5x.evaluation.loading import check_datasets, load_model
from diffusion_t5x.evaluation.record_file import RecordFile
from diffusion_t5x.evaluation.trace_page import write_trace_page
from diffusion_t5x.flags import Parser
from diffusion_t5x.models.config import ModelConfig
from diffusion_t5x.partitioning import MeshConfig
from diffusion_t5x.training import checkpoints
from diffusion_t5x.training.assignment import Rule

logger = logging.getLogger(__name__)

_SHOWN_TRACES = 3


def infer(
    *,
    model: ModelConfig,
    checkpoint_path: str,
    dataset: SeqioDataset,
    decoder: Decoder,
    infer_output_dir: str,
    templates: str | None = None,
    num_examples: int | None = None,
    trace: bool = False,
    random_seed: int = 0,
    restore_rules: Sequence[Rule] = (),
    use_ema: bool = True,
    mesh: MeshConfig = MeshConfig(),  # noqa: B008  (frozen)
    dry_run: bool = False,
) -> None:
    """Decodes a task and writes `<task>-<split>.jsonl`, an example a line, in the task's order.

    A line has "example_id", "inputs_pretokenized", "targets_pretokenized" and what `evaluation.inference.predict` says
    of what was written. Started again with the same settings, it decodes only what is missing.

    With templates it writes `infill-<file>.jsonl`, whose lines have "template" and "holes" (the texts written) in place
    of the targets; "prediction" is the whole text.

    Args:
      model: dimensions of the checkpoint's model.
      checkpoint_path: a checkpoint folder, a folder of them or a MODEL_DIR.
      dataset: task, split, lengths and batch size.
      decoder: what writes.
      infer_output_dir: made if it is not there.
      templates: a file of texts with holes to fill, in place of the task's examples (see `data.templates`).
      num_examples: only the first so many; None takes all.
      trace: keep how the texts came to be, step by step: in the lines, in a page beside them
        (`<task>-<split>.trace.html`), and the first ones in the terminal.
      random_seed: of the decoder.
      restore_rules: assignment rules, as in training.
      use_ema: take the parameters' moving average where the checkpoint has one.
      mesh: how the devices are arranged.
      dry_run: check everything, print what would be done, and decode nothing.

    Raises:
      UserError: anything that does not fit, or the output was begun with other settings; nothing is overwritten.
    """
    device_mesh = mesh.make()
    path = str(checkpoints.find_checkpoint(checkpoint_path))
    if not dry_run:
        checkpoints.ensure_writable(infer_output_dir)
    data = dataset if templates is None else Templates(templates, dataset)
    if templates is not None and not isinstance(decoder, MaskedDecoder | SundaeDecoder):
        raise UserError(
            f"{type(decoder).__name__} writes from left to right and cannot fill holes, whose ends are given: take a "
            "model of masked or SUNDAE diffusion with decoding/masked.gin or decoding/sundae.gin."
        )
    check_datasets([data], model, device_mesh)
    name = f"{dataset.name}-{dataset.split}" if templates is None else f"infill-{data.name}"
    settings = {
        "checkpoint": path,
        "decoder": repr(decoder),
        "random_seed": random_seed,
        "use_ema": use_ema,
        "trace": trace,
        "task": dataset.name,
        "split": dataset.split,
        "task_feature_lengths": dict(dataset.task_feature_lengths),
        "templates": templates and data.fingerprint,
    }
    output = RecordFile(pathlib.Path(infer_output_dir, f"{name}.jsonl"), settings)
    if dry_run:
        print(f"Would decode {name} with {decoder} from {path} to {output.path}; {output.done} done.")
        return

    definition, params = load_model(
        path, model, data.token_ids(), device_mesh, restore_rules=restore_rules, use_ema=use_ema
    )
    step = make_decode_step(device_mesh, definition, decoder, seed=random_seed, trace=trace)
    total = data.num_eval_examples(num_examples)
    logger.info("%s: %d of %d examples are there", output.path, output.done, total)
    batches = (
        (batch, examples)
        for batch, examples in data.eval_batches(num_examples)
        if examples[-1]["example_id"] >= output.done
    )
    text_mask = None if templates is None else data.text_mask
    records = predict(step, params, batches, device_mesh, data.to_text, data.cells, text_mask=text_mask)
    output.write(records, total, f"infer {dataset.name}")
    logger.info("wrote %s", output.path)
    if trace and jax.process_index() == 0:
        page = output.path.with_suffix(".trace.html")
        write_trace_page(page, output.read(), total, name, repr(decoder))
        traces.show(itertools.islice(output.read(), _SHOWN_TRACES), rich.console.Console())
        logger.info("wrote %s", page)


def main(argv: Sequence[str] | None = None) -> None:
    """Reads the flags and runs `infer`."""
    parser = Parser(add_help=False, allow_abbrev=False)
    parser.add_argument("--templates")
    parser.add_argument("--trace", action="store_true")
    with config.program():
        flags, rest = parser.parse_known_args(argv)
    if flags.templates:
        rest.append(f"--gin.infer.infer.templates={flags.templates!r}")
    if flags.trace:
        rest.append("--gin.infer.infer.trace=True")
    config.run(infer, rest)


if __name__ == "__main__":
    main()
