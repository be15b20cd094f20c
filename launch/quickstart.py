"""The quickstart: the AR2Diff experiment (arXiv 2401.17181) at small scale, on two CPU cores, without any download.

An autoregressive model is pretrained, then fine-tuned (the baseline); the same pretrained model is adapted to diffusion
(AR2Diff_N) and fine-tuned with diffusion. Both write 512 held-out strings. Stages are ordinary runs of the verbs; an
interrupted stage continues from its last checkpoint when the quickstart is started again.
"""

import argparse
import json
import os
import pathlib
import shlex
import shutil
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import rich.box
import rich.console
import rich.markup
import rich.table

from diffusion_t5x import benchmark, infer, train
from diffusion_t5x import eval as evaluation
from diffusion_t5x.command_line import config
from diffusion_t5x.reporting.report import write_report

RECIPES = "recipes/quickstart"
ROOT = pathlib.Path(__file__).resolve().parent.parent
console = rich.console.Console()


class Quickstart:
    """Runs stages below one folder and records their durations.

    Args:
      folder: contains a folder for each stage.
      overrides: command line flags added to each stage of a verb.
      model: gin file of the architecture.
      pretraining: gin file of the pretraining task, if it differs from the recipes' own.
    """

    def __init__(self, folder: pathlib.Path, overrides: Mapping[str, list[str]], model: str, pretraining: str | None):
        self.folder = folder
        self.seconds: dict[str, float] = {}
        self._overrides = overrides
        self._model, self._pretraining = model, pretraining
        self._seconds_file = folder / "seconds.json"
        if self._seconds_file.exists():
            self.seconds = json.loads(self._seconds_file.read_text())

    def path(self, stage: str) -> str:
        return str(self.folder / stage)

    def pretrain(self, stage: str, recipe: str, start: str | None = None) -> None:
        self.train(stage, recipe, start, [self._pretraining] if self._pretraining else [])

    def train(self, stage: str, recipe: str, start: str | None = None, gin_files: Sequence[str] = ()) -> None:
        flags = [*(f"--gin_file={file}" for file in gin_files), f"--gin.MODEL_DIR={self.path(stage)}"]
        if start:
            flags.append(f"--gin.INITIAL_CHECKPOINT_PATH={self.path(start)}")
        self._run(stage, train.train, recipe, flags)

    def evaluate(self, stage: str, recipe: str, model: str) -> dict[str, float]:
        flags = [f"--gin.CHECKPOINT_PATH={self.path(model)}", f"--gin.EVAL_OUTPUT_DIR={self.path(stage)}"]
        results = pathlib.Path(self.path(stage), "results.json")
        if not results.exists():
            self._run(stage, evaluation.evaluate, recipe, flags)
        return json.loads(results.read_text(encoding="utf-8"))["results"]["quickstart_pairs"]

    def infer(self, stage: str, recipe: str, model: str) -> list[dict[str, Any]]:
        flags = [f"--gin.CHECKPOINT_PATH={self.path(model)}", f"--gin.INFER_OUTPUT_DIR={self.path(stage)}"]
        self._run(stage, infer.infer, recipe, flags)
        (output,) = pathlib.Path(self.path(stage)).glob("*.jsonl")
        return [json.loads(line) for line in output.read_text(encoding="utf-8").splitlines()]

    def benchmark(self, stage: str, recipe: str) -> None:
        flags = [f"--gin.BENCHMARK_OUTPUT_DIR={self.path(stage)}"]
        self._run(stage, benchmark.decode, recipe, flags, subcommand="decode")

    def _run(self, stage: str, verb: Callable[..., None], recipe: str, flags: list[str], subcommand: str = "") -> None:
        files = [f"--gin_file={RECIPES}/{recipe}.gin", f"--gin_file={self._model}"]
        flags = [*files, *flags, *self._overrides.get(verb.__name__, [])]
        console.rule(f"[bold]{stage}")
        print("python -m", shlex.join(filter(None, [verb.__module__, subcommand, *flags])), flush=True)
        start = time.monotonic()
        config.run(verb, flags, subcommand)
        self.seconds[stage] = self.seconds.get(stage, 0) + time.monotonic() - start
        self._seconds_file.write_text(json.dumps(self.seconds))


def run_experiment(quickstart: Quickstart, full: bool) -> tuple[dict[str, dict[str, float]], list[dict[str, Any]]]:
    """Runs all stages. Returns each model's scores, and the diffusion model's examples with their canvases."""
    q = quickstart
    q.pretrain("pretrain_ar", "pretrain_ar")
    q.train("finetune_ar", "finetune_ar", start="pretrain_ar")
    q.pretrain("adapt", "adapt", start="pretrain_ar")
    q.train("finetune_ar2diff_n", "finetune_diffusion", start="adapt")
    scores = {
        "AR": q.evaluate("eval_ar", "eval_ar", "finetune_ar"),
        "AR2Diff_N": q.evaluate("eval_ar2diff_n", "eval_diffusion", "finetune_ar2diff_n"),
    }
    if full:
        q.train("finetune_ar2diff_0", "finetune_diffusion", start="pretrain_ar")
        scores["AR2Diff_0"] = q.evaluate("eval_ar2diff_0", "eval_diffusion", "finetune_ar2diff_0")
        q.pretrain("pretrain_diffusion", "pretrain_diffusion")
        q.train("finetune_diffusion", "finetune_diffusion", start="pretrain_diffusion")
        scores["diffusion from scratch"] = q.evaluate("eval_diffusion", "eval_diffusion", "finetune_diffusion")
    examples = q.infer("infer_ar2diff_n", "infer_diffusion", "finetune_ar2diff_n")
    q.benchmark("benchmark", "benchmark")
    return scores, examples


def show(scores: Mapping[str, Mapping[str, float]]) -> None:
    """Prints the table of scores."""
    console.print()
    number = next(iter(scores.values()))["num_examples"]
    title = f"{number} held-out strings, English → French (95 % intervals)"
    table = rich.table.Table(box=rich.box.SIMPLE, title=title)
    for column in ("model", "exact match %", "BLEU"):
        table.add_column(column, justify="left" if column == "model" else "right")
    for model, metrics in scores.items():
        cells = (
            f"{metrics[name]:.1f}  [{metrics[name + '_low']:.1f}, {metrics[name + '_high']:.1f}]"
            for name in ("exact_match", "bleu")
        )
        table.add_row(model, *(rich.markup.escape(cell) for cell in cells))
    console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="bash launch/quickstart.sh", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--smoke", action="store_true", help="5 steps of every stage: does everything run?")
    length.add_argument("--full", action="store_true", help="AR2Diff_0 and diffusion from scratch as well")
    parser.add_argument("--architecture", choices=("decoder_only", "encoder_decoder"), default="decoder_only")
    parser.add_argument("--pretraining", choices=("prefix_lm", "span_corruption"), default="prefix_lm")
    parser.add_argument("--output", type=pathlib.Path, help="folder for all runs (default: a folder in runs/)")
    parser.add_argument("--fresh", action="store_true", help="empty that folder first")
    args = parser.parse_args()
    choices = {name: getattr(args, name) for name in ("architecture", "pretraining")}
    variant = [choice for name, choice in choices.items() if choice != parser.get_default(name)]
    folder = args.output or ROOT / "runs" / "-".join(["smoke" if args.smoke else "quickstart", *variant])
    if args.fresh or args.smoke:
        shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True, exist_ok=True)
    # Several stages run the same programs: each is compiled once.
    jax.config.update("jax_compilation_cache_dir", os.fspath(folder / "compiled"))
    overrides = {}
    if args.smoke:
        few = "--gin.NUM_DECODED_EXAMPLES=16"
        overrides = {
            "train": [
                "--gin.ModelConfig.scan_unroll=1",
                "--gin.TRAIN_STEPS=5",
                "--gin.WARMUP_STEPS=1",
                "--gin.EVAL_STEPS=1",
            ],
            "evaluate": [few, "--gin.BATCH_SIZE=16"],
            "infer": ["--gin.NUM_DECODED_EXAMPLES=4", "--gin.BATCH_SIZE=4"],
            "decode": ["--gin.ModelConfig.scan_unroll=1", "--gin.LENGTHS=(8,)", "--gin.REPEATS=1"],
        }
    pretraining = f"{RECIPES}/span_corruption.gin" if args.pretraining == "span_corruption" else None
    quickstart = Quickstart(folder, overrides, f"models/{args.architecture}.gin", pretraining)
    scores, examples = run_experiment(quickstart, args.full or args.smoke)
    show(scores)
    results = folder / "results.json"
    report = {"scores": scores, "seconds": quickstart.seconds, "examples": examples}
    results.write_text(json.dumps(report, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    print(f"{sum(quickstart.seconds.values()):.0f} s in all. Scores, times and examples: {results}")
    print(f"Everything on one page: {write_report([folder], folder / 'report.html')}")
    print(f"Checkpoints, logs and predictions of each stage: {folder}{os.sep}")


if __name__ == "__main__":
    sys.exit(main())
