"""Three ways from an autoregressive model to block diffusion, on equal terms (OPDLM, arXiv 2606.06712), on a CPU.

A really trained model of 260,000 parameters, stories260K of llama2.c, is imported. It writes stories; of each the first
tokens are a prompt. From its weights three students are trained, each with several seeds:

    sft         the diffusion loss on the teacher's stories
    off_policy  the teacher's distributions on its own stories, under random masks
    opdlm       the teacher's distributions on the student's stories, in the states that the student went through

What they write to other prompts is judged by the teacher. Stages are ordinary runs of the verbs; those that are done
are not run again.
"""

import argparse
import json
import os
import pathlib
import shlex
import statistics
from collections.abc import Callable

os.environ.setdefault("JAX_PLATFORMS", "cpu")

from diffusion_t5x import config, convert, infer, train
from diffusion_t5x import eval as evaluation

ARMS = {
    "sft": ["--gin_file=objectives/block.gin", "--gin.ROLLOUT=None"],
    "off_policy": ['--gin.STATES="random"', "--gin.ROLLOUT=None"],
    "random_masks": ['--gin.STATES="random"'],
    "opdlm": [],
}
DECODERS = {"static": [], "threshold": ["--gin.NUM_STEPS=None", "--gin.THRESHOLD=0.9"]}
COLUMNS = ("teacher_nll", "teacher_agreement", "distinct_1", "distinct_2", "distinct_3", "tokens_per_step")
NUM_STORIES = 4600
RECIPES = "recipes/opdlm"


def run(verb: Callable[..., None], flags: list[str]) -> None:
    print("python -m", verb.__module__, shlex.join(flags), flush=True)
    config.run(verb, flags)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="bash launch/opdlm_stories.sh", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--checkpoint", required=True, help="stories260K.bin")
    parser.add_argument("--tokenizer", required=True, help="tok512.bin")
    parser.add_argument("--output", required=True, type=pathlib.Path, help="a folder; a second run goes on in it")
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=["sft", "off_policy", "opdlm"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--split", default="test", help="to evaluate on; choose settings on validation")
    parser.add_argument("overrides", nargs="*", metavar="--gin.NAME=VALUE", help="behind --: for training")
    args = parser.parse_args()
    # Students of one kind are the same program.
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(args.output / "compiled"))

    teacher, samples = args.output / "teacher", args.output / "samples"
    if not teacher.exists():
        convert.convert(["from_llama2c", args.checkpoint, "--tokenizer", args.tokenizer, "--output", str(teacher)])
    model = f"--gin_file={teacher}/model.gin"
    stories = samples / "stories_prompts-test.jsonl"
    if not stories.exists():
        prompts = args.output / "no_prompts.txt"
        prompts.write_text("\n" * NUM_STORIES, encoding="utf-8")
        files = ["hardware/cpu.gin", "decoding/autoregressive.gin", "runs/infer.gin", "tasks/stories.gin"]
        settings = {
            "CHECKPOINT_PATH": teacher,
            "INFER_OUTPUT_DIR": samples,
            "TEXT_FILE": prompts,
            "BATCH_SIZE": 256,
            "TASK_FEATURE_LENGTHS": '{"inputs": 1, "targets": 72}',
            "autoregressive_decoding.AutoregressiveDecoder.temperature": 1.0,
        }
        flags = [f"--gin.{name}={value}" for name, value in settings.items()]
        run(infer.infer, [model, *(f"--gin_file={file}" for file in files), *flags])

    def evaluate(student: pathlib.Path, name: str, flags: list[str]) -> dict[str, float]:
        output = args.output / "scores" / args.split / name
        if not (output / "results.json").exists():
            where = {
                "TEACHER_CHECKPOINT_PATH": teacher,
                "SAMPLES_FILE": stories,
                "CHECKPOINT_PATH": student,
                "EVAL_OUTPUT_DIR": output,
                "SPLIT": f'"{args.split}"',
            }
            recipe = [f"--gin_file={RECIPES}/eval_stories260k.gin", model]
            flags = flags + [f"--gin.{key}={value}" for key, value in where.items()]
            run(evaluation.evaluate, recipe + flags)
        return json.loads((output / "results.json").read_text(encoding="utf-8"))["results"]["stories_continuations"]

    autoregressive = ["--gin_file=decoding/autoregressive.gin"]
    autoregressive.append("--gin.autoregressive_decoding.AutoregressiveDecoder.temperature=1.0")
    scores = {("teacher", "one by one"): [evaluate(teacher, "teacher", autoregressive)]}
    for seed in args.seeds:
        for arm in args.arms:
            student = args.output / "students" / f"{arm}_{seed}"
            if not (student / "checkpoints" / f"checkpoint_{args.steps}").exists():
                settings = {
                    "MODEL_DIR": student,
                    "INITIAL_CHECKPOINT_PATH": teacher,
                    "SAMPLES_FILE": stories,
                    "TRAIN_STEPS": args.steps,
                    "RANDOM_SEED": seed,
                }
                flags = [f"--gin_file={RECIPES}/stories260k.gin", model, *ARMS[arm]]
                flags += [f"--gin.{name}={value}" for name, value in settings.items()]
                run(train.train, flags + args.overrides)
            for decoder, flags in DECODERS.items():
                found = evaluate(student, f"{arm}_{seed}_{decoder}", [*flags, f"--gin.RANDOM_SEED={seed}"])
                scores.setdefault((arm, decoder), []).append(found)

    table = ["| student | decoding | " + " | ".join(COLUMNS) + " |", "| --- | --- |" + " ---: |" * len(COLUMNS)]
    for (arm, decoder), found in scores.items():
        cells = []
        for column in COLUMNS:
            values = [result[column] for result in found]
            spread = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
            cells.append(f"{statistics.mean(values):.3f}{spread}")
        table.append(f"| {arm} | {decoder} | " + " | ".join(cells) + " |")
    (args.output / f"{args.split}.md").write_text("\n".join(table) + "\n", encoding="utf-8")
    print("\n".join(table))


if __name__ == "__main__":
    main()
