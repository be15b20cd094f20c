"""Write predictions for a task's examples, or scores of them, as JSON lines; a repeated run continues.

With --checkpoint DIR (a MODEL_DIR, a checkpoint or a folder that convert wrote) model, vocabulary, decoder, objective,
task and lengths come from the checkpoint; gin files and --gin.NAME=VALUE change them. The lines go to infer/ in the
MODEL_DIR. With --messages FILE, JSON lines or Parquet, the model answers conversations. With --templates FILE.jsonl it
fills the holes of texts: lines such as {"template": "x =<hole:4> + 1"}, with "inputs" for a task that has some. With
--trace a page beside the predictions shows every step.
"""

import dataclasses
import itertools
import logging
import pathlib
import sys
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import jax
from jax.sharding import Mesh

from diffusion_t5x.checkpointing import checkpoints
from diffusion_t5x.checkpointing.checkpoints import OpenCheckpoint
from diffusion_t5x.command_line import config
from diffusion_t5x.command_line.recorded import checkpoint_texts
from diffusion_t5x.command_line.runnable import verb
from diffusion_t5x.command_line.slice_flags import slice_dry_run
from diffusion_t5x.command_line.verbs import own_flags
from diffusion_t5x.console import Console
from diffusion_t5x.data import stop_strings
from diffusion_t5x.data.seqio_source import SeqioDataset
from diffusion_t5x.data.templates import Templates
from diffusion_t5x.decoding.decoder import Decoder, check_fills
from diffusion_t5x.decoding.language import Language
from diffusion_t5x.decoding.structured import checked, language_of
from diffusion_t5x.errors import UserError, check_choices
from diffusion_t5x.evaluation import traces
from diffusion_t5x.evaluation.in_slots import SlotDecoding
from diffusion_t5x.evaluation.inference import make_decode_step, predict
from diffusion_t5x.evaluation.likelihood import likelihoods, make_likelihood_step
from diffusion_t5x.evaluation.loading import CheckpointSettings, check_datasets
from diffusion_t5x.evaluation.record_file import RecordFile
from diffusion_t5x.objectives.likelihood import check_num_draws
from diffusion_t5x.objectives.objective import Objective
from diffusion_t5x.performance.dry_run import SliceDryRun
from diffusion_t5x.reporting.trace_page import write_trace_page
from diffusion_t5x.tasks.chat_questions import ChatQuestions

logger = logging.getLogger(__name__)

_SHOWN_TRACES = 3
_Data = SeqioDataset | ChatQuestions | Templates


@dataclasses.dataclass(frozen=True, kw_only=True)
class Inference(CheckpointSettings):
    """Decodes or scores a task and writes `<task>-<split>.jsonl`, one line per example, in the task's order.

    A line has "example_id", "inputs_pretokenized", "targets_pretokenized" and the fields of
    `evaluation.inference.predict`. With templates the file is `infill-<file>.jsonl`; its lines have "template" and
    "holes" (the texts written) instead of the targets, and "prediction" is the whole text. With `mode` "score" the file
    is `<task>-<split>-score.jsonl`; its lines have "log_likelihood" (of the targets, in nats), "standard_error",
    "num_tokens" and "num_bytes" instead of decoded text. A repeated call with the same settings does only what is
    missing.

    See `CheckpointSettings` for what the verbs share.

    Attributes:
      checkpoint_path: a checkpoint folder, a folder of them or a MODEL_DIR; None for a TPU slice, which needs none.
      dataset: the task, with split, lengths and batch size; or conversations to answer.
      infer_output_dir: made if needed; None is infer/checkpoint_<step>/ in the checkpoint's MODEL_DIR.
      mode: "predict" decodes, "score" computes log-likelihoods of the task's targets.
      decoder: writes the texts.
      objective: computes the log-likelihoods.
      num_draws: number of draws for estimated scores; an even number.
      templates: a file of texts with holes to fill, in place of the task's examples (see `data.templates`).
      num_examples: number of examples, from the start; None takes all.
      regex, json_schema: what a prediction may be, or with templates what stands in each hole: see
        `decoding.structured.language_of`.
      trace: keep every decoding step: in the lines, on a page beside them (`<task>-<split>.trace.html`) and, for the
        first examples, in the terminal.
      stop: strings before which a prediction ends.
      random_seed: seed of the decoder or the draws.
      dry_run: check everything, print what would be done, and do nothing. For a TPU slice: compile the decoding of a
        batch for it and print its cost.
    """

    ALLOW_MISMATCH = "infer.infer.allow_mismatch"

    dataset: SeqioDataset | ChatQuestions
    infer_output_dir: str | None = None
    mode: Literal["predict", "score"] = "predict"
    decoder: Decoder | None = None
    objective: Objective | None = None
    num_draws: int = 128
    templates: str | None = None
    num_examples: int | None = None
    regex: str | None = None
    json_schema: str | None = None
    trace: bool = False
    stop: Sequence[str] = ()
    random_seed: int = 0
    dry_run: bool | SliceDryRun = False

    def run(self) -> None:
        """Writes the lines that are missing; a dry run says how many are there.

        Raises:
          UserError: a mismatch of any kind; or the output was started with other settings or data. Nothing is
            overwritten.
        """
        if isinstance(self.dry_run, SliceDryRun):
            if self.mode != "predict" or self.templates or self.decoder is None or self.regex or self.json_schema:
                raise UserError(
                    "--topology is for decoding a task: set infer.decoder; leave out mode, templates and REGEX or "
                    "JSON_SCHEMA."
                )
            self.dry_run.infer(mesh=self.mesh, model=self.model, decoder=self.decoder, dataset=self.dataset)
            return
        if self.checkpoint_path is None:
            raise UserError("No checkpoint: set CHECKPOINT_PATH. None is for a dry run on a --topology.")
        mesh = self.mesh.make()
        checkpoint = checkpoints.open_checkpoint(self.checkpoint_path)
        folder = self.infer_output_dir or str(checkpoint.model_dir / "infer" / checkpoint.path.name)
        checkpoints.ensure_writable(folder, bool(self.dry_run))
        data = self._data()
        how = self._how(data)
        check_datasets([data], self.model, mesh)
        self.check_use(checkpoint, self.objective if self.mode == "score" else self.decoder)
        if (language := self._language(data)) is not None:
            how["language"] = repr(language)
        name = f"infill-{data.name}" if isinstance(data, Templates) else f"{data.name}-{data.split}"
        name += "-score" if self.mode == "score" else ""
        output = RecordFile(pathlib.Path(folder, f"{name}.jsonl"), self._describe(checkpoint, how))
        if self.templates is None and output.done:  # templates have a fingerprint among the settings
            output.check_examples(self.dataset.eval_examples(output.done))
        if self.dry_run:
            print(f"Would {self.mode} {name} with {how} from {checkpoint} to {output.path}; {output.done} done.")
            return
        self._write(checkpoint, mesh, data, language, output)
        if self.trace and jax.process_index() == 0:
            page = output.path.with_suffix(".trace.html")
            write_trace_page(page, output.read(), data.num_eval_examples(self.num_examples), name, repr(self.decoder))
            traces.show(itertools.islice(output.read(), _SHOWN_TRACES), Console())
            logger.info("wrote %s", page)

    def _data(self) -> _Data:
        """Returns what is decoded or scored."""
        if self.templates is None:
            return self.dataset
        if isinstance(self.dataset, ChatQuestions):
            raise UserError("--messages and --templates exclude each other: give one of them.")
        return Templates.read(self.templates, self.dataset)

    def _describe(self, checkpoint: OpenCheckpoint, how: Mapping[str, Any]) -> dict[str, Any]:
        """Returns the settings that the lines depend on."""
        return {
            "checkpoint": str(checkpoint),
            **how,
            "random_seed": self.random_seed,
            "use_ema": self.use_ema,
            "task": self.dataset.name,
            "split": self.dataset.split,
            "task_feature_lengths": dict(self.dataset.task_feature_lengths),
        }

    def _language(self, data: _Data) -> Language | None:
        """Compiles what a prediction may be, and checks that the decoder can keep to it."""
        begins = not isinstance(data, Templates)
        language = language_of(
            self.regex, self.json_schema, data.vocabulary(), begins=begins, end_ids=data.token_ids().end_ids
        )
        if language is not None and self.decoder is not None:
            self.decoder.within(language)
        return language

    def _write(
        self, checkpoint: OpenCheckpoint, mesh: Mesh, data: _Data, language: Language | None, output: RecordFile
    ) -> None:
        """Decodes or scores the examples that are missing."""
        definition, params = self.load(checkpoint, data.token_ids(), mesh)
        total = data.num_eval_examples(self.num_examples)
        logger.info("%s: %d of %d examples are done", output.path, output.done, total)
        batches = (
            (batch, examples)
            for batch, examples in data.eval_batches(self.num_examples)
            if examples[-1]["example_id"] >= output.done
        )
        seed = self.random_seed
        if self.mode == "score":
            assert self.objective is not None  # see `_how`
            step = make_likelihood_step(mesh, definition, self.objective, num_draws=self.num_draws, seed=seed)
            records = likelihoods(step, params, batches, mesh, data.to_text)
        else:
            assert self.decoder is not None  # see `_how`
            decoder = self.decoder if language is None else self.decoder.within(language)
            decode = make_decode_step(mesh, definition, decoder, seed=seed, trace=self.trace)
            text_mask = data.text_mask if isinstance(data, Templates) else None

            def to_text(tokens: Sequence[int]) -> str:
                return stop_strings.trim(data.to_text(tokens), self.stop).text

            def is_enough(example: Mapping[str, Any], tokens: Sequence[int]) -> bool:
                return stop_strings.stopped(data.to_text(tokens), self.stop)

            slots = None if self.trace else SlotDecoding(mesh, definition, decoder, seed)
            stops = is_enough if self.stop else None
            fitting = checked(language, batches, in_holes=isinstance(data, Templates))
            to_texts = to_text, data.cells
            records = predict(decode, params, fitting, mesh, *to_texts, None, 1, text_mask, slots, stops)
        output.write(records, total, f"infer {self.dataset.name}")
        logger.info("wrote %s", output.path)

    def _how(self, data: _Data) -> dict[str, Any]:
        """Returns the settings of the mode; raises a UserError if they do not go together."""
        check_choices(self)
        stops = stop_strings.check(self.stop, "STOP")
        if stops and (self.mode == "score" or isinstance(data, Templates)):
            raise UserError("STOP ends predictions: leave it out with scores and --templates.")
        if stops and (self.regex or self.json_schema):
            raise UserError("STOP would cut the text that REGEX or JSON_SCHEMA asks for: leave it out.")
        if self.mode == "score":
            if self.objective is None:
                raise UserError(
                    "To score, set infer.objective: include the file of objectives/ that the model was trained by."
                )
            if isinstance(data, Templates) or self.trace or self.regex or self.json_schema:
                raise UserError(
                    "Scores are of whole texts as they are: leave out --templates, --trace, REGEX and JSON_SCHEMA."
                )
            if isinstance(data, ChatQuestions):
                raise UserError("Conversations are scored as a task: see tasks/local_chat.gin. Leave out --messages.")
            check_num_draws(self.num_draws)
            scored = {"mode": self.mode, "objective": repr(self.objective), "num_draws": self.num_draws}
            return scored | {"canvas": data.canvas}
        if self.decoder is None:
            raise UserError("To predict, set infer.decoder: include a file of decoding/.")
        if not isinstance(data, Templates):
            return {"decoder": repr(self.decoder), "trace": self.trace, **({"stop": list(stops)} if stops else {})}
        check_fills(self.decoder, data.have_unknown_lengths)
        return {"decoder": repr(self.decoder), "trace": self.trace, "templates": data.fingerprint}


infer = verb("infer", Inference)


def main(argv: Sequence[str] | None = None) -> None:
    """Reads the flags and runs `infer`."""
    with config.program():
        dry_run, rest = slice_dry_run(sys.argv[1:] if argv is None else argv)
        flags, rest = own_flags("infer").parse_known_args(rest)
        checkpoint = flags.checkpoint and checkpoints.open_checkpoint(flags.checkpoint)
        run = "runs/infer_chat.gin" if flags.messages else "runs/infer.gin"
        rest, texts = checkpoint_texts(checkpoint, rest, run)
    if flags.messages:
        rest.append(f"--gin.MESSAGES={flags.messages!r}")
    if flags.templates:
        rest.append(f"--gin.infer.infer.templates={flags.templates!r}")
    if flags.trace:
        rest.append("--gin.infer.infer.trace=True")
    config.run(infer, rest, dry_run=dry_run, texts=texts)


if __name__ == "__main__":
    main()
