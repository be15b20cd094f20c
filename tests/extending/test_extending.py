"""docs/extending.md: its files are these, its commands resolve, and its files train, decode and generate."""

import pathlib
import re
import shlex
import sys

import pytest
from pages import by_module
from untrained import LENGTHS, SIZE

from diffusion_t5x import eval as evaluation
from diffusion_t5x import generate, infer, train
from diffusion_t5x.command_line import config

HERE = pathlib.Path(__file__).parent
PAGE = (HERE.parent.parent / "docs" / "extending.md").read_text(encoding="utf-8")
COMMANDS = re.findall(r"python -m (diffusion_t5x\.[^\n]+)", by_module(PAGE))


@pytest.mark.parametrize("name", ["my_remasking.py", "my_remasking.gin", "my_objective.py", "my_objective.gin"])
def test_the_page_shows_the_file_that_is_tested(name):
    assert f"# {name}\n{(HERE / name).read_text(encoding='utf-8')}```" in PAGE


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_of_the_page_resolves(command, capsys, monkeypatch):
    monkeypatch.chdir(HERE)
    module, *flags = shlex.split(command)
    sys.modules[module].main([*flags, "--print_config"])
    printed = capsys.readouterr()
    assert "RemaskingDecoder.num_steps = 32" in printed.out and not printed.err


@pytest.mark.slow
def test_every_verb_takes_them(tmp_path, monkeypatch, capsys):
    """One step of training with what the model writes in it; then evaluation, infilling and `generate`."""
    monkeypatch.chdir(HERE)
    files = {split: f"{tmp_path}/{split}.jsonl" for split in ("train", "validation")}
    for file in files.values():
        pathlib.Path(file).write_text('{"inputs": "a", "targets": "b"}\n' * 8)
    (tmp_path / "holes.jsonl").write_text('{"inputs": "a", "template": "b<hole:4>c"}\n')
    model = ["models/decoder_only.gin", "sizes/tiny.gin", "my_objective.gin", "my_remasking.gin"]
    allow = ["--gin_allow=my_objective", "--gin_allow=my_remasking"]

    def flags(run, **macros):
        macros |= {"VOCABULARY_FILE": None, "FILES": files, "BATCH_SIZE": 8}
        return [
            *allow,
            *(f"--gin_file={file}" for file in [*model, f"runs/{run}.gin", "tasks/local_jsonl.gin"]),
            *(f"--gin.ModelConfig.{name}={value}" for name, value in SIZE.items()),
            *(f"--gin.{name}={value!r}" for name, value in macros.items()),
            f"--gin.TASK_FEATURE_LENGTHS={LENGTHS}",
        ]

    folder = f"{tmp_path}/model"
    config.run(train.train, flags("finetune", MODEL_DIR=folder, TRAIN_STEPS=1, INITIAL_CHECKPOINT_PATH=None))
    assert (tmp_path / "model" / "inference_eval").is_dir()
    evaluation.main(flags("eval", SPLIT="validation", CHECKPOINT_PATH=folder, EVAL_OUTPUT_DIR=f"{tmp_path}/scores"))
    assert (tmp_path / "scores" / "results.json").exists()
    infill = flags("infer", SPLIT="validation", CHECKPOINT_PATH=folder, INFER_OUTPUT_DIR=f"{tmp_path}/filled")
    infer.main(["--templates", f"{tmp_path}/holes.jsonl", *infill])
    (filled,) = (tmp_path / "filled").glob("*.jsonl")
    assert '"template": "b<hole:4>c"' in filled.read_text()
    capsys.readouterr()
    generate.main(["--checkpoint", folder, "--prompt", "a", *allow])
    assert "RemaskingDecoder(num_steps=32" in capsys.readouterr().err
