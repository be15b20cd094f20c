"""Every reader with `--checkpoint` alone, and what is refused, on tiny runs that `train` left."""

import json
import pathlib
import re
import shutil

import pytest

from diffusion_t5x import benchmark, generate, infer, inspect_data, report, train
from diffusion_t5x import eval as evaluation
from diffusion_t5x.checkpointing import checkpoints, manifest
from diffusion_t5x.command_line import config

pytest.importorskip("seqio")
from untrained import LENGTHS, RUN, SIZE

MINE = """
import dataclasses

from diffusion_t5x.decoding.masked import MaskedDecoder
from diffusion_t5x.objectives.masked import Masked


@dataclasses.dataclass(frozen=True)
class MyObjective(Masked):
    strength: float = 0.5


@dataclasses.dataclass(frozen=True)
class MyDecoder(MaskedDecoder):
    patience: int = 3
"""
EXPERTS_GIN = """
from __gin__ import dynamic_registration
from diffusion_t5x.models import config
from diffusion_t5x.models import experts

config.ModelConfig.experts = @experts.Experts()
experts.Experts:
  number = 4
  per_token = 2
  mlp_dim = 8
"""
MINE_GIN = """
from __gin__ import dynamic_registration
import {module}

CANVAS = True
OBJECTIVE = @{module}.MyObjective()
{module}.MyObjective.strength = 0.25
DECODER = @{module}.MyDecoder()
{module}.MyDecoder:
  patience = 7
  num_steps = 2
"""


def flags(folder, *files, **macros):
    """Flags of a run of one step on a few lines."""
    names = ["models/decoder_only.gin", "sizes/tiny.gin", *files, "runs/finetune.gin", "tasks/local_jsonl.gin"]
    data = {split: f"{folder}/lines.jsonl" for split in ("train", "validation", "test")}
    macros = {"MODEL_DIR": str(folder / "run"), "FILES": data, "BATCH_SIZE": 4} | macros
    return [
        *(f"--gin_file={name}" for name in names),
        *(f"--gin.ModelConfig.{name}={value}" for name, value in SIZE.items()),
        *(flag for flag in RUN if "MODEL_DIR" not in flag and "FILES" not in flag),
        *("--gin.train.train.loss_evals=()", f"--gin.TASK_FEATURE_LENGTHS={LENGTHS}"),
        *("--gin.NUM_DECODED_EXAMPLES=2", '--gin.train.train.metric_writers=["jsonl"]'),
        *(f"--gin.{name}={value!r}" for name, value in macros.items()),
    ]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = tmp_path_factory.mktemp("from_checkpoint")
    (made / "lines.jsonl").write_text(
        "".join(json.dumps({"inputs": f"{n}", "targets": f"{n + 1}"}) + "\n" for n in range(8))
    )
    return made


@pytest.fixture(scope="module")
def block(folder):
    """A run of block diffusion in blocks of 3, after one step."""
    config.run(train.train, flags(folder, "objectives/block.gin", "decoding/block.gin", BLOCK_SIZE=3))
    return folder / "run"


@pytest.fixture
def refused(capsys):
    def refused(verb, *arguments):
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            verb(list(map(str, arguments)))
        message = capsys.readouterr().err
        assert ended.value.code == 2 and "Traceback" not in message
        return message

    return refused


def run_train(arguments):
    config.run(train.train, arguments)


def test_the_record_of_a_training(block):
    record = checkpoints.open_checkpoint(block).record
    assert record.objective["class"] == "diffusion_t5x.objectives.block.Block" and record.objective["block_size"] == 3
    assert [(mode.attention, mode.block_size, mode.noise) for mode in record.modes] == [("block_causal", 3, "mask")]
    assert record.decoder["class"].endswith(".BlockDecoder") and record.decoder["inner"]["num_steps"] == 4
    assert record.shifted is False and record.model["embed_dim"] == 16 and record.lora is None
    assert record.vocabulary_source == {"file": None, "extra_ids": 100} and record.inputs_end is True
    assert record.dataset["task_feature_lengths"] == json.loads(LENGTHS) and record.dataset["canvas"] is True
    assert record.dataset["mixture_or_task_name"] == "local" and record.versions["jax"]
    assert record.task["bindings"]["TASK_NAME"] == "local"


def test_eval(block):
    evaluation.main(["--checkpoint", str(block)])
    results = json.loads((block / "eval" / "checkpoint_1" / "results.json").read_text())
    (settings,) = results["settings"]["evaluations"]
    assert settings["decoder"]["block_size"] == 3 and results["results"]["local"]["num_examples"] == 8
    assert results["training_objective"] == "Block"


def test_eval_of_all_checkpoints(block, tmp_path, capsys):
    run = shutil.copytree(block, tmp_path / "run")
    shutil.rmtree(run / "eval", ignore_errors=True)
    evaluation.main(["--checkpoint", str(run), "--gin.ALL_CHECKPOINTS=True", "--dry_run"])
    assert f"{run}/eval: 0 of 1 checkpoints are already evaluated" in capsys.readouterr().err
    evaluation.main(["--checkpoint", str(run), "--dry_run", "--print_config"])
    assert f"CHECKPOINT_PATH = '{run}'" in capsys.readouterr().out


def test_eval_of_likelihood_with_a_run_file(block, capsys):
    evaluation.main(["--checkpoint", str(block), "--gin_file=runs/eval_likelihood.gin", "--dry_run"])
    assert "LikelihoodEval(" in (printed := capsys.readouterr().out) and "canvas=True" in printed


def test_a_search_of_times_with_a_run_file(block, capsys):
    evaluation.main(["--checkpoint", str(block), "--gin_file=runs/search_times.gin", "--dry_run"])
    assert "TimesEval(" in (printed := capsys.readouterr().out) and "num_draws=8" in printed


def test_infer_and_its_score(block, capsys):
    infer.main(["--checkpoint", str(block), "--gin.NUM_DECODED_EXAMPLES=2", "--gin.INFER_OUTPUT_DIR=None"])
    lines = (block / "infer" / "checkpoint_1" / "local-test.jsonl").read_text().splitlines()
    assert len(lines) == 2
    infer.main(["--checkpoint", str(block), "--gin_file=runs/infer_score.gin", "--dry_run"])
    assert "Would score local-test-score with" in capsys.readouterr().out


def test_generate(block, capsys):
    generate.main(["--checkpoint", str(block), "--prompt", "7"])
    assert "BlockDecoder(block_size=3, " in capsys.readouterr().err


@pytest.mark.slow
def test_generate_with_experts(folder, capsys):
    (folder / "experts.gin").write_text(EXPERTS_GIN)
    files = ("objectives/block.gin", "decoding/block.gin", str(folder / "experts.gin"))
    config.run(train.train, flags(folder, *files, BLOCK_SIZE=3, MODEL_DIR=str(folder / "experts")))
    capsys.readouterr()
    generate.main(["--checkpoint", str(folder / "experts"), "--prompt", "3", "--length", "6"])
    assert "BlockDecoder(block_size=3, " in capsys.readouterr().err


def test_inspect_data(block, capsys):
    inspect_data.main(["--checkpoint", str(block), "--gin.NUM_ROWS=1"])
    printed = capsys.readouterr().out
    assert (
        "Block(block_size=3" in printed
        and "4 rows, 4 examples" in printed
        and "task local, split train" in " ".join(printed.split())
    )


def test_benchmark(block, capsys):
    benchmark.main(["decode", "--checkpoint", str(block), "--dry_run"])
    printed = capsys.readouterr().out
    assert "BlockDecoder" in printed or "Would time decoder" in printed
    assert "Lengths [12]" in printed and f"{block}/benchmark/decode_time.json" in printed


def test_report(block, tmp_path, capsys):
    evaluation.main(["--checkpoint", str(block)])
    report.main(["--checkpoint", str(block), "--output", str(tmp_path / "page.html")])
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert "BlockDecoder(block_size=3, " in page


@pytest.mark.slow
def test_a_module_of_a_user(folder, tmp_path, monkeypatch, capsys, refused):
    """Objective and decoder of their own are in the record, with all fields, and trusted where they are allowed."""
    module = f"mine_{tmp_path.name.replace('-', '_')}"
    (tmp_path / f"{module}.py").write_text(MINE)
    (tmp_path / "mine.gin").write_text(MINE_GIN.format(module=module))
    monkeypatch.syspath_prepend(str(tmp_path))
    allow = f"--gin_allow={module}"
    run_train([*flags(folder, str(tmp_path / "mine.gin"), MODEL_DIR=str(tmp_path / "run")), allow])
    record = checkpoints.open_checkpoint(tmp_path / "run").record
    assert record.objective["class"] == f"{module}.MyObjective" and record.objective["strength"] == 0.25
    assert record.decoder["patience"] == 7 and record.decoder["num_steps"] == 2
    evaluation.main(["--checkpoint", str(tmp_path / "run"), allow, "--dry_run"])
    assert re.search(r"MyDecoder\([^)]*num_steps=2", capsys.readouterr().out)
    message = refused(evaluation.main, "--checkpoint", tmp_path / "run", "--dry_run")
    assert f"imports {module}" in message and f"--gin_allow={module}" in message


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["--gin_file=decoding/masked.gin"], "Give --gin_file=decoding/block.gin --gin.BLOCK_SIZE=3."),
        (["--gin_file=decoding/autoregressive.gin"], "Give --gin_file=decoding/block.gin --gin.BLOCK_SIZE=3."),
        (["--gin.BLOCK_SIZE=8"], "Set --gin.BLOCK_SIZE=3."),
        (["--gin.BLOCKS_FROM='row'"], "Set --gin.BLOCK_SIZE=3 --gin.BLOCKS_FROM='\"targets\"'."),
        (["--gin_file=decoding/block.gin"], "Set --gin.BLOCK_SIZE=3."),
        (["--gin.ModelConfig.activation=silu"], "ModelConfig.activation = 'gelu' (here 'silu'). Set the same."),
        (["--gin_file=adaptation/shifted.gin"], "ModelConfig.shifted = False; here it is True."),
        (["--gin_file=sizes/base.gin"], "embed_dim = 16 (here 768)"),
    ],
)
def test_readers_refuse_what_was_not_trained(given, said, block, refused):
    for verb, more in ((evaluation.main, ["--dry_run"]), (infer.main, ["--dry_run"]), (generate.main, ["--prompt=a"])):
        message = refused(verb, "--checkpoint", block, *given, *more)
        assert said in message and message.count("error: ") == 1 and "Traceback" not in message
        assert ("allow_mismatch=True" in message) == ("embed_dim" not in said)


def test_a_mismatch_may_be_allowed(block, tmp_path, capsys):
    allowed = ["--gin.infer.infer.allow_mismatch=True", "--gin.BLOCK_SIZE=8", "--dry_run"]
    allowed.append(f"--gin.INFER_OUTPUT_DIR={tmp_path}")
    infer.main(["--checkpoint", str(block), *allowed])
    output = capsys.readouterr()
    assert "Set --gin.BLOCK_SIZE=3." in output.err and "BlockDecoder(block_size=8" in output.out


@pytest.mark.slow
def test_a_run_goes_on_as_it_was_trained(block, folder, tmp_path, capsys, refused):
    run = shutil.copytree(block, tmp_path / "run")
    again = flags(folder, "objectives/block.gin", "decoding/block.gin", MODEL_DIR=str(run), BLOCK_SIZE=3, TRAIN_STEPS=2)
    other = flags(folder, "objectives/masked.gin", "decoding/masked.gin", MODEL_DIR=str(run), TRAIN_STEPS=2)
    before = (run / "config.gin").read_text(encoding="utf-8")
    for given, said in (
        (
            other,
            "was trained by Block (masked tokens in blocks of 3, block-causal attention), but here train.objective",
        ),
        ([*again, "--gin.BLOCK_SIZE=4"], "but here train.objective is Block (masked tokens in blocks of 4"),
        ([*again, "--gin.ModelConfig.activation=silu"], "ModelConfig.activation = 'gelu' (here 'silu')"),
        ([*again, "--gin.ModelConfig.attention_scale=0.5"], "ModelConfig.attention_scale = 1.0 (here 0.5)"),
        ([*again, "--gin.ModelConfig.mlp_dim=64"], "ModelConfig.mlp_dim = 32 (here 64). Set the same."),
        (
            [*again, "--gin_file=decoding/sundae.gin"],
            "train.objective: the model is trained for masked tokens in blocks",
        ),
    ):
        message = refused(run_train, *given, "--dry_run")
        assert said in message and message.count("error: ") == 1 and "Traceback" not in message
    assert (run / "config.gin").read_text(encoding="utf-8") == before
    run_train([*again, "--gin.EVAL_PERIOD=5"])
    log = capsys.readouterr().err
    assert "the configuration changed at step 1; the earlier one is" in log
    assert "- TRAIN_STEPS = 1" in log and "+ TRAIN_STEPS = 2" in log and "+ EVAL_PERIOD = 5" in log
    assert (run / "config_1.gin").read_text(encoding="utf-8") == before
    assert "TRAIN_STEPS = 2" in (run / "config.gin").read_text(encoding="utf-8")
    assert checkpoints.open_checkpoint(run).metadata["step"] == 2


def test_another_objective_may_start_from_an_autoregressive_model_and_a_teacher_is_one(
    block, folder, tmp_path, refused
):
    start = ["objectives/masked.gin", "decoding/masked.gin"]
    from_block = {"MODEL_DIR": str(tmp_path / "run"), "INITIAL_CHECKPOINT_PATH": str(block)}
    run_train([*flags(folder, *start, **from_block), "--dry_run"])
    message = refused(run_train, *flags(folder, *start, **from_block), "--gin.ModelConfig.activation=silu", "--dry_run")
    assert "ModelConfig.activation = 'gelu' (here 'silu')" in message
    teacher = f"--gin.train.train.teacher_checkpoint_path={block}"
    message = refused(run_train, *flags(folder, *start, MODEL_DIR=str(tmp_path / "taught")), teacher)
    assert f"The teacher's checkpoint: {block}" in message and "Set TEACHER_CHECKPOINT_PATH to an autoreg" in message


def test_an_evaluation_parses_and_hashes_each_file_once(block, tmp_path, monkeypatch):
    run = shutil.copytree(block, tmp_path / "run")
    shutil.rmtree(run / "eval", ignore_errors=True)
    parsed, hashed = [], []
    read, state = manifest.read, manifest._state
    monkeypatch.setattr(manifest, "read", lambda folder: parsed.append(folder) or read(folder))
    monkeypatch.setattr(manifest, "_state", lambda path, *more: hashed.append(pathlib.Path(path)) or state(path, *more))
    evaluation.main(["--checkpoint", str(run), "--dry_run"])
    # Twice: to find what the flags mean, and to evaluate.
    assert len(parsed) <= 2 and max(map(hashed.count, hashed)) <= 2
    opened = checkpoints.open_checkpoint(run)
    parsed.clear()
    hashed.clear()
    assert opened.record and opened.metadata is opened.metadata
    for _ in range(2):
        opened.verify("state")
    assert len(parsed) == 1 and max(map(hashed.count, hashed)) == 1
