"""On-policy distillation through the verbs: a real model imported, its stories, a student, the teacher's verdict."""

import json
import os
import signal
import threading
import time

import numpy as np
import pytest

from diffusion_t5x import convert, infer, train
from diffusion_t5x import eval as evaluation
from diffusion_t5x.command_line import config

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def teacher(test_data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("distil") / "teacher"
    files = [str(test_data / "stories260k" / name) for name in ("stories260K.bin", "tok512.bin")]
    convert.convert(["from_llama2c", files[0], "--tokenizer", files[1], "--output", str(folder)])
    return folder


@pytest.fixture(scope="module")
def samples(teacher):
    """Forty stories, by a command as docs/distillation.md has it."""
    prompts = teacher.parent / "none.txt"
    prompts.write_text("\n" * 40)
    files = ["hardware/cpu.gin", "decoding/autoregressive.gin", "runs/infer.gin", "tasks/stories.gin"]
    flags = [f"--gin_file={teacher}/model.gin", *(f"--gin_file={file}" for file in files)]
    settings = {
        "CHECKPOINT_PATH": teacher,
        "INFER_OUTPUT_DIR": teacher.parent / "samples",
        "TEXT_FILE": prompts,
        "BATCH_SIZE": 40,
        "TASK_FEATURE_LENGTHS": '{"inputs": 1, "targets": 40}',
        "autoregressive_decoding.AutoregressiveDecoder.temperature": 1.0,
    }
    config.run(infer.infer, flags + [f"--gin.{name}={value}" for name, value in settings.items()])
    return teacher.parent / "samples" / "stories_prompts-test.jsonl"


def flags_of(recipe, teacher, samples, **settings):
    settings = {
        "SAMPLES_FILE": samples,
        "BATCH_SIZE": 4,
        "TASK_FEATURE_LENGTHS": '{"inputs": 16, "targets": 16}',
    } | settings
    flags = [f"--gin_file=recipes/opdlm/{recipe}.gin", f"--gin_file={teacher}/model.gin"]
    flags += ["--gin.stories.continuations.num_test=6", "--gin.stories.continuations.num_validation=4"]
    return flags + [f"--gin.{name}={value}" for name, value in settings.items()]


def distil(model_dir, teacher, samples, steps, *more):
    flags = flags_of(
        "stories260k", teacher, samples, MODEL_DIR=model_dir, INITIAL_CHECKPOINT_PATH=teacher, TRAIN_STEPS=7
    )
    flags += ["--gin.MIN_ROLLOUT_LENGTH=8", "--gin.MAX_ROLLOUT_LENGTH=16", "--gin.schedules.cosine.warmup_steps=2"]
    flags += ["--gin.Rollout.num_batches=4", "--gin.GROWTH_ROLLOUTS=2", "--gin.Periods.log=1", *more]
    config.run(train.train, [*flags, "--gin.Periods.save=3", f"--gin.train.train.train_steps={steps}"])
    return [json.loads(line) for line in (model_dir / "train" / "metrics.jsonl").read_text().splitlines()]


def tell_to_stop_after_two_steps(model_dir):
    metrics = model_dir / "train" / "metrics.jsonl"
    deadline = time.monotonic() + 240
    while (not metrics.exists() or metrics.read_text().count("\n") < 2) and time.monotonic() < deadline:
        time.sleep(0.005)
    os.kill(os.getpid(), signal.SIGTERM)


def test_a_run_resumed_among_texts_that_it_wrote_goes_on_the_same(teacher, samples, tmp_path):
    """Four batches a rollout, a checkpoint after three: one text is left over, and it is in the checkpoint."""
    whole = distil(tmp_path / "whole", teacher, samples, 7)
    distil(tmp_path / "parts", teacher, samples, 3)
    parts = distil(tmp_path / "parts", teacher, samples, 7)
    for name in ("loss", "teacher_nll", "text_length", "gradient_norm"):
        np.testing.assert_allclose([x[name] for x in parts], [x[name] for x in whole], rtol=1e-6)
    assert [x["text_length"] for x in whole] == [12] * 4 + [16] * 3  # one length for each rollout

    told = threading.Thread(target=tell_to_stop_after_two_steps, args=(tmp_path / "told",))
    usual = signal.signal(signal.SIGTERM, signal.SIG_IGN)  # were it too late, it would end the tests
    try:
        told.start()
        with pytest.raises(SystemExit) as stopped:
            distil(tmp_path / "told", teacher, samples, 7)
        assert stopped.value.code == 75
    finally:
        told.join()
        signal.signal(signal.SIGTERM, usual)
    again = distil(tmp_path / "told", teacher, samples, 7)
    np.testing.assert_allclose([x["loss"] for x in again], [x["loss"] for x in whole], rtol=1e-6)

    before = json.loads((tmp_path / "whole" / "inference_eval" / "stories_continuations" / "metrics.jsonl").read_text())
    assert {"teacher_nll", "teacher_agreement", "tokens_per_step", "distinct_2"} <= before.keys()

    scores = tmp_path / "scores"
    evaluation_flags = flags_of(
        "eval_stories260k",
        teacher,
        samples,
        TEACHER_CHECKPOINT_PATH=teacher,
        CHECKPOINT_PATH=tmp_path / "whole",
        EVAL_OUTPUT_DIR=scores,
    )
    config.run(evaluation.evaluate, evaluation_flags)
    results = json.loads((scores / "results.json").read_text())["results"]["stories_continuations"]
    assert 1 < results["teacher_nll"] < 12 and 0 < results["teacher_agreement"] < 1
    assert results["tokens_per_step"] == pytest.approx(4 / 5)  # four steps a block of four, and one for the cache


@pytest.mark.parametrize(
    "ablation,metric",
    [
        (['--gin.STATES="random"'], "divergence"),
        (['--gin.STATES="random"', "--gin.ROLLOUT=None"], "divergence"),
        (["--gin_file=objectives/block.gin", "--gin.ROLLOUT=None"], "nll_bound"),
        (["--gin_file=objectives/block_sft.gin", "--gin.ROLLOUT=None"], "nll"),
        (["--gin.DATA_SHARE=0.5", "--gin.Rollout.passes=2", '--gin.Distillation.teacher_fill="argmax"'], "divergence"),
    ],
)
def test_the_papers_comparisons_are_flags(teacher, samples, tmp_path, ablation, metric):
    lines = distil(tmp_path / "model", teacher, samples, 3, *ablation)
    assert len(lines) == 3 and lines[0][metric] > 0


@pytest.mark.parametrize(
    "flags,message",
    [
        (["--gin.TEACHER_CHECKPOINT_PATH=None"], "needs a teacher"),
        (["--gin.TEACHER_CHECKPOINT_PATH=/no/such"], "No checkpoint at /no/such"),
        (["--gin.ROLLOUT=None"], "needs texts that the model writes"),
        (["--gin_file=objectives/block.gin"], "A rollout needs an objective that learns"),
        (["--gin.Distillation.block_size=2"], "writes blocks of 4, but Distillation has blocks of 2"),
        (["--gin.Distillation.blocks_from='row'"], 'has blocks_from = "targets", but Distillation has "row"'),
        (["--gin.MAX_ROLLOUT_LENGTH=600"], "max_length is 512"),
    ],
)
def test_mistakes(teacher, samples, tmp_path, capsys, flags, message):
    with pytest.raises(SystemExit):
        distil(tmp_path / "model", teacher, samples, 3, *flags)
    assert message in capsys.readouterr().err
    assert not (tmp_path / "model" / "checkpoints").exists()


def test_published_settings_can_be_dry_run(tmp_path, capsys):
    ids = tmp_path / "ids.jsonl"
    ids.write_text('{"inputs": [9707, 11, 1879]}\n')
    flags = ["--gin_file=recipes/opdlm/qwen3_8b.gin", f"--gin.MODEL_DIR={tmp_path / 'model'}", "--gin.TRAIN_STEPS=1000"]
    flags += [f"--gin.PROMPTS_FILE={ids}", f"--gin.VALIDATION_FILE={ids}", "--gin.INITIAL_CHECKPOINT_PATH=None"]
    config.run(train.train, [*flags, "--dry_run"])
    assert "8,190,735,360 parameters" in capsys.readouterr().out
