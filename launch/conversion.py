"""Compares routes from one autoregressive model to block diffusion, on equal terms, on a CPU.

quickstart: a tiny model is pretrained and fine-tuned on the quickstart's data; routes are scored by exact match.
stories: a published model of 260,000 parameters, stories260K of llama2.c, writes stories, which are the data, and
judges the stories that the routes write. In both, the model is the start of all routes, and the teacher.

    ar2diff_N      the diffusion loss on the data; before it, N steps of it on the pretraining data (quickstart)
    annealed       ar2diff_0, attention opens over the first half of the steps
    shifted        ar2diff_0, each token is predicted in the slot before its own
    block_growth   ar2diff_0, blocks of 1, then 2, then 4 tokens
    aligned        ar2diff_0, hidden states are trained to match the model's own at the start
    off_policy     the teacher's distributions on the data, under random masks
    random_masks   the same on the student's own texts
    opdlm          the same in the states of the student's own decoding
    joint          ar2diff_0 plus the autoregressive loss: decodes either way, and by self-speculation (quickstart)
    joint_drafts   the autoregressive loss plus drafts: decodes token by token, and several tokens in one pass
                   (quickstart)

chain: a small model learns a second-order Markov chain, which says what each symbol costs. Its routes are off_policy,
opdlm and sft (mean cross-entropy of masked tokens), each in place and shifted, cold and warmed by a short off-policy
distillation; learning rates are chosen for each on another seed.

Every route has the same optimizer, steps, batches and seeds. Stages are ordinary runs of the verbs; those that are done
are not run again. The report is DIR/report.md and the charts beside it.
"""

import argparse
import dataclasses
import functools
import json
import os
import pathlib
from collections.abc import Sequence

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import conversion_chain
import conversion_report
from conversion_report import Point, Score
from conversion_verbs import run, settings

from diffusion_t5x import convert, infer, train
from diffusion_t5x import eval as evaluation
from diffusion_t5x.checkpointing import merging
from diffusion_t5x.checkpointing.checkpoints import find_checkpoint
from diffusion_t5x.checkpointing.start import model_settings
from diffusion_t5x.decoding.block import BlockDecoder
from diffusion_t5x.decoding.masked import MaskedDecoder
from diffusion_t5x.models.config import ModelConfig
from diffusion_t5x.objectives.alignment import Aligned
from diffusion_t5x.objectives.block import Block
from diffusion_t5x.objectives.distillation import Distillation
from diffusion_t5x.objectives.joint import Joint
from diffusion_t5x.objectives.joint_drafts import JointDrafts
from diffusion_t5x.objectives.objective import Objective
from diffusion_t5x.performance.step_flops import rollout_flops, step_flops
from diffusion_t5x.training.ramps import Ramp
from diffusion_t5x.training.rollout import Rollout

BLOCK_SIZE = 4
NUM_EVALUATIONS = 4  # on the way
ADAPT_BATCH_SIZE, ADAPT_LENGTH = 16, 96  # rows of recipes/quickstart/pretraining.gin
DIFFUSION = ["--gin_file=objectives/block.gin", "--gin.ROLLOUT=None"]
DRAFTING = ["--gin_file=decoding/drafts.gin"]
SHIFTED = ["--gin_file=adaptation/shifted.gin"]


@dataclasses.dataclass(frozen=True)
class Stage:
    """One training run of a route.

    Attributes:
      flags: flags after the recipe's; `{share}` stands for that share of its steps.
      objective: the objective, for counting the cost of a step.
      adapt_steps: number of steps on the pretraining data, instead of the steps that every route has.
      writes: trains on texts that the student writes.
    """

    flags: Sequence[str] = ()
    objective: Objective = Block(BLOCK_SIZE)  # noqa: RUF009  (frozen)
    adapt_steps: int = 0
    writes: bool = False


AR2DIFF = Stage(DIFFUSION)
STUDENT = Distillation(BLOCK_SIZE)
GROWTH = ["--gin_file=adaptation/block_growth.gin", f"--gin.BLOCK_SIZE={BLOCK_SIZE}"]
ROUTES = {
    "ar2diff_0": [AR2DIFF],
    "ar2diff_100": [Stage(adapt_steps=100), AR2DIFF],
    "ar2diff_300": [Stage(adapt_steps=300), AR2DIFF],
    "annealed": [Stage([*DIFFUSION, "--gin_file=adaptation/annealed.gin", "--gin.ANNEAL_STEPS={1/2}"])],
    "shifted": [Stage([*DIFFUSION, *SHIFTED])],
    "block_growth": [Stage([*DIFFUSION, *GROWTH, "--gin.BLOCK_STAGES=((0, 1), ({1/4}, 2), ({1/2}, 4))"])],
    "aligned": [Stage([*DIFFUSION, "--gin_file=adaptation/aligned.gin"], Aligned(BLOCK_SIZE))],
    "off_policy": [Stage(['--gin.STATES="random"', "--gin.ROLLOUT=None"], STUDENT)],
    "random_masks": [Stage(['--gin.STATES="random"'], STUDENT, writes=True)],
    "opdlm": [Stage([], STUDENT, writes=True)],
    "joint": [Stage([*DIFFUSION, "--gin_file=adaptation/joint.gin"], Joint(Block(BLOCK_SIZE)))],
    "joint_drafts": [
        Stage(["--gin_file=objectives/joint_drafts.gin", *DRAFTING, "--gin.ROLLOUT=None"], JointDrafts(BLOCK_SIZE))
    ],
}
DECODERS = {
    "4 steps a block": [],
    "2 steps a block": ["--gin.NUM_STEPS=2"],
    "threshold 0.9": ["--gin.NUM_STEPS=None", "--gin.THRESHOLD=0.9"],
}
ONE_BY_ONE = ["--gin_file=decoding/autoregressive.gin"]
AUTOREGRESSIVE_TOO = {"one by one": ONE_BY_ONE, "self-speculation": ["--gin_file=decoding/self_speculation.gin"]}
AUTOREGRESSIVE_ONLY = {"one by one": ONE_BY_ONE, "drafts": DRAFTING}


@dataclasses.dataclass(frozen=True)
class Ground:
    """The task to learn, and its scoring.

    Attributes:
      recipe, eval_recipe: gin files of a student's training and evaluation; routes may add flags to each.
      start: the checkpoint from which all routes start, which is also the teacher.
      task: its name in the results.
      metrics: names of metrics; the first one is drawn.
      routes: routes to train.
      batch_size, num_inputs, num_targets: settings of the recipe, for counting the cost of a step.
      rollout: rollout of the recipe, likewise.
      lower_is_better: of the first metric.
    """

    recipe: list[str]
    eval_recipe: list[str]
    start: pathlib.Path
    task: str
    metrics: Sequence[str]
    routes: Sequence[str]
    batch_size: int
    num_inputs: int
    num_targets: int
    rollout: Rollout
    lower_is_better: bool = False

    @functools.cached_property
    def model(self) -> ModelConfig:
        """The config of the start."""
        return ModelConfig(**model_settings(merging.leaves(find_checkpoint(str(self.start)))))


def rollout(lengths: Ramp, **values: int) -> Rollout:
    return Rollout(BlockDecoder(BLOCK_SIZE, MaskedDecoder(num_steps=4)), lengths=lengths, **values)


def quickstart(output: pathlib.Path, args: argparse.Namespace) -> Ground:
    pretrained, finetuned = output / "pretrained", output / "finetuned"
    recipes = "--gin_file=recipes/quickstart"
    if not (pretrained / "checkpoints").exists():
        run(train.train, [f"{recipes}/pretrain_ar.gin", *settings(MODEL_DIR=pretrained)])
    if not (finetuned / "checkpoints").exists():
        places = settings(MODEL_DIR=finetuned, INITIAL_CHECKPOINT_PATH=pretrained)
        run(train.train, [f"{recipes}/finetune_ar.gin", *places])
    return Ground(
        recipe=["--gin_file=recipes/conversion/quickstart.gin"],
        eval_recipe=["--gin_file=recipes/conversion/eval_quickstart.gin"],
        start=finetuned,
        task="quickstart_pairs",
        metrics=("exact_match", "bleu", "tokens_per_step"),
        routes=[name for name in ROUTES if name != "random_masks"],
        batch_size=16,
        num_inputs=24,
        num_targets=24,
        rollout=rollout(Ramp(24, 24)),
    )


def stories(output: pathlib.Path, args: argparse.Namespace) -> Ground:
    teacher, samples = output / "teacher", output / "samples"
    if not teacher.exists():
        convert.convert(["from_llama2c", args.checkpoint, "--tokenizer", args.tokenizer, "--output", str(teacher)])
    model = f"--gin_file={teacher}/model.gin"
    texts = samples / "stories_prompts-test.jsonl"
    if not texts.exists():
        prompts = output / "no_prompts.txt"
        prompts.write_text("\n" * 4600, encoding="utf-8")
        files = ["hardware/cpu.gin", "decoding/autoregressive.gin", "runs/infer.gin", "tasks/stories.gin"]
        places = settings(CHECKPOINT_PATH=teacher, INFER_OUTPUT_DIR=samples, TEXT_FILE=prompts, BATCH_SIZE=256)
        flags = [*places, '--gin.TASK_FEATURE_LENGTHS={"inputs": 1, "targets": 72}']
        flags.append("--gin.autoregressive_decoding.AutoregressiveDecoder.temperature=1.0")
        run(infer.infer, [model, *(f"--gin_file={file}" for file in files), *flags])
    judged = settings(SAMPLES_FILE=texts)
    return Ground(
        recipe=["--gin_file=recipes/opdlm/stories260k.gin", model, *judged],
        eval_recipe=[
            *("--gin_file=recipes/opdlm/eval_stories260k.gin", model, *judged),
            *settings(TEACHER_CHECKPOINT_PATH=teacher),
        ],
        start=teacher,
        task="stories_continuations",
        metrics=("teacher_nll", "teacher_agreement", "distinct_1", "distinct_2", "distinct_3", "tokens_per_step"),
        routes=["ar2diff_0", "annealed", "shifted", "block_growth", "aligned", "off_policy", "random_masks", "opdlm"],
        batch_size=16,
        num_inputs=16,
        num_targets=48,
        rollout=rollout(Ramp(16, 48, 30), num_buckets=2),
        lower_is_better=True,
    )


def train_route(
    ground: Ground, route: str, seed: int, folder: pathlib.Path, num_steps: int, overrides: Sequence[str]
) -> list[Point]:
    """Trains a student, stage by stage; returns its scores along the way with their cost."""
    start, points, taken, tokens, flops = ground.start, [], 0, 0.0, 0.0
    for number, stage in enumerate(ROUTES[route]):
        model_dir = folder / f"{route}_{seed}" / str(number)
        steps = stage.adapt_steps or num_steps
        if not (model_dir / "checkpoints" / f"checkpoint_{steps}").exists():
            places = settings(MODEL_DIR=model_dir, INITIAL_CHECKPOINT_PATH=start, TRAIN_STEPS=steps, RANDOM_SEED=seed)
            if stage.adapt_steps:
                flags = ["--gin_file=recipes/quickstart/adapt.gin", "--gin_file=objectives/block.gin"]
                flags += settings(BATCH_SIZE=ADAPT_BATCH_SIZE)
            else:
                parts = {f"{{{name}}}": str(int(num_steps * part)) for name, part in (("1/2", 0.5), ("1/4", 0.25))}
                flags = [functools.reduce(lambda x, part: x.replace(*part), parts.items(), x) for x in stage.flags]
                places += settings(TEACHER_CHECKPOINT_PATH=ground.start, EVAL_PERIOD=num_steps // NUM_EVALUATIONS)
                flags = [*ground.recipe, *flags]
            run(train.train, [*flags, *places, *overrides])
        start = model_dir
        scores = conversion_report.curve(model_dir, ground.task, ground.metrics[0])
        a_step = conversion_report.tokens_a_step(model_dir)
        for step in range(steps):
            tokens += a_step
            flops += stage_flops(ground, stage, step)
            if step + 1 in scores:
                points.append(Point(route, seed, taken + step + 1, tokens, flops, scores[step + 1]))
        taken += steps
    return points


def stage_flops(ground: Ground, stage: Stage, step: int) -> float:
    """Returns the FLOPs of one step, including the decoding of the texts it trains on."""
    if stage.adapt_steps:
        return step_flops(ground.model, stage.objective, ADAPT_BATCH_SIZE, ADAPT_LENGTH)
    if not stage.writes:
        return step_flops(ground.model, stage.objective, ground.batch_size, ground.num_inputs + ground.num_targets)
    written = ground.rollout.number(step)
    length = ground.num_inputs + ground.rollout.bucket(ground.rollout.length(written))
    learning = step_flops(ground.model, stage.objective, ground.batch_size, length)
    return learning + rollout_flops(ground.model, ground.rollout, ground.batch_size, ground.num_inputs, step)


def decoders(route: str) -> dict[str, list[str]]:
    """Returns the flags of each decoder that a route's students are scored with."""
    if route == "joint_drafts":
        return AUTOREGRESSIVE_ONLY
    return DECODERS | (AUTOREGRESSIVE_TOO if route == "joint" else {})


def keep_settings(output: pathlib.Path, **values: object) -> str:
    """Records the settings that everything in a folder is made with. Returns an error if they differ, or "".

    Finished runs and scores are found by their names, which do not say these settings.
    """
    file, now = output / "comparison.json", json.loads(json.dumps(values))
    before = json.loads(file.read_text(encoding="utf-8")) if file.exists() else now
    file.write_text(json.dumps(before, indent=1), encoding="utf-8")
    other = [f"{name} = {before[name]!r}, not {value!r}" for name, value in now.items() if before[name] != value]
    return f"{output} holds a comparison with {'; '.join(other)}. Name another --output." if other else ""


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="bash launch/conversion.sh",
        description=__doc__,
        epilog="--gin.NAME=VALUE overrides a setting in training.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("ground", choices=["quickstart", "stories", "chain"])
    parser.add_argument("--output", required=True, type=pathlib.Path, help="a folder; a second run continues in it")
    parser.add_argument("--checkpoint", help="stories260K.bin, for stories")
    parser.add_argument("--tokenizer", help="tok512.bin, for stories")
    parser.add_argument("--routes", nargs="+", choices=[*ROUTES, "sft"], help="default: all")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=400, help="training steps of each route")
    parser.add_argument("--split", default="test", help="split to evaluate on; choose settings on validation")
    parser.add_argument("--budget", type=float, help="training budget in TFLOP for the advice on routes")
    parser.add_argument("--tokens_per_pass", type=float, help="decoding speed for the advice on routes")
    args, overrides = parser.parse_known_args()
    if wrong := [flag for flag in overrides if not flag.startswith("--gin.")]:
        parser.error(f"unknown: {' '.join(wrong)}")
    if args.ground == "stories" and not (args.checkpoint and args.tokenizer):
        parser.error("stories needs --checkpoint stories260K.bin and --tokenizer tok512.bin (docs/convert.md)")
    if args.steps % NUM_EVALUATIONS:
        parser.error(f"--steps must be a multiple of {NUM_EVALUATIONS}")
    args.output.mkdir(parents=True, exist_ok=True)
    kept = {"ground": args.ground, "steps": args.steps, "checkpoint": args.checkpoint, "overrides": overrides}
    if different := keep_settings(args.output, **kept):
        parser.error(different)
    if args.ground == "chain":
        if wrong := set(args.routes or ()) - set(conversion_chain.ROUTES):
            parser.error(f"chain has no route {', '.join(sorted(wrong))}")
        conversion_chain.compare(args, overrides)
        print((args.output / "report.md").read_text(encoding="utf-8"))
        return
    ground = {"quickstart": quickstart, "stories": stories}[args.ground](args.output, args)
    routes = args.routes or list(ground.routes)
    if wrong := set(routes) - set(ground.routes):
        parser.error(f"{args.ground} has no route {', '.join(sorted(wrong))}")

    def evaluate(checkpoint: pathlib.Path, route: str, seed: int, decoder: str, flags: list[str]) -> Score:
        name = f"{route}_{seed}_{decoder}".replace(" ", "_")
        output = args.output / "scores" / args.split / name
        if not (output / "results.json").exists():
            places = settings(CHECKPOINT_PATH=checkpoint, EVAL_OUTPUT_DIR=output, SPLIT=f'"{args.split}"')
            run(evaluation.evaluate, [*ground.eval_recipe, *flags, *places, f"--gin.RANDOM_SEED={seed}"])
        report = json.loads((output / "results.json").read_text(encoding="utf-8"))
        return Score(route, seed, decoder, report["results"][ground.task])

    one_by_one = list(ONE_BY_ONE)
    if args.ground == "stories":
        one_by_one.append("--gin.autoregressive_decoding.AutoregressiveDecoder.temperature=1.0")
    scores = [evaluate(ground.start, "the start itself", 0, "one by one", one_by_one)]
    points: list[Point] = []
    for seed in args.seeds:
        for route in routes:
            points += train_route(ground, route, seed, args.output / "students", args.steps, overrides)
            student = args.output / "students" / f"{route}_{seed}" / str(len(ROUTES[route]) - 1)
            for decoder, flags in decoders(route).items():
                shifted = SHIFTED if route == "shifted" else []
                scores.append(evaluate(student, route, seed, decoder, [*flags, *shifted]))
        conversion_report.write(  # after each seed: what there is so far
            *(args.output, ground.metrics, scores, points),
            lower_is_better=ground.lower_is_better,
            budget=args.budget,
            tokens_per_pass=args.tokens_per_pass,
        )
    print((args.output / "report.md").read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
