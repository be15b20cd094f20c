"""The verbs: purpose, flags, an example, and the gin files they run with.

The modules of the verbs read their own flags with the parsers made here, so that help shows the same ones.
"""

import argparse
import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from diffusion_t5x.command_line import parsers
from diffusion_t5x.command_line.flags import Parser

Container = TypeVar("Container", bound=argparse._ActionsContainer)
Flags = Mapping[str, Mapping[str, Any]]
"""Arguments of `ArgumentParser.add_argument`, by the flag's name."""

SLICE_FLAGS: Flags = {
    "--topology": {"metavar": "CHIP:SHAPE", "help": "with --dry_run: compile for this TPU slice, such as v5p:4x4x8"},
    "--dry_run_output": {"metavar": "FILE", "help": "with --topology: also write the report as JSON"},
    "--fit": {"action": "store_true", "help": "with --topology: find the largest batch that fits"},
}
CHECKPOINT: Flags = {"--checkpoint": {"metavar": "DIR", "help": "a MODEL_DIR, a checkpoint, or what convert wrote"}}


@dataclasses.dataclass(frozen=True)
class Verb:
    """One verb of the command, or one subcommand of a verb.

    Attributes:
      summary: one line for the list of verbs.
      example: a command that works as it stands, or with the folders that earlier examples wrote.
      module: the module that runs it.
      runs: its gin run files; their macros are its settings.
      flags: its own flags, besides gin's.
      takes_gin: True if it reads gin files.
      takes_dry_run, takes_mesh: True if it has `--dry_run`, and if several processes can run it together.
      add_arguments: adds the arguments of a verb without gin to a parser.
    """

    summary: str
    example: str
    module: str
    runs: tuple[str, ...] = ()
    flags: Flags = dataclasses.field(default_factory=dict)
    takes_gin: bool = True
    takes_dry_run: bool = True
    takes_mesh: bool = True
    add_arguments: Callable[[Parser], None] | None = None


_QUICKSTART_DECODED = (
    "--gin_file=models/decoder_only.gin --gin_file=sizes/tiny.gin --gin_file=decoding/sundae.gin "
    "--gin_file=tasks/quickstart.gin"
)
_QUICKSTART_TASK = (
    '--gin.MIXTURE_OR_TASK_NAME=quickstart_pairs --gin.TASK_FEATURE_LENGTHS=\'{"inputs": 24, "targets": 24}\''
)


def _without_gin(summary: str, example: str, module: str, add_arguments: Callable[[Parser], None]) -> Verb:
    return Verb(
        summary, example, module, takes_gin=False, takes_dry_run=False, takes_mesh=False, add_arguments=add_arguments
    )


VERBS: Mapping[str, Verb] = {
    "train": Verb(
        "pretrain, adapt, fine-tune or distil a model",
        "train --gin_file=recipes/quickstart/pretrain_ar.gin --gin.MODEL_DIR=/tmp/pretrain_ar",
        "diffusion_t5x.train",
        ("runs/pretrain.gin", "runs/finetune.gin", "runs/distil.gin", "runs/lora.gin"),
        SLICE_FLAGS,
    ),
    "eval": Verb(
        "decode a task with a checkpoint and score it; measure losses and likelihoods",
        f"eval {_QUICKSTART_DECODED} --gin_file=runs/eval.gin --gin.CHECKPOINT_PATH=/tmp/finetuned "
        f"--gin.EVAL_OUTPUT_DIR=/tmp/scores {_QUICKSTART_TASK}",
        "diffusion_t5x.eval",
        ("runs/eval.gin", "runs/eval_likelihood.gin", "runs/score.gin"),
        {
            **CHECKPOINT,
            "--predictions": {"metavar": "FILE", "help": "score these predictions, made elsewhere; no model is needed"},
            "--task": {"metavar": "NAME", "help": "with --predictions: their task"},
        },
    ),
    "lm_eval": Verb(
        "run tasks of EleutherAI's lm-evaluation-harness",
        "lm_eval --tasks=NAME --gin_file=FILE --gin_file=runs/lm_eval.gin",
        "diffusion_t5x.lm_eval",
        ("runs/lm_eval.gin",),
        {
            **CHECKPOINT,
            "--tasks": {
                "type": lambda names: [name for name in names.split(",") if name],
                "metavar": "NAME,NAME",
                "help": "tasks or groups of the harness",
            },
            "--include_path": {"metavar": "DIR", "help": "folder with your own tasks"},
            "--limit": {"type": int, "metavar": "N", "help": "only the first N documents of each task"},
            "--num_fewshot": {"type": int, "metavar": "N", "help": "examples in the prompt (default: the task's own)"},
            "--apply_chat_template": {
                "action": "store_const",
                "const": True,
                "help": "ask in the model's chat template",
            },
            "--fewshot_as_multiturn": {
                "action": argparse.BooleanOptionalAction,
                "help": "examples are turns of the conversation (default: with the chat template)",
            },
            "--system_instruction": {"metavar": "TEXT", "help": "system prompt"},
        },
    ),
    "infer": Verb(
        "write predictions for a task, fill holes, trace every step",
        f"infer --trace {_QUICKSTART_DECODED} --gin_file=runs/infer.gin --gin.CHECKPOINT_PATH=/tmp/finetuned "
        f"--gin.INFER_OUTPUT_DIR=/tmp/predictions {_QUICKSTART_TASK}",
        "diffusion_t5x.infer",
        ("runs/infer.gin", "runs/infer_score.gin", "runs/infer_chat.gin"),
        {
            **CHECKPOINT,
            "--messages": {"metavar": "FILE", "help": "answer these conversations (JSON lines or Parquet)"},
            "--templates": {"metavar": "FILE", "help": "fill the holes in these texts (JSON lines)"},
            "--trace": {"action": "store_true", "help": "keep every step, and write a page that plays them"},
            **SLICE_FLAGS,
        },
    ),
    "generate": Verb(
        "answer prompts in the terminal or in a pipe",
        "generate --checkpoint /tmp/finetuned --prompt 'Saturday, May 23, 1981'",
        "diffusion_t5x.generate",
        flags={
            **CHECKPOINT,
            "--prompt": {
                "metavar": "TEXT",
                "help": "answer this prompt and stop; without it, read prompts from standard input",
            },
            "--length": {"type": int, "metavar": "TOKENS", "help": "maximum length of the answer"},
            "--samples": {"type": int, "metavar": "N", "help": "answers to each prompt"},
            "--seed": {"type": int, "metavar": "N", "help": "random seed"},
            "--regex": {"metavar": "PATTERN", "help": "answers are texts of this regular expression"},
            "--json_schema": {"metavar": "FILE", "help": "answers are JSON of this schema"},
            "--chat": {
                "action": argparse.BooleanOptionalAction,
                "help": "format prompts with the model's chat template (default: if it has one)",
            },
            "--system": {"metavar": "TEXT", "help": "system prompt of a chat"},
            "--stop": {"action": "append", "metavar": "TEXT", "help": "end answers before this text; repeatable"},
            "--tokenizer": {
                "metavar": "FILE",
                "help": "the vocabulary's file, if the checkpoint does not name it or it has moved",
            },
        },
    ),
    "serve": Verb(
        "serve a model over HTTP, to clients of OpenAI's API",
        "serve --checkpoint /tmp/finetuned --port 8000",
        "diffusion_t5x.serve",
        flags={
            **CHECKPOINT,
            "--host": {"metavar": "ADDRESS", "help": "where to listen (default: 127.0.0.1, this machine alone)"},
            "--port": {"type": int, "metavar": "N", "help": "port (default: 8000; 0 takes a free one)"},
            "--api_key": {
                "metavar": "KEY",
                "help": "key that clients must send; better in the environment: DIFFUSION_T5X_API_KEY",
            },
            "--slots": {"type": int, "metavar": "N", "help": "texts written at the same time (default: 8)"},
            "--queue": {"type": int, "metavar": "N", "help": "texts that may wait (default: 64)"},
            "--length": {"type": int, "metavar": "TOKENS", "help": "length of an answer if a request names none"},
            "--context": {"type": int, "metavar": "TOKENS", "help": "tokens of a prompt and its answer together"},
            "--most_bytes": {"type": int, "metavar": "N", "help": "maximum size of a request (default: 1000000)"},
            "--grace": {"type": int, "metavar": "SECONDS", "help": "time to end requests after SIGTERM (default: 60)"},
            "--tokenizer": {
                "metavar": "FILE",
                "help": "the vocabulary's file, if the checkpoint does not name it or it has moved",
            },
        },
    ),
    "certify": Verb(
        "check that texts do not depend on batch, padding, slots, mesh or cache",
        "certify --checkpoint /tmp/finetuned --prompt 'Saturday, May 23, 1981' --prompt '5.8K' --length 24",
        "diffusion_t5x.certify",
        flags={
            **CHECKPOINT,
            "--prompts": {"metavar": "FILE", "help": "prompts, one a line (empty lines are skipped)"},
            "--prompt": {"action": "append", "metavar": "TEXT", "help": "a prompt; repeatable"},
            "--length": {"type": int, "metavar": "TOKENS", "help": "maximum length of a text"},
            "--seed": {"type": int, "metavar": "N", "help": "random seed"},
            "--bound": {"type": float, "metavar": "NATS", "help": "margin above which a difference is a fault"},
            "--output": {"metavar": "FILE", "help": "also write the certificate as JSON"},
            "--tokenizer": {
                "metavar": "FILE",
                "help": "the vocabulary's file, if the checkpoint does not name it or it has moved",
            },
        },
    ),
    "cache_tasks": Verb(
        "tokenize a task once; training then reads it without TensorFlow",
        "cache_tasks --gin_file=tasks/quickstart.gin --gin_file=runs/cache_tasks.gin --gin.CACHE_DIR=/tmp/cache "
        + _QUICKSTART_TASK,
        "diffusion_t5x.cache_tasks",
        ("runs/cache_tasks.gin",),
        takes_mesh=False,
    ),
    "inspect_data": Verb(
        "show rows of a training batch, and how the objective corrupts them",
        "inspect_data --gin_file=recipes/quickstart/adapt.gin --gin_file=runs/inspect_data.gin",
        "diffusion_t5x.inspect_data",
        ("runs/inspect_data.gin",),
        CHECKPOINT,
        takes_dry_run=False,
        takes_mesh=False,
    ),
    "benchmark decode": Verb(
        "time decoders over lengths",
        "benchmark decode --gin_file=recipes/quickstart/benchmark.gin --gin.BENCHMARK_OUTPUT_DIR=/tmp/times",
        "diffusion_t5x.benchmark",
        ("runs/benchmark_decode.gin",),
        CHECKPOINT,
    ),
    "benchmark train": Verb(
        "time training steps",
        "benchmark train --gin_file=models/decoder_only.gin --gin_file=sizes/tiny.gin "
        "--gin_file=recipes/train_speed.gin --gin.BENCHMARK_OUTPUT_DIR=/tmp/speed",
        "diffusion_t5x.benchmark",
        ("runs/benchmark_train.gin",),
    ),
    "benchmark slots": Verb(
        "time decoding in slots beside whole batches",
        "benchmark slots --gin_file=recipes/slot_speed.gin --gin.TEXT_FILE=/data/mbpp.jsonl.gz "
        "--gin.BENCHMARK_OUTPUT_DIR=/tmp/slot_speed",
        "diffusion_t5x.benchmark",
        ("runs/benchmark_slots.gin",),
    ),
    "report": _without_gin(
        "show runs on one page: curves, scores, examples, canvases",
        "report /tmp/finetuned /tmp/scores --output report.html",
        "diffusion_t5x.report",
        parsers.add_report,
    ),
    "checkpoints": _without_gin(
        "list, show, verify and compare checkpoints",
        "checkpoints list /tmp/finetuned",
        "diffusion_t5x.checkpoints",
        parsers.add_checkpoints,
    ),
    "convert": _without_gin(
        "import a model from Hugging Face, T5X or llama2.c, and export it again",
        "convert from_hf FOLDER --output /tmp/imported",
        "diffusion_t5x.convert",
        parsers.add_convert,
    ),
    "ar2diff": _without_gin(
        "turn an autoregressive model into a diffusion model: import, train, score, export",
        "ar2diff MODEL --data README.md --output /tmp/converted",
        "diffusion_t5x.ar2diff",
        parsers.add_ar2diff,
    ),
    "tasks": _without_gin(
        "list the shipped tasks, with the gin file that registers each",
        "tasks wmt",
        "diffusion_t5x.command_line.task_list",
        parsers.add_tasks,
    ),
    "env": _without_gin(
        "print versions and devices, for a bug report",
        "env",
        "diffusion_t5x.command_line.environment",
        parsers.add_nothing,
    ),
    "completion": _without_gin(
        "print a completion script for bash or zsh",
        "completion bash > ~/.local/share/bash-completion/completions/diffusion-t5x",
        "diffusion_t5x.command_line.completion",
        parsers.add_completion,
    ),
}


def own_flags(name: str) -> Parser:
    """Returns a parser of a verb's own flags, which leaves gin's flags to `config.run`."""
    return with_flags(Parser(add_help=False, allow_abbrev=False), VERBS[name].flags)


def with_flags(parser: Container, flags: Flags) -> Container:
    """Adds flags to the parser, or a group of it, and returns it."""
    for flag, options in flags.items():
        parser.add_argument(flag, **options)
    return parser
