"""Evaluate checkpoints: decode examples of tasks and score them, measure losses and likelihoods.

With --checkpoint DIR (a MODEL_DIR, a checkpoint or what convert wrote) model, vocabulary, decoder, objective, task and
lengths come from the checkpoint; gin files and --gin.NAME=VALUE change them. Results go to eval/ in the MODEL_DIR.
With --predictions FILE.jsonl --task NAME it scores predictions made elsewhere, without a model; --gin_file registers
the task. A line is {"prediction": TEXT} or {"predictions": [TEXT, ...]}, in the split's order or with an "example_id".
"""

import dataclasses
import json
import logging
import os
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
from jax.sharding import Mesh

from diffusion_t5x import terminal
from diffusion_t5x.checkpointing import checkpoints
from diffusion_t5x.checkpointing.checkpoints import OpenCheckpoint
from diffusion_t5x.command_line import config
from diffusion_t5x.command_line.recorded import checkpoint_texts
from diffusion_t5x.command_line.runnable import verb
from diffusion_t5x.command_line.verbs import own_flags
from diffusion_t5x.data.seqio_source import SeqioDataset
from diffusion_t5x.decoding.language import Language
from diffusion_t5x.decoding.structured import language_of
from diffusion_t5x.errors import UserError
from diffusion_t5x.evaluation import results
from diffusion_t5x.evaluation.evaluator import DecodeEval, Evaluator, LikelihoodEval, LossEval, prepared
from diffusion_t5x.evaluation.inference import write_jsonl
from diffusion_t5x.evaluation.loading import CheckpointSettings, check_datasets, load_teacher
from diffusion_t5x.evaluation.noise_times import TimesEval
from diffusion_t5x.evaluation.predictions import add_predictions, read_predictions
from diffusion_t5x.models.config import ModelConfig
from diffusion_t5x.models.transformer import Params
from diffusion_t5x.objectives.objective import Objective

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Evaluation(CheckpointSettings):
    """Scores one checkpoint, or all checkpoints of a run.

    `eval_output_dir` gets results.json (metrics, and everything needed to repeat them) and, for each decoded task,
    `<task>_predictions.jsonl`; with `all_checkpoints` a folder `checkpoint_<step>` for each, with the same in it.
    results.json is written last. A repeated call with the same settings evaluates only checkpoints without one.

    See `CheckpointSettings` for what the verbs share.

    Attributes:
      eval_output_dir: created if missing; None is eval/ in the checkpoint's MODEL_DIR (likelihood/, loss/ or times/ if
        nothing is decoded), with a folder for each checkpoint.
      all_checkpoints: evaluate all checkpoints at the path; otherwise the newest.
      decode_evals: what to decode and score.
      regex, json_schema: what a decoded text may be: see `decoding.structured.language_of`.
      objective: computes losses and likelihoods.
      loss_evals: losses to measure.
      likelihood_evals: likelihoods to measure; their metrics are listed beside those of decoding.
      times_evals: searches for the times of least variance; see `Block.times`.
      teacher_checkpoint_path: checkpoint of an autoregressive model that scores decoded texts ("teacher_nll",
        "teacher_agreement"), and that a distillation loss needs.
      teacher_model: the teacher's dimensions; None takes the model's.
      dry_run: check everything, print what would be done, and evaluate nothing.
    """

    ALLOW_MISMATCH = "eval.evaluate.allow_mismatch"

    checkpoint_path: str
    eval_output_dir: str | None = None
    all_checkpoints: bool = False
    decode_evals: Sequence[DecodeEval] = ()
    regex: str | None = None
    json_schema: str | None = None
    objective: Objective | None = None
    loss_evals: Sequence[LossEval] = ()
    likelihood_evals: Sequence[LikelihoodEval] = ()
    times_evals: Sequence[TimesEval] = ()
    teacher_checkpoint_path: str | None = None
    teacher_model: ModelConfig | None = None
    dry_run: bool = False

    def run(self) -> None:
        """Evaluates the checkpoints that have no results yet; a dry run lists them.

        Raises:
          UserError: a mismatch of any kind, before anything is compiled; or the output has results with different
            settings, which are never overwritten.
        """
        mesh = self.mesh.make()
        found = [OpenCheckpoint(path) for path in checkpoints.find_checkpoints(self.checkpoint_path)]
        kinds = {"eval": self.decode_evals, "likelihood": self.likelihood_evals, "loss": self.loss_evals}
        kind = next((kind for kind, evals in kinds.items() if evals), "times")
        output = pathlib.Path(self.eval_output_dir or found[-1].model_dir / kind)
        checkpoints.ensure_writable(str(output), self.dry_run)
        evals = _Evals(
            prepared(self.loss_evals),
            prepared(self.decode_evals),
            prepared(self.likelihood_evals),
            prepared(self.times_evals),
        )
        self._check(evals, mesh)
        language = self._language(evals)
        settings = self._describe(evals, language)
        folders = self._folders(found, output)
        for checkpoint in folders:
            self.check_use(checkpoint, self.objective, *(ev.decoder for ev in evals.decode))
        todo = {at: folder for at, folder in folders.items() if not results.is_done(folder, str(at), settings)}
        logger.info("%s: %d of %d checkpoints are already evaluated", output, len(folders) - len(todo), len(folders))
        if self.dry_run and not todo:
            print(f"Would evaluate nothing: all results are in {output}.")
            return
        self._evaluate(todo, evals, settings, mesh, language)

    def _check(self, evals: "_Evals", mesh: Mesh) -> None:
        """Raises a UserError if there is nothing to evaluate, or data, objective and mesh do not fit together."""
        if not evals.all:
            raise UserError(
                "Nothing to evaluate: set evaluate.decode_evals, loss_evals, likelihood_evals or times_evals."
            )
        if (evals.loss or evals.likelihood or evals.times) and self.objective is None:
            raise UserError(
                "evaluate.loss_evals, likelihood_evals and times_evals need evaluate.objective. Include one of "
                "objectives/."
            )
        check_datasets([ev.dataset for ev in evals.all], self.model, mesh)
        for ev in evals.decode:
            ev.dataset.check_scoring()

    def _language(self, evals: "_Evals") -> Language | None:
        """Compiles what a decoded text may be, and checks that the decoders can keep to it."""
        if self.regex is None and self.json_schema is None:
            return None
        if not evals.decode:
            raise UserError("REGEX and JSON_SCHEMA are for decoded texts: leave them out, or set decode_evals.")
        dataset = evals.decode[0].dataset
        end_ids = dataset.token_ids().end_ids
        language = language_of(self.regex, self.json_schema, dataset.vocabulary(), end_ids=end_ids)
        if language is not None:
            for ev in evals.decode:
                ev.decoder.within(language)
        return language

    def _describe(self, evals: "_Evals", language: Language | None) -> dict[str, Any]:
        """Returns the settings that results depend on."""
        names = ("objective", "model", "restore_rules", "use_ema")
        given = {name: getattr(self, name) for name in names} | ({"form": repr(language)} if language else {})
        return results.describe({"evaluations": evals.all, **given, "teacher": self.teacher_checkpoint_path})

    def _folders(self, found: Sequence[OpenCheckpoint], output: pathlib.Path) -> dict[OpenCheckpoint, pathlib.Path]:
        """Returns the output folder of each chosen checkpoint."""
        has_folder = self.all_checkpoints or self.eval_output_dir is None
        chosen = found if self.all_checkpoints else found[-1:]
        return {checkpoint: output / checkpoint.path.name if has_folder else output for checkpoint in chosen}

    def _evaluate(
        self,
        todo: Mapping[OpenCheckpoint, pathlib.Path],
        evals: "_Evals",
        settings: Mapping[str, Any],
        mesh: Mesh,
        language: Language | None,
    ) -> None:
        vocabulary = evals.all[0].dataset.token_ids()
        teacher = None
        if self.teacher_checkpoint_path and todo:
            judged = (vocabulary, mesh, self.ALLOW_MISMATCH, self.allow_mismatch)
            teacher = load_teacher(self.teacher_checkpoint_path, self.teacher_model or self.model, *judged)
        evaluator = None
        for checkpoint, folder in todo.items():
            definition, params = self.load(checkpoint, vocabulary, mesh)
            if self.dry_run:
                size = f"{definition.num_params():,} parameters"
                print(f"Would evaluate {' '.join(map(str, todo))} ({size}):", *evals.all, sep="\n  ")
                return
            evaluator = evaluator or Evaluator(
                mesh, definition, self.objective, evals.loss, evals.decode, teacher, evals.likelihood, evals.times,
                language,
            )  # fmt: skip
            scores, fingerprints = _evaluate(evaluator, params, folder)
            del params  # before the next checkpoint's are there
            evaluations = [repr(ev) for ev in evals.all]
            report = {
                **results.report(scores, checkpoint, definition, evaluations, settings, fingerprints),
                "teacher": self.teacher_checkpoint_path,
                "config": config.operative_text(),
            }
            if jax.process_index() == 0:
                results.write_results(folder, report)
                logger.info("wrote %s", folder / "results.json")


evaluate = verb("evaluate", Evaluation)


@dataclasses.dataclass(frozen=True)
class _Evals:
    """All evaluations of a call, prepared."""

    loss: Sequence[LossEval]
    decode: Sequence[DecodeEval]
    likelihood: Sequence[LikelihoodEval]
    times: Sequence[TimesEval]

    @property
    def all(self) -> list[LossEval | LikelihoodEval | DecodeEval | TimesEval]:
        return [*self.loss, *self.likelihood, *self.decode, *self.times]


def _evaluate(
    evaluator: Evaluator, params: Params, folder: pathlib.Path
) -> tuple[dict[str, dict[str, float]], dict[str, str]]:
    """Scores and data fingerprints by task; decoded texts are written to `folder`."""
    scores = {name: dict(metrics) for name, metrics in evaluator.losses(params).items()}
    for task, metrics in evaluator.times(params).items():
        scores[task] = scores.get(task, {}) | metrics
    fingerprints = {}
    for task, metrics, records in evaluator.likelihoods(params):
        scores[task] = scores.get(task, {}) | metrics
        fingerprints[task] = results.fingerprint(records)

    def keep(task: str, records: list[dict[str, Any]]) -> None:
        write_jsonl(str(folder / f"{task}_predictions.jsonl"), records)

    for task, metrics, records in evaluator.decode(params, keep):
        scores[task] = scores.get(task, {}) | metrics | {"num_examples": len(records)}
        fingerprints[task] = results.fingerprint(records)
    for name, metrics in scores.items():
        logger.info("%s: %s", name, results.summary(metrics))
    return scores, fingerprints


def score(
    *,
    predictions: str,
    dataset: Callable[..., SeqioDataset],
    task: str | None = None,
    mixture_or_task_name: str | None = None,
    num_examples: int | None = None,
    eval_output_dir: str | None = None,
) -> None:
    """Scores predictions made elsewhere, prints the metrics and optionally writes the same files as `evaluate`.

    Args:
      predictions: a file of JSON lines, see `evaluation.predictions`.
      dataset: makes the data set for a `mixture_or_task_name`.
      task: the task's name.
      mixture_or_task_name: the name as gin files set it, used if `task` is None.
      num_examples: number of examples in the file, from the start of the split; None: all.
      eval_output_dir: created if missing; None writes nothing.

    Raises:
      UserError: unknown task or split, predictions that do not fit, or an output with results of different settings.
    """
    name = task or mixture_or_task_name
    if not name:
        raise UserError("No task for the predictions. Give --task NAME, and the --gin_file that registers it.")
    lines = read_predictions(predictions)
    data = dataset(mixture_or_task_name=name)
    data.check_scoring()
    settings = results.describe({"evaluations": [data], "predictions": predictions, "num_examples": num_examples})
    if eval_output_dir:
        checkpoints.ensure_writable(eval_output_dir)
        results.is_done(pathlib.Path(eval_output_dir), None, settings)
    examples = list(data.eval_examples(num_examples))
    records = add_predictions(examples, lines, predictions, f"split {data.split} of {name}")
    scores = {name: {**data.score(records), "num_examples": len(records)}}
    print(terminal.safe(json.dumps(scores, indent=2, ensure_ascii=False)))
    if eval_output_dir:
        report = {
            "results": scores,
            "predictions": predictions,
            "checkpoint": None,
            "step": None,
            "evaluations": [repr(data)],
            "settings": settings,
            "data": {name: results.fingerprint(records)},
            **results.provenance(scores),
            "config": config.operative_text(),
        }
        write_jsonl(os.path.join(eval_output_dir, f"{name}_predictions.jsonl"), records)
        results.write_results(eval_output_dir, report)
        logger.info("wrote %s", pathlib.Path(eval_output_dir, "results.json"))


def main(argv: Sequence[str] | None = None) -> None:
    """Reads the flags; with `--predictions` runs `score`, else `evaluate`."""
    with config.program():
        flags, rest = own_flags("eval").parse_known_args(argv)
        if flags.checkpoint and flags.predictions:
            raise UserError("--predictions are scored without a model: leave out --checkpoint.")
        checkpoint = flags.checkpoint and checkpoints.open_checkpoint(flags.checkpoint)
        if flags.task and not flags.predictions:
            raise UserError("--task is for --predictions; to evaluate a model, set --gin.MIXTURE_OR_TASK_NAME=...")
    if flags.predictions:
        names = {"PREDICTIONS": flags.predictions, "TASK": flags.task}
        bindings = [f"--gin.{name}={value!r}" for name, value in names.items()]
        config.run(score, ["--gin_file=runs/score.gin", *rest, *bindings])
    else:
        with config.program():
            rest, texts = checkpoint_texts(checkpoint, rest, "runs/eval.gin")
        config.run(evaluate, rest, texts=texts)


if __name__ == "__main__":
    main()
