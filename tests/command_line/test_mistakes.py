"""Natural mistakes on the command line of each verb: one line that says what, where and how to mend it."""

import importlib

import pytest

from diffusion_t5x.command_line import config

pytest.importorskip("seqio")
from fresh_process import run

PAIRS = '{"inputs": "one", "targets": "un"}\n{"inputs": "two", "targets": "deux"}\n'
MODEL = "--gin_file=models/decoder_only.gin --gin_file=sizes/tiny.gin"
SUNDAE = f"{MODEL} --gin_file=objectives/sundae.gin --gin_file=decoding/sundae.gin"
JSONL = """--gin_file=tasks/local_jsonl.gin --gin.VOCABULARY_FILE=None
 --gin.FILES={"train":"pairs.jsonl","validation":"pairs.jsonl"} --gin.TASK_FEATURE_LENGTHS={"inputs":8,"targets":8}"""
SHORT = "--gin.TRAIN_STEPS=1 --gin.BATCH_SIZE=2 --gin.MODEL_DIR=made --dry_run"
FINETUNE = f"{SUNDAE} --gin_file=runs/finetune.gin {JSONL} --gin.INITIAL_CHECKPOINT_PATH=None {SHORT}"
DISTIL = f"""{MODEL} --gin_file=objectives/distillation.gin --gin_file=decoding/block.gin --gin_file=runs/distil.gin
 {JSONL} --gin.INITIAL_CHECKPOINT_PATH=None {SHORT}"""
OPEN = f"{SUNDAE} --gin_file=runs/finetune.gin --gin.INITIAL_CHECKPOINT_PATH=None {SHORT}"
QUICKSTART = f"--gin_file=recipes/quickstart/pretrain_ar.gin {SHORT}"
EVAL = f"{SUNDAE} --gin_file=runs/eval.gin {JSONL} --gin.EVAL_OUTPUT_DIR=scores --dry_run"
INFER = f"{SUNDAE} --gin_file=runs/infer.gin {JSONL} --gin.INFER_OUTPUT_DIR=written --dry_run"
CACHE = "--gin_file=tasks/quickstart.gin --gin_file=runs/cache_tasks.gin --gin.CACHE_DIR=cache --dry_run"
BENCHMARK = f"decode {SUNDAE} --gin_file=runs/benchmark_decode.gin --gin.BENCHMARK_OUTPUT_DIR=times"
INSPECT = "--gin_file=recipes/quickstart/adapt.gin --gin_file=runs/inspect_data.gin"

# Verb, arguments, and what the message says of the place or value, of what is wrong, and of the way out.
MISTAKES = [
    # Settings of another type than they should be.
    ("train", f"{FINETUNE} --gin.TRAIN_STEPS=abc", ["--gin.TRAIN_STEPS=abc", "train_steps", "a whole number", "'abc'"]),
    ("train", f"{FINETUNE} --gin.TRAIN_STEPS=1.5", ["--gin.TRAIN_STEPS=1.5", "a whole number", "1.5"]),
    ("train", f"{FINETUNE} --gin.TRAIN_STEPS=None", ["--gin.TRAIN_STEPS=None", "a whole number"]),
    ("train", f"{FINETUNE} --gin.TRAIN_STEPS='100'", ["a whole number", "without quotes"]),
    ("train", f"{FINETUNE} --gin.TRAIN_STEPS=True", ["a whole number, not True"]),
    ("train", f"{FINETUNE} --gin.TRAIN_STEPS=100.0", ["a whole number", "Write 100."]),
    ("train", f"{FINETUNE} --gin.TASK_FEATURE_LENGTHS=32", ["LENGTHS=32", "a dict {text: a whole number}"]),
    ("train", f"{FINETUNE} --gin.TASK_FEATURE_LENGTHS=[8,8]", ["a dict {text: a whole number}"]),
    ("train", f"{FINETUNE} --gin.HELD_OUT=0.02", ["HELD_OUT=0.02", "a dict {text: a number}"]),
    ("train", f"{FINETUNE} --gin.FILES=pairs.jsonl", ["FILES=pairs.jsonl", 'Write {"train": ']),
    ("train", f"{FINETUNE} --gin.MODEL_DIR=20240501", ["MODEL_DIR=20240501", "text", "Quote it"]),
    ("train", f"{FINETUNE} --gin.TASK_NAME=7", ["TASK_NAME=7", "text", "Quote it"]),
    ("train", f"{FINETUNE} --gin.RANDOM_SEED=None", ["RANDOM_SEED=None", "a whole number"]),
    ("train", f'{FINETUNE} --gin.ModelConfig.dtype="fp8"', ["dtype", "'float32' or 'bfloat16'", "'fp8'"]),
    ("train", f'{FINETUNE} --gin.ModelConfig.remat="ful"', ["remat", "Did you mean 'full'?"]),
    ("train", f"{FINETUNE} --gin.ModelConfig.local_layers=[1,0]", ["local_layers", "a list of True or False"]),
    (
        "train",
        f"{FINETUNE} --gin.train.train.optimizer=@optimizers.adafactor",
        ["train.train.optimizer", "GradientTransformation", "Write @optimizers.adafactor()"],
    ),
    ("train", f"{FINETUNE} --gin.OBJECTIVE=@sundae_objective.Sundae", ["an Objective", "Write @sundae_objective"]),
    ("train", f"{FINETUNE} --gin.DECODER=@sundae_objective.Sundae()", ["a Decoder", "@sundae_objective.Sundae()"]),
    ("train", f"{FINETUNE} --gin.METRICS=@metrics.bleu", ["metric_fns", "a list of a function"]),
    ("train", f"{FINETUNE} --gin.train.train.loss_evals=@evaluator.LossEval()", ["loss_evals", "a list of a LossEval"]),
    ("train", f"{FINETUNE} --gin.LEARNING_RATE='1e-4'", ["LEARNING_RATE", "a number"]),
    ("eval", f"{EVAL} --gin.CHECKPOINT_PATH=1000", ["CHECKPOINT_PATH=1000", "text", "Quote it"]),
    ("eval", f"{EVAL} --gin.CHECKPOINT_PATH=c --gin.EVAL_TASKS=local", ["EVAL_TASKS", "Write ['local']"]),
    ("infer", f"{INFER} --gin.CHECKPOINT_PATH=c --gin.NUM_DECODED_EXAMPLES=all", ["a whole number or None, not"]),
    ("infer", f"{INFER} --gin.CHECKPOINT_PATH=c --gin.infer.infer.mode=scores", ["mode", "Did you mean 'score'?"]),
    ("cache_tasks", f"{CACHE} --gin.MIXTURE_OR_TASK_NAME=quickstart_pairs --gin.TASK_FEATURE_LENGTHS=24", ["a dict"]),
    ("benchmark", f"{BENCHMARK} --gin.LENGTHS=24", ["LENGTHS=24", "a list of a whole number"]),
    ("inspect_data", f"{INSPECT} --gin.NUM_ROWS=few", ["NUM_ROWS=few", "a whole number"]),
    # Numbers that cannot be.
    ("train", f"{FINETUNE} --gin.RANDOM_SEED=9223372036854775808", ["RANDOM_SEED", "64 bits"]),
    ("train", f"{FINETUNE} --gin.TRAIN_STEPS=1e30", ["TRAIN_STEPS=1e30", "64 bits"]),
    ("train", f"{FINETUNE} --gin.LEARNING_RATE=1e999", ["LEARNING_RATE", "too large"]),
    ("train", f"{FINETUNE} --gin.LEARNING_RATE=-1", ["LEARNING_RATE", "below 0"]),
    ("train", f"{FINETUNE} --gin.WARMUP_STEPS=-1", ["WARMUP_STEPS"]),
    ("train", f"{FINETUNE} --gin.LOSS_NORMALIZING_FACTOR=0", ["LOSS_NORMALIZING_FACTOR must be above 0"]),
    ("train", f"{FINETUNE} --gin.train.train.ema_decay=1.0", ["ema_decay must be in [0, 1)"]),
    ("train", f"{FINETUNE} --gin.train.train.hang_timeout=0", ["hang_timeout must be above 0"]),
    # Places that cannot be, settings that say nothing.
    ("train", f"{FINETUNE} --gin.MODEL_DIR=''", ["MODEL_DIR must be the path of a folder"]),
    ("train", f"{FINETUNE} --gin.MODEL_DIR=pairs.jsonl/run --dry_run", ["pairs.jsonl is a file", "another folder"]),
    ("train", f"{FINETUNE} --gin.USE_CACHED_TASKS=True", ["USE_CACHED_TASKS", "cache_tasks"]),
    ("train", f"{FINETUNE} --gin.TARGETS=''", ["TARGETS is empty"]),
    # Flags that change nothing.
    ("train", f"{FINETUNE} --gin.TRIAN_STEPS=5", ["--gin.TRIAN_STEPS=5", "Did you mean 'TRAIN_STEPS'?"]),
    ("train", f"{FINETUNE} --gin.NUM_STEPS=5", ["--gin.NUM_STEPS=5", "nothing in this configuration uses"]),
    ("train", f"{FINETUNE} --gin_file=decoding/masked.gin --gin.SundaeDecoder.num_steps=2", ["change nothing"]),
    ("train", f"{FINETUNE} --gin.schedules.rsqrt.value=2.0", ["rsqrt"]),
    ("train", f"{FINETUNE} --gin.best/SundaeDecoder.num_steps=2", ["it would change nothing", "best/"]),
    ("train", f"{QUICKSTART} --gin.NUM_DECODED_EXAMPLES=5", ["NUM_DECODED_EXAMPLES=5", "nothing"]),
    ("train", f"{QUICKSTART} --train_steps=5", ["--train_steps=5", "--gin.TRAIN_STEPS=5"]),
    ("train", f"{QUICKSTART} --gin.LORA_RANK=4", ["LORA_RANK", "runs/lora.gin"]),
    ("train", f"{FINETUNE} --gin.MIXTURE_OR_TASK_MODULE=my.tasks", ["MIXTURE_OR_TASK_MODULE", "--gin_allow=my"]),
    ("train", f"{FINETUNE} --gin_file=adaptation/block_growth.gin", ["it would change nothing", "objective is Sundae"]),
    ("train", f"{DISTIL} --gin_file=adaptation/annealed.gin", ["annealed.gin", "objective is Distillation"]),
    ("train", f"{DISTIL} --gin_file=adaptation/block_growth.gin", ["block_growth.gin", "objective is Distillation"]),
    # What is forgotten.
    (
        "train",
        f"--gin_file=models/decoder_only.gin --gin_file=objectives/sundae.gin --gin_file=decoding/sundae.gin "
        f"--gin_file=runs/finetune.gin {JSONL} --gin.INITIAL_CHECKPOINT_PATH=None {SHORT}",
        ["ModelConfig.embed_dim", "sizes/tiny.gin"],
    ),
    (
        "train",
        f"{MODEL} --gin_file=objectives/masked.gin --gin_file=runs/finetune.gin {JSONL} "
        f"--gin.INITIAL_CHECKPOINT_PATH=None {SHORT}",
        ["not set: DECODER", "decoding/masked.gin"],
    ),
    ("train", f"{MODEL} --gin_file=runs/pretrain.gin {JSONL} {SHORT}", ["not set: OBJECTIVE", "objectives/"]),
    ("train", OPEN, ["not set: MIXTURE_OR_TASK_NAME, TASK_FEATURE_LENGTHS", "tasks/"]),
    ("train", "", ["no --gin_file was given"]),
    ("infer", INFER, ["not set: CHECKPOINT_PATH", "--gin.CHECKPOINT_PATH=..."]),
    # Data and places.
    ("train", f'{FINETUNE} --gin.FILES={{"train":"pairs.jsonl"}}', ["'validation'", "HELD_OUT"]),
    ("train", f'{FINETUNE} --gin.FILES={{"train":"folder","validation":"folder"}}', ["is a folder", "folder/*"]),
    ("train", f'{FINETUNE} --gin.FILES={{"train":"*.json","validation":"pairs.jsonl"}}', ["*.json", "no file"]),
    ("train", f"{FINETUNE} --gin.FILES={{}}", ["FILES"]),
    ("train", f"{FINETUNE} --gin.NUM_SHOTS=-1", ["-1", "NUM_SHOTS"]),
    ("train", f"{FINETUNE} --gin.TASK_NAME=my-task", ["'my-task'", "'my_task'"]),
    ("train", f"{FINETUNE} --gin.INPUTS={{question}}", ["INPUTS"]),
    ("train", f"{FINETUNE} --gin.VOCABULARY_FILE=none.model", ["none.model", "--gin.VOCABULARY_FILE"]),
    ("train", f"{FINETUNE} --gin.BATCH_SIZE=0", ["batch size"]),
    ("train", f"{FINETUNE} --gin.TRAIN_STEPS=0", ["TRAIN_STEPS", "at least 1"]),
    ("train", f"{FINETUNE} --gin.EVAL_PERIOD=0", ["Periods.eval must be at least 1"]),
    ("train", f"{FINETUNE} --gin.INITIAL_CHECKPOINT_PATH=nowhere", ["nowhere"]),
    ("train", f"{QUICKSTART} --gin.WARMUP_STEPS=100", ["cannot warm up for 100", "WARMUP_STEPS"]),
    ("eval", f"{EVAL} --gin.CHECKPOINT_PATH=nowhere", ["nowhere"]),
    ("eval", "--predictions none.jsonl --task quickstart_pairs --gin_file=tasks/quickstart.gin", ["none.jsonl"]),
    ("generate", "", ["--checkpoint"]),
    ("generate", "--checkpoint nowhere --prompt x", ["nowhere"]),
    ("convert", "from_hf nowhere --output imported", ["nowhere"]),
    ("checkpoints", "verify nowhere", ["nowhere"]),
    ("lm_eval", f"{SUNDAE} --gin_file=runs/lm_eval.gin --tasks=arc_easy", ["not set: CHECKPOINT_PATH"]),
    # Gin files.
    ("train", f"--gin_file=circle.gin {QUICKSTART}", ["circle.gin includes itself"]),
    ("train", f"--gin_file=macros.gin {QUICKSTART}", ["macros.gin", "A = %B = %A"]),
    ("train", f"{QUICKSTART} --gin.TRAIN_STEPS=%EVAL_PERIOD --gin.EVAL_PERIOD=%TRAIN_STEPS", ["is circular"]),
    ("train", f"--gin_file=runs/fintune.gin {SHORT}", ["Did you mean 'runs/finetune.gin'"]),
    ("train", f"{FINETUNE} --gin_files=runs/finetune.gin", ["Did you mean '--gin_file'?"]),
    ("train", f"{FINETUNE} --gin.MODEL_DIR = made", ["equals sign"]),
]  # fmt: skip


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A user's working folder, with some data and gin files."""
    (tmp_path / "pairs.jsonl").write_text(PAIRS)
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "pairs.jsonl").write_text(PAIRS)
    (tmp_path / "circle.gin").write_text("include 'circle2.gin'\n")
    (tmp_path / "circle2.gin").write_text("include 'circle.gin'\n")
    (tmp_path / "macros.gin").write_text("A = %B\nB = %A\nEVAL_PERIOD = %A\n")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def outcome(verb, arguments, capsys):
    """The exit code of a verb, and what it says on stderr."""
    module = importlib.import_module(f"diffusion_t5x.{verb}")
    argv = arguments.split() if isinstance(arguments, str) else arguments
    code = 0
    try:
        if hasattr(module, "main"):
            module.main(argv)
        elif verb == "convert":
            with config.program():
                module.convert(argv)
        else:
            config.run(getattr(module, verb), argv)
    except SystemExit as stopped:
        code = stopped.code
    return code, capsys.readouterr().err


@pytest.mark.parametrize(
    ("verb", "arguments"),
    [
        ("train", "--num_processes=two"),
        ("convert", "from_t5x x --output=y --max_distance far"),
        ("report", "x --example a"),
    ],
)
def test_a_flag_that_is_spelled_right_is_not_suggested(verb, arguments, folder, capsys):
    code, said = outcome(verb, arguments, capsys)
    assert code == 2 and "invalid int value" in said and "Did you mean" not in said, said


@pytest.mark.parametrize(("verb", "arguments", "expected"), MISTAKES, ids=range(len(MISTAKES)))
def test_a_mistake_ends_in_one_line(verb, arguments, expected, folder, capsys):
    code, said = outcome(verb, arguments, capsys)
    assert code == 2, said
    errors = [line for line in said.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and said.rstrip().endswith(errors[0]) and "Traceback" not in said, said
    assert all(part in errors[0] for part in expected), errors[0]
    assert not (folder / "made").exists()


# SeqIO and TensorFlow take seconds to import.
BEFORE_SEQIO = [
    f"{FINETUNE} --gin.TRAIN_STEPS=abc",
    f"{FINETUNE} --gin.TASK_FEATURE_LENGTHS=32",
    f"{FINETUNE} --gin.NUM_STEPS=5",
    f"{FINETUNE} --gin.TASK_NAME=my-task",
    f"{FINETUNE} --gin.VOCABULARY_FILE=none.model",
    f"{FINETUNE} --gin.INPUTS={{question}}",
    f"{FINETUNE} --gin.TRAIN_STEPS=0",
    f"{FINETUNE} --gin.BATCH_SIZE=0",
    f"{FINETUNE} --gin.USE_CACHED_TASKS=True",
    f"{FINETUNE} --gin.INITIAL_CHECKPOINT_PATH=nowhere",
    f'{FINETUNE} --gin.FILES={{"train":"pairs.jsonl"}}',
    f'{FINETUNE} --gin.FILES={{"train":"*.json","validation":"pairs.jsonl"}}',
    f"{QUICKSTART} --gin.WARMUP_STEPS=100",
    f"{QUICKSTART} --gin.MODEL_DIR=7",
]


def test_mistakes_are_found_before_seqio_and_tensorflow_are_imported(folder):
    (*_, imported), said = run("train", BEFORE_SEQIO, (2,), folder)
    assert imported == "" and said.count("error: ") == len(BEFORE_SEQIO)
