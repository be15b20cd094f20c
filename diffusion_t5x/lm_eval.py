"""Evaluate a checkpoint with EleutherAI's lm-evaluation-harness, on its tasks or your own.

With --checkpoint DIR (a MODEL_DIR, a checkpoint or a folder that convert wrote) model, vocabulary, objective, decoder
and lengths come from the checkpoint; gin files and --gin.NAME=VALUE change them. Results go to lm_eval/ in the
MODEL_DIR. --tasks=NAME,NAME ...; --include_path=DIR adds your own task files; --limit=N takes the first N examples of
each task; --num_fewshot=N puts N examples before each. --apply_chat_template asks in the model's chat template;
--system_instruction=TEXT is its system prompt, and examples are turns unless --no-fewshot_as_multiturn is given.
"""

import dataclasses
import hashlib
import json
import logging
import pathlib
import types
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jax
from jax.sharding import Mesh

from diffusion_t5x import partitioning, terminal
from diffusion_t5x.checkpointing import checkpoints
from diffusion_t5x.checkpointing.checkpoints import OpenCheckpoint
from diffusion_t5x.command_line import config
from diffusion_t5x.command_line.recorded import checkpoint_texts
from diffusion_t5x.command_line.runnable import verb
from diffusion_t5x.command_line.verbs import own_flags
from diffusion_t5x.data.chats import Chat
from diffusion_t5x.data.vocabularies import token_ids
from diffusion_t5x.data.vocabulary import AnyVocabulary
from diffusion_t5x.decoding.decoder import Decoder
from diffusion_t5x.errors import UserError, did_you_mean
from diffusion_t5x.evaluation import results
from diffusion_t5x.evaluation.harness import Harness, Rows
from diffusion_t5x.evaluation.inference import write_jsonl
from diffusion_t5x.evaluation.lm_adapter import adapt
from diffusion_t5x.evaluation.loading import CheckpointSettings
from diffusion_t5x.models.transformer import ModelDefinition
from diffusion_t5x.objectives.likelihood import check_num_draws
from diffusion_t5x.objectives.objective import Objective

if TYPE_CHECKING:
    import lm_eval.tasks

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, kw_only=True)
class HarnessEvaluation(CheckpointSettings):
    """Runs tasks of lm-evaluation-harness on a checkpoint.

    `eval_output_dir` gets results.json, as `eval` writes it, and for each task `<task>_samples.jsonl`, the harness's
    own records of requests and responses. A repeated call with the same settings does nothing.

    See `CheckpointSettings` for what the verbs share.

    Attributes:
      vocabulary: the model's vocabulary.
      rows: layout of requests in rows.
      objective: computes likelihoods.
      decoder: writes the texts.
      eval_output_dir: made if needed; None is lm_eval/checkpoint_<step>/ in the checkpoint's MODEL_DIR.
      tasks: names of the harness's tasks, groups or tags.
      include_path: a folder with your own task files.
      num_fewshot: number of examples before each, unless a task says 0; None leaves it to the task.
      limit: number of examples of each task, from the start.
      apply_chat_template: ask in conversations, in the chat template that comes with the tokenizer.
      fewshot_as_multiturn: examples are turns of the conversation, and not all in one; None: in a conversation.
      system_instruction: the system prompt of each conversation; without the template, the text before each context.
      template_variables: other variables of the template, such as {"enable_thinking": False}.
      num_draws: number of draws for estimated likelihoods; an even number.
      random_seed: seed of draws and decoder.
      dry_run: check everything, print what would be done, and evaluate nothing.
    """

    ALLOW_MISMATCH = "lm_eval.evaluate.allow_mismatch"

    checkpoint_path: str
    vocabulary: AnyVocabulary
    rows: Rows
    objective: Objective
    decoder: Decoder
    eval_output_dir: str | None = None
    tasks: Sequence[str] = ()
    include_path: str | None = None
    num_fewshot: int | None = None
    limit: int | None = None
    apply_chat_template: bool = False
    fewshot_as_multiturn: bool | None = None
    system_instruction: str | None = None
    template_variables: Mapping[str, Any] | None = None
    num_draws: int = 128
    random_seed: int = 0
    dry_run: bool = False

    def run(self) -> None:
        """Evaluates; a dry run says what it would evaluate.

        Raises:
          UserError: a mismatch of any kind, before anything is compiled; or the output has results of other settings,
            which are never overwritten.
        """
        lm_eval = _library()
        manager = _task_manager(lm_eval, self.tasks, self.include_path)
        mesh = self.mesh.make()
        checkpoint = checkpoints.open_checkpoint(self.checkpoint_path)
        folder = pathlib.Path(self.eval_output_dir or checkpoint.model_dir / "lm_eval" / checkpoint.path.name)
        self._check(mesh)
        checkpoints.ensure_writable(str(folder), self.dry_run)
        settings = self._describe()
        self.check_use(checkpoint, self.objective, self.decoder)
        if results.is_done(folder, str(checkpoint), settings):
            logger.info("%s has these results already", folder)
            return
        chat = self._chat()
        ids = dataclasses.replace(token_ids(self.vocabulary), end_ids=chat.end_ids if chat else ())
        definition, params = self.load(checkpoint, ids, mesh)
        if self.dry_run:
            tasks = ", ".join(self.tasks)
            count = f"{definition.num_params():,} parameters"
            print(terminal.safe(f"Would evaluate {checkpoint} ({count}) on {tasks}."))
            return
        rows, draws = self.rows, self.num_draws
        harness = Harness(mesh, definition, params, self.objective, self.decoder, rows, draws, self.random_seed)
        found = lm_eval.simple_evaluate(
            adapt(harness, self.vocabulary, rows, chat),
            tasks=list(self.tasks),
            num_fewshot=self.num_fewshot,
            limit=self.limit,
            task_manager=manager,
            system_instruction=self.system_instruction,
            apply_chat_template=self.apply_chat_template,
            fewshot_as_multiturn=self._has_turns,
            torch_random_seed=None,  # there need be no torch
        )
        self._write(folder, checkpoint, definition, settings, json.loads(json.dumps(found, default=str)))

    @property
    def _has_turns(self) -> bool:
        """True if examples are turns of a conversation."""
        return self.apply_chat_template if self.fewshot_as_multiturn is None else self.fewshot_as_multiturn

    def _chat(self) -> Chat | None:
        """Returns the chat format; raises a UserError if there is none, or the model's inputs end otherwise."""
        if not self.apply_chat_template:
            if self._has_turns:
                raise UserError("--fewshot_as_multiturn makes turns of a chat: give --apply_chat_template, too.")
            return None
        if self.rows.context_eos:
            raise UserError(
                "--apply_chat_template is for models that have learned conversations, but this one's inputs end in "
                "EOS. If it has learned them all the same, give --gin.CONTEXT_EOS=False."
            )
        if chat := Chat.of(self.vocabulary, self.template_variables):
            return chat
        raise UserError(
            "--apply_chat_template finds no chat template: there is neither chat_template.jinja nor a chat_template in "
            "tokenizer_config.json beside a tokenizer.json."
        )

    def _check(self, mesh: Mesh) -> None:
        """Raises a UserError if rows, model, mesh and draws do not fit together."""
        check_num_draws(self.num_draws)
        rows, architecture = self.rows, self.model.architecture
        if rows.architecture != architecture:
            raise UserError(f"Rows.architecture is {rows.architecture}, but ModelConfig.architecture {architecture}.")
        self.model.check_length(rows.row_length)
        partitioning.check_batch(mesh, rows.batch_size, rows.row_length)

    def _describe(self) -> dict[str, Any]:
        """Returns the settings that results depend on."""
        task_files = self.include_path and _fingerprint(pathlib.Path(self.include_path).expanduser())
        names = [
            "num_fewshot",
            "limit",
            "rows",
            "objective",
            "num_draws",
            "decoder",
            "random_seed",
            "model",
            "restore_rules",
            "use_ema",
        ]
        if self.apply_chat_template or self.system_instruction is not None:
            names += ["apply_chat_template", "system_instruction", "template_variables"]
        given = {name: getattr(self, name) for name in names}
        if self.apply_chat_template:
            given["fewshot_as_multiturn"] = self._has_turns
        return results.describe({"tasks": self.tasks, "task_files": task_files, **given})

    def _write(
        self,
        folder: pathlib.Path,
        checkpoint: OpenCheckpoint,
        definition: ModelDefinition,
        settings: Mapping[str, Any],
        found: dict[str, Any],
    ) -> None:
        """Writes the harness's results: its samples, then results.json."""
        samples = found.pop("samples")
        scores = {task: _plain_metrics(metrics) for task, metrics in found["results"].items()}
        data = {task: results.fingerprint(map(_asked, records)) for task, records in samples.items()}
        evaluations = [f"lm_eval(task={task!r}, rows={self.rows!r})" for task in self.tasks]
        report = {
            **results.report(scores, checkpoint, definition, evaluations, settings, data),
            "lm_eval": found,
            "config": config.operative_text(),
        }
        for task, records in samples.items():
            write_jsonl(str(folder / f"{task}_samples.jsonl"), records)
        for task, metrics in scores.items():
            logger.info("%s: %s", task, results.summary(metrics))
        if jax.process_index() == 0:
            results.write_results(folder, report)
            logger.info("wrote %s", folder / "results.json")


evaluate = verb("evaluate", HarnessEvaluation)


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
    """Returns the harness's task manager; raises a UserError if it does not know a task."""
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
    """Returns the SHA-256 of the task files in a folder."""
    files = sorted(path for path in folder.rglob("*") if path.suffix in (".yaml", ".yml", ".py"))
    contents = (f"{path.relative_to(folder)} {hashlib.sha256(path.read_bytes()).hexdigest()}" for path in files)
    return hashlib.sha256("\n".join(contents).encode()).hexdigest()


def _plain_metrics(metrics: Mapping[str, Any]) -> dict[str, float]:
    """Returns numbers by name: "acc" for the harness's "acc,none", where "none" is the filter of the answers."""
    return {name.removesuffix(",none"): value for name, value in metrics.items() if isinstance(value, int | float)}


def _asked(record: Mapping[str, Any]) -> dict[str, Any]:
    return {"inputs_pretokenized": record["arguments"], "targets_pretokenized": record["target"]}


def main(argv: Sequence[str] | None = None) -> None:
    """Reads the flags and runs `evaluate`."""
    with config.program():
        flags, rest = own_flags("lm_eval").parse_known_args(argv)
        checkpoint = flags.checkpoint and checkpoints.open_checkpoint(flags.checkpoint)
        rest, texts = checkpoint_texts(checkpoint, rest, "runs/lm_eval.gin")
    given = {name: value for name, value in vars(flags).items() if value is not None and name != "checkpoint"}
    bindings = [f"--gin.lm_eval.evaluate.{name}={value!r}" for name, value in given.items()]
    config.run(evaluate, [*rest, *bindings], texts=texts)


if __name__ == "__main__":
    main()
