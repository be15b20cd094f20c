"""The verbs as users run them: train, kill, resume, adapt, fine-tune, evaluate, infer; and every mistake."""

import json
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import orbax.checkpoint as ocp
import pytest
from flax.traverse_util import flatten_dict

from diffusion_t5x import config, infer, train
from diffusion_t5x import eval as evaluation
from diffusion_t5x.data.seqio_source import SeqioDataset
from diffusion_t5x.evaluation.report import write_report
from diffusion_t5x.evaluation.runs import read_runs
from diffusion_t5x.training import checkpoints, manifest
from diffusion_t5x.training.lock import FILE as LOCK
from diffusion_t5x.training.lock import locked

TINY = [
    "--gin.ModelConfig.embed_dim=16",
    "--gin.ModelConfig.num_layers=2",
    "--gin.ModelConfig.num_heads=2",
    "--gin.ModelConfig.head_dim=8",
    "--gin.ModelConfig.mlp_dim=32",
    "--gin.ModelConfig.scan_unroll=1",
]
PRETRAIN = [
    "--gin_file=recipes/quickstart/pretrain_ar.gin",
    *TINY,
    "--gin.BATCH_SIZE=8",
    "--gin.WARMUP_STEPS=2",
    "--gin.EVAL_STEPS=1",
    "--gin.TRAIN_STEPS=20",
    "--gin.Periods.log=1",
    "--gin.Periods.save=5",
]
MODELS = ["--gin_file=models/decoder_only.gin", "--gin_file=sizes/tiny.gin", "--gin_file=tasks/quickstart.gin"]
TASK = [
    "--gin.MIXTURE_OR_TASK_NAME=quickstart_pairs",
    '--gin.TASK_FEATURE_LENGTHS={"inputs": 24, "targets": 24}',
    "--gin.BATCH_SIZE=8",
]
FINETUNE = [
    *MODELS,
    "--gin_file=objectives/sundae.gin",
    "--gin_file=decoding/sundae.gin",
    "--gin_file=runs/finetune.gin",
    *TASK,
    *TINY,
    "--gin.TRAIN_STEPS=3",
    "--gin.EVAL_STEPS=1",
    "--gin.NUM_DECODED_EXAMPLES=8",
]

KEEP_THREE = """
from __gin__ import dynamic_registration
from diffusion_t5x import train

train.train.checkpoint_policy = @train.CheckpointPolicy()
train.CheckpointPolicy.keep_last = 3
"""
TWO_TASKS = """
from __gin__ import dynamic_registration
from diffusion_t5x import eval as eval_script
from diffusion_t5x.data import seqio_source
from diffusion_t5x.evaluation import evaluator

eval_script.evaluate.decode_evals = [@pairs/evaluator.DecodeEval(), @stdlib/evaluator.DecodeEval()]

pairs/evaluator.DecodeEval.dataset = @pairs/seqio_source.SeqioDataset()
pairs/seqio_source.SeqioDataset:
  mixture_or_task_name = "quickstart_pairs"
  task_feature_lengths = {"inputs": 24, "targets": 24}

stdlib/evaluator.DecodeEval.dataset = @stdlib/seqio_source.SeqioDataset()
stdlib/seqio_source.SeqioDataset:
  mixture_or_task_name = "quickstart_corpus_prefix_lm"
  task_feature_lengths = {"inputs": 64, "targets": 32}
  split = "validation"
"""


def steps(model_dir: pathlib.Path) -> list[dict]:
    return [json.loads(line) for line in (model_dir / "train" / "metrics.jsonl").read_text().splitlines()]


def arrays(model_dir: pathlib.Path) -> dict[str, np.ndarray]:
    """Every array of the latest checkpoint, as stored."""
    state = ocp.PyTreeCheckpointer().restore(checkpoints.find_checkpoint(str(model_dir)) / "state")
    return {"/".join(path): np.asarray(leaf) for path, leaf in flatten_dict(state).items()}


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory) -> pathlib.Path:
    """A run of 20 steps that nothing disturbs."""
    folder = tmp_path_factory.mktemp("verbs")
    (folder / "keep.gin").write_text(KEEP_THREE)
    model_dir = folder / "pretrained"
    config.run(train.train, [*PRETRAIN, f"--gin_file={folder / 'keep.gin'}", f"--gin.MODEL_DIR={model_dir}"])
    return model_dir


@pytest.fixture(scope="module")
def finetuned(pretrained) -> pathlib.Path:
    model_dir = pretrained.parent / "finetuned"
    config.run(train.train, [*FINETUNE, f"--gin.MODEL_DIR={model_dir}", f"--gin.INITIAL_CHECKPOINT_PATH={pretrained}"])
    return model_dir


def test_a_run_leaves_what_t5x_users_expect(pretrained, finetuned):
    assert (pretrained / "config.gin").read_text().count("TRAIN_STEPS = 20") == 1
    assert "params" not in (pretrained / "model-info.txt").read_text().splitlines()[0]
    assert [line["step"] for line in steps(pretrained)] == list(range(1, 21))
    assert steps(pretrained)[-1]["loss"] < steps(pretrained)[0]["loss"]
    assert list((pretrained / "train").glob("events*"))
    assert (pretrained / "training_eval" / "quickstart_pretrain" / "metrics.jsonl").exists()
    scores = json.loads((finetuned / "inference_eval" / "quickstart_pairs" / "metrics.jsonl").read_text())
    assert scores["step"] == 3 and 0 <= scores["exact_match"] <= 100
    assert (
        len((finetuned / "inference_eval" / "quickstart_pairs" / "predictions_3.jsonl").read_text().splitlines()) == 8
    )


def test_the_resolved_config_repeats_the_run(pretrained, tmp_path):
    flags = [f"--gin_file={pretrained / 'config.gin'}", f"--gin.MODEL_DIR={tmp_path}", "--gin.TRAIN_STEPS=20"]
    config.run(train.train, flags)
    assert [line["loss"] for line in steps(tmp_path)] == [line["loss"] for line in steps(pretrained)]


@pytest.mark.slow
def test_a_run_killed_and_started_again_is_the_undisturbed_run_bit_for_bit(pretrained, tmp_path):
    command = [sys.executable, "-m", "diffusion_t5x.train", *PRETRAIN, f"--gin.MODEL_DIR={tmp_path}"]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 600
    try:
        while not list(tmp_path.glob("checkpoints/checkpoint_1[05]")):
            assert process.poll() is None, "the run ended before it could be killed"
            assert time.monotonic() < deadline
            time.sleep(0.05)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    done = checkpoints.latest(str(tmp_path / "checkpoints"))
    again = subprocess.run(command, capture_output=True, text=True, check=True)
    assert f"resuming from {done}" in again.stderr
    # The same examples with the same noise give the same losses; each step shows once.
    assert [(line["step"], line["loss"]) for line in steps(tmp_path)] == [
        (line["step"], line["loss"]) for line in steps(pretrained)
    ]
    undisturbed, resumed = arrays(pretrained), arrays(tmp_path)
    assert undisturbed.keys() == resumed.keys() and len(undisturbed) > 20
    for name, array in undisturbed.items():
        np.testing.assert_array_equal(array, resumed[name], err_msg=name)


def test_a_finished_run_started_again_does_nothing(pretrained):
    def times():
        return {path: path.stat().st_mtime_ns for path in pretrained.rglob("*") if path.is_file() and path.name != LOCK}

    before = times()
    config.run(train.train, [*PRETRAIN, f"--gin.MODEL_DIR={pretrained}"])
    assert times() == before


@pytest.mark.slow
def test_a_broken_newest_checkpoint_stops_a_run_unless_an_older_one_is_allowed(pretrained, tmp_path, capsys):
    model_dir = shutil.copytree(pretrained, tmp_path / "model")
    (model_dir / LOCK).unlink()
    file = next(path for path in (model_dir / "checkpoints/checkpoint_20/state/d").iterdir())
    os.truncate(file, file.stat().st_size - 1)
    before = sorted((path, path.stat().st_mtime_ns) for path in model_dir.rglob("*") if path.is_file())
    flags = [*PRETRAIN, f"--gin.MODEL_DIR={model_dir}", "--gin.Periods.save=100", "--gin.Periods.eval=None"]
    with pytest.raises(SystemExit) as stopped:
        config.run(train.train, [*flags, "--gin.TRAIN_STEPS=22"])
    message = capsys.readouterr().err
    assert stopped.value.code == 2 and f"checkpoint_20 is broken: state/d/{file.name} has" in message
    assert "newest whole one beside it is" in message and "checkpoint_15" in message
    (model_dir / LOCK).unlink()
    assert sorted((path, path.stat().st_mtime_ns) for path in model_dir.rglob("*") if path.is_file()) == before

    flags += ["--gin.train.train.allow_older_checkpoint=True", "--gin.TRAIN_STEPS=20"]
    config.run(train.train, [*flags])
    assert f"resuming from {model_dir}/checkpoints/checkpoint_15" in capsys.readouterr().err
    assert {path.name for path in (model_dir / "checkpoints").iterdir()} == {"broken_checkpoint_20", "checkpoint_20"}
    for name, array in arrays(pretrained).items():
        np.testing.assert_array_equal(array, arrays(model_dir)[name], err_msg=name)


def test_a_second_run_in_a_model_dir_stops_before_it_writes_anything(pretrained, tmp_path, capsys):
    with locked(str(tmp_path)):
        with pytest.raises(SystemExit) as stopped:
            config.run(train.train, [*PRETRAIN, f"--gin.MODEL_DIR={tmp_path}"])
        assert stopped.value.code == 2
        assert f"{tmp_path} is in use by process {os.getpid()} on" in capsys.readouterr().err
        assert [path.name for path in tmp_path.iterdir()] == [LOCK]
        config.run(train.train, [*PRETRAIN, f"--gin.MODEL_DIR={tmp_path}", "--dry_run"])  # which writes nothing


@pytest.mark.slow
def test_a_run_told_to_stop_again_and_again_is_the_undisturbed_run_bit_for_bit(pretrained, tmp_path):
    command = [sys.executable, "-m", "diffusion_t5x.train", *PRETRAIN, f"--gin.MODEL_DIR={tmp_path}"]
    command += ["--gin.Periods.save=100"]
    for stop_at in (2, 9):
        process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
        try:
            deadline = time.monotonic() + 600
            while not (tmp_path / "train/metrics.jsonl").exists() or len(steps(tmp_path)) < stop_at:
                assert process.poll() is None, "the run ended before it could be told"
                assert time.monotonic() < deadline
                time.sleep(0.005)
            process.send_signal(signal.SIGTERM)
            assert process.wait(timeout=240) == 75
        finally:
            process.kill()
            process.wait()
        last = len(steps(tmp_path))
        assert stop_at <= last < 20 and checkpoints.steps(tmp_path / "checkpoints") == [last]
    assert subprocess.run(command, stderr=subprocess.DEVNULL).returncode == 0
    assert [(line["step"], line["loss"]) for line in steps(tmp_path)] == [
        (line["step"], line["loss"]) for line in steps(pretrained)
    ]
    undisturbed, resumed = arrays(pretrained), arrays(tmp_path)
    for name, array in undisturbed.items():
        np.testing.assert_array_equal(array, resumed[name], err_msg=name)


def test_adaptation_starts_from_the_parameters_with_a_fresh_optimizer(pretrained, tmp_path, capsys):
    flags = ["--gin_file=recipes/quickstart/adapt.gin", *PRETRAIN[1:], f"--gin.MODEL_DIR={tmp_path}"]
    flags += [f"--gin.INITIAL_CHECKPOINT_PATH={pretrained}", "--gin.TRAIN_STEPS=4", "--gin.Periods.save=1"]
    config.run(train.train, [*flags, "--gin.PEAK_LEARNING_RATE=0.0"])
    log = capsys.readouterr().err
    assert f"initialised from {pretrained}" in log and "at step 0 of 4" in log
    assert re.search(r"^  params/ \(12 arrays\) as in the checkpoint$", log, re.MULTILINE)
    assert re.search(
        r"^  opt_state/ \(\d+ arrays\), step start anew, by the rule \('step\|opt_state", log, re.MULTILINE
    )
    before, after = arrays(pretrained), arrays(tmp_path)
    for name in before:
        if name.startswith("params/"):  # a learning rate of zero: what was restored is what is saved
            np.testing.assert_array_equal(before[name], after[name], err_msg=name)
    assert after["step"] == 4


def test_dry_run_prints_sizes_and_writes_nothing(tmp_path, capsys):
    model_dir = tmp_path / "never"
    config.run(train.train, [*PRETRAIN, f"--gin.MODEL_DIR={model_dir}", "--dry_run"])
    printed = capsys.readouterr().out
    assert "model: 38,224 parameters" in printed  # 2,048·16 + 2·(4·16·16 + 3·16·32 + 2·16) + 16 + 128·2
    assert "tokens int32[8, 96]" in printed
    assert not model_dir.exists()


EVAL = [*MODELS, "--gin_file=decoding/sundae.gin", "--gin_file=runs/eval.gin", *TASK, *TINY]


def test_eval_writes_scores_and_all_it_takes_to_repeat_them(finetuned, tmp_path, capsys):
    flags = [*EVAL, f"--gin.CHECKPOINT_PATH={finetuned}", f"--gin.EVAL_OUTPUT_DIR={tmp_path}"]
    flags += ["--gin.NUM_DECODED_EXAMPLES=8", "--gin.SAMPLES_PER_EXAMPLE=2"]
    evaluation.main(flags)
    report = json.loads((tmp_path / "results.json").read_text())
    scores = report["results"]["quickstart_pairs"]
    assert {"bleu", "bleu_low", "bleu_high", "exact_match", "num_examples"} <= scores.keys()
    assert report["step"] == 3 and report["versions"]["jax"] and "num_samples=8" in report["evaluations"][0]
    (settings,) = report["settings"]["evaluations"]
    assert settings["decoder"]["num_samples"] == 8 and settings["seed"] == 0 and settings["samples_per_example"] == 2
    assert report["training_objective"] == "Sundae" and report["bleu_signature"].startswith("nrefs:1")
    predictions = tmp_path / "quickstart_pairs_predictions.jsonl"
    lines = [json.loads(line) for line in predictions.read_text().splitlines()]
    assert len(lines) == 8 and all(line["predictions"][0] == line["prediction"] for line in lines)

    # Scored again without the model, they get the same.
    again = ["--predictions", str(predictions), "--task=quickstart_pairs", "--gin_file=tasks/quickstart.gin"]
    again += ["--gin.NUM_DECODED_EXAMPLES=8", f"--gin.EVAL_OUTPUT_DIR={tmp_path / 'again'}"]
    capsys.readouterr()
    evaluation.main(again)
    rescored = json.loads((tmp_path / "again" / "results.json").read_text())
    assert rescored["data"] == report["data"]
    assert json.loads(capsys.readouterr().out) == rescored["results"]
    assert rescored["results"]["quickstart_pairs"].items() <= scores.items()
    assert [run.scores[0].step for run in read_runs([tmp_path, tmp_path / "again"])] == [3, None]
    with pytest.raises(SystemExit):  # other settings: the first results stay
        evaluation.main([*flags, "--gin.RANDOM_SEED=1"])
    assert "something else (other: evaluations[0].seed)" in capsys.readouterr().err


def test_eval_of_all_checkpoints_and_several_tasks_goes_on_where_it_stopped(pretrained, tmp_path, capsys):
    flags = [*MODELS, *TINY, "--gin_file=decoding/autoregressive.gin", "--gin_file=runs/eval.gin"]
    flags += [f"--gin.CHECKPOINT_PATH={pretrained}", "--gin.ALL_CHECKPOINTS=True", "--gin.NUM_DECODED_EXAMPLES=2"]
    flags += [f"--gin.EVAL_OUTPUT_DIR={tmp_path}", "--gin.SPLIT=validation", "--gin.BATCH_SIZE=2"]
    flags += ['--gin.EVAL_TASKS=["quickstart_pairs", "quickstart_corpus_prefix_lm"]']
    flags += ['--gin.TASK_FEATURE_LENGTHS={"inputs": 8, "targets": 8}']
    evaluation.main(flags)
    names = [path.name for path in checkpoints.find_checkpoints(str(pretrained))]
    assert names == ["checkpoint_10", "checkpoint_15", "checkpoint_20"]
    assert sorted(path.name for path in tmp_path.iterdir()) == names
    for name in names:
        report = json.loads((tmp_path / name / "results.json").read_text())
        assert list(report["results"]) == ["quickstart_pairs", "quickstart_corpus_prefix_lm"]
        assert f"checkpoint_{report['step']}" == name
    (run,) = read_runs([tmp_path])
    assert {curve.task for curve in run.curves} == {"quickstart_pairs", "quickstart_corpus_prefix_lm"}

    (tmp_path / "checkpoint_15" / "results.json").unlink()
    kept = (tmp_path / "checkpoint_10" / "results.json").stat().st_mtime_ns
    capsys.readouterr()
    evaluation.main(flags)
    log = capsys.readouterr().err
    assert "2 of 3 checkpoints are evaluated" in log and log.count("results.json") == 1
    assert (tmp_path / "checkpoint_15" / "results.json").exists()
    assert (tmp_path / "checkpoint_10" / "results.json").stat().st_mtime_ns == kept


def test_evaluations_with_settings_of_their_own_are_scopes_of_a_gin_file(finetuned, tmp_path, capsys):
    (tmp_path / "two.gin").write_text(TWO_TASKS)
    flags = [*MODELS, *TINY, "--gin_file=decoding/sundae.gin", "--gin_file=runs/eval.gin"]
    flags += [f"--gin_file={tmp_path / 'two.gin'}", "--gin.BATCH_SIZE=8", f"--gin.EVAL_OUTPUT_DIR={tmp_path}"]
    evaluation.main([*flags, f"--gin.CHECKPOINT_PATH={finetuned}", "--dry_run"])
    printed = capsys.readouterr().out
    for expected in (
        "'quickstart_pairs', task_feature_lengths={'inputs': 24, 'targets': 24}, split='test'",
        "'quickstart_corpus_prefix_lm', task_feature_lengths={'inputs': 64, 'targets': 32}, split='validation'",
    ):
        assert expected in printed
    assert [path.name for path in tmp_path.iterdir()] == ["two.gin"]


@pytest.mark.slow
def test_infer_goes_on_where_it_stopped_and_refuses_other_settings(finetuned, tmp_path, capsys):
    flags = [*MODELS, "--gin_file=decoding/sundae.gin", "--gin_file=runs/infer.gin", *TASK, *TINY]
    flags += [f"--gin.CHECKPOINT_PATH={finetuned}", "--gin.NUM_DECODED_EXAMPLES=20", "--gin.infer.infer.trace=True"]
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    config.run(infer.infer, [*flags, f"--gin.INFER_OUTPUT_DIR={whole}"])
    name = "quickstart_pairs-test.jsonl"
    lines = (whole / name).read_text().splitlines(keepends=True)
    records = [json.loads(line) for line in lines]
    assert [record["example_id"] for record in records] == list(range(20))
    assert all(len(record["trace"]["steps"]) == 10 for record in records)
    assert (whole / "quickstart_pairs-test.trace.html").exists()
    # Stopped in the middle of the eleventh line, and then asked for other batches.
    cut.mkdir()
    (cut / name).write_text("".join(lines[:10]) + lines[10][:25])
    (cut / "quickstart_pairs-test.settings.json").write_text(
        (whole / "quickstart_pairs-test.settings.json").read_text()
    )
    config.run(infer.infer, [*flags, f"--gin.INFER_OUTPUT_DIR={cut}", "--gin.BATCH_SIZE=4"])
    again = [json.loads(line) for line in (cut / name).read_text().splitlines()]
    assert [(r["example_id"], r["prediction"]) for r in again] == [(r["example_id"], r["prediction"]) for r in records]
    with pytest.raises(SystemExit):
        config.run(infer.infer, [*flags, f"--gin.INFER_OUTPUT_DIR={cut}", "--gin.RANDOM_SEED=1"])
    assert "begun with other settings (random_seed" in capsys.readouterr().err
    assert len((cut / name).read_text().splitlines()) == 20


def test_infer_fills_holes_and_refuses_what_writes_from_left_to_right(finetuned, tmp_path, capsys):
    templates = tmp_path / "texts.jsonl"
    lines = [
        {"template": "un<hole:3> deux<hole:2>", "inputs": "1"},
        {"template": "<hole:1>."},
        {"template": "<hole:5>"},
    ]
    templates.write_text("".join(json.dumps(line) + "\n" for line in lines))
    files = [*MODELS, "--gin_file=runs/infer.gin", f"--gin.CHECKPOINT_PATH={finetuned}", *TASK, *TINY]
    flags = [*files, "--gin_file=decoding/sundae.gin", f"--templates={templates}", "--trace", "--gin.BATCH_SIZE=2"]
    flags += [f"--gin.INFER_OUTPUT_DIR={tmp_path / 'filled'}"]
    infer.main([*flags, "--gin.NUM_DECODED_EXAMPLES=2"])
    output = tmp_path / "filled" / "infill-texts.jsonl"
    assert len(output.read_text().splitlines()) == 2
    infer.main(flags)
    records = [json.loads(line) for line in output.read_text().splitlines()]
    assert [record["template"] for record in records] == [line["template"] for line in lines]
    assert [len(record["holes"]) for record in records] == [2, 1, 1] and records[0]["inputs_pretokenized"] == "1"
    assert re.fullmatch("un.* deux.*", records[0]["prediction"], re.DOTALL)
    assert records[1]["prediction"].endswith(".") and [record["num_tokens"] for record in records] == [5, 1, 5]
    assert (tmp_path / "filled" / "infill-texts.trace.html").exists()
    assert "1 → un" in capsys.readouterr().out

    templates.write_text('{"template": "<hole:30>"}\n')
    for more, expected in (
        (
            flags,
            "texts.jsonl:1: template of 31 tokens (30 in holes, 1 for EOS), but TASK_FEATURE_LENGTHS has room for 24",
        ),
        (
            [*files, "--gin_file=decoding/block.gin", *flags[-4:]],
            "BlockDecoder writes from left to right and cannot fill",
        ),
        ([*files, "--gin_file=decoding/autoregressive.gin", *flags[-4:]], "take a model of masked or SUNDAE diffusion"),
    ):
        with pytest.raises(SystemExit):
            infer.main(more)
        assert expected in capsys.readouterr().err


def test_likelihoods_of_a_set_and_of_each_example_are_the_same(finetuned, tmp_path, capsys):
    flags = [*MODELS, "--gin_file=objectives/sundae.gin", *TASK, *TINY, f"--gin.CHECKPOINT_PATH={finetuned}"]
    flags += ["--gin.NUM_SCORED_EXAMPLES=10", "--gin.NUM_DRAWS=4"]
    score = [*flags, "--gin_file=runs/infer_score.gin", f"--gin.INFER_OUTPUT_DIR={tmp_path / 'scored'}"]
    config.run(infer.infer, score)
    file = tmp_path / "scored" / "quickstart_pairs-test-score.jsonl"
    lines = file.read_text().splitlines(keepends=True)
    # Stopped in the middle of a line, it goes on; with other draws it refuses.
    file.write_text("".join(lines[:5]) + lines[5][:25])
    config.run(infer.infer, [*score, "--gin.BATCH_SIZE=4"])
    again = file.read_text().splitlines()
    assert len(again) == 10
    with pytest.raises(SystemExit):
        config.run(infer.infer, [*score, "--gin.NUM_DRAWS=8"])
    assert "begun with other settings (num_draws" in capsys.readouterr().err

    output = tmp_path / "set"
    evaluation.main([*flags, "--gin_file=runs/eval_likelihood.gin", f"--gin.EVAL_OUTPUT_DIR={output}"])
    metrics = json.loads((output / "results.json").read_text())["results"]["quickstart_pairs"]
    for records in (list(map(json.loads, lines)), list(map(json.loads, again))):
        assert [record["example_id"] for record in records] == list(range(10))
        assert metrics["log_likelihood"] == pytest.approx(np.mean([r["log_likelihood"] for r in records]), rel=1e-5)
        errors = np.array([record["standard_error"] for record in records])
        assert metrics["log_likelihood_se"] == pytest.approx(np.sqrt((errors**2).sum()) / 10, rel=1e-4)
        assert metrics["num_bytes"] == sum(len(r["targets_pretokenized"].encode()) for r in records)
        assert metrics["num_tokens"] == sum(r["num_tokens"] for r in records)
    assert [len(run.predictions) for run in read_runs([output, tmp_path / "scored"])] == [0, 0]


def test_a_report_shows_what_the_verbs_left(finetuned, pretrained, tmp_path):
    page = write_report([finetuned, pretrained], tmp_path / "report.html").read_text()
    for expected in (
        "trained to step 20",
        "8 examples, finetuned at step 3",
        "SundaeDecoder(",
        "exact_match",
    ):
        assert expected in page


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--gin.TRIAN_STEPS=5"], "TRAIN_STEPS"),
        (["--gin.train.train.train_step=5"], "train_steps"),
        (["--gin.ModelConfig.embed_dims=8"], "embed_dim"),
        (["--gin_file=runs/pretrian.gin"], "runs/pretrain.gin"),
        (["--gin.MIXTURE_OR_TASK_NAME=quickstart_pretrian"], "did you mean quickstart_pretrain"),
        (['--gin.TASK_FEATURE_LENGTHS={"inputs": 4096, "targets": 4096}'], "max_length is 4096"),
        (["--gin.INITIAL_CHECKPOINT_PATH=/no/such/folder"], "No checkpoint at /no/such/folder"),
        (["--gin.MODEL_DIR=/dev/null/model"], "Cannot write to /dev/null/model"),
        (["--gin.BATCH_SIZE=0"], "batch size"),
        (["--gin.train.train.num_microbatches=3"], "num_microbatches = 3"),
        (["--gin.WARMUP_STEPS=20"], "cannot warm up"),
    ],
)
def test_a_mistake_is_one_clear_message_before_the_work_starts(flags, expected, tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        config.run(train.train, [*PRETRAIN, f"--gin.MODEL_DIR={tmp_path / 'model'}", *flags])
    message = capsys.readouterr().err
    assert stopped.value.code == 2
    assert expected in message
    assert message.count("error: ") == 1 and "Traceback" not in message
    assert not (tmp_path / "model" / "checkpoints").exists()


@pytest.mark.parametrize("dry_run", [["--dry_run"], []])
def test_a_checkpoint_that_does_not_fit_is_listed_parameter_by_parameter(
    pretrained, tmp_path, capsys, monkeypatch, dry_run
):
    """Another size, another head and another vocabulary in one message, before data are read or a state is made."""
    given = tmp_path / "given"
    shutil.copytree(checkpoints.find_checkpoint(str(pretrained)), given / "checkpoint_20")
    (file,) = (path for path in (given / "checkpoint_20" / "metadata").iterdir() if path.name == "metadata")
    metadata = json.loads(file.read_text())
    metadata["vocabulary"] |= {"fingerprint": "0123456789abcdef", "size": 99}
    file.write_text(json.dumps(metadata))
    manifest.write(checkpoints.find_checkpoint(str(given)))
    monkeypatch.setattr(SeqioDataset, "train_iterator", None)
    monkeypatch.setattr(train, "init_state", None)
    flags = [*FINETUNE, f"--gin.INITIAL_CHECKPOINT_PATH={given}", f"--gin.MODEL_DIR={tmp_path / 'model'}", *dry_run]
    flags += ["--gin.ModelConfig.mlp_dim=48", "--gin.ModelConfig.tie_embeddings=False"]
    with pytest.raises(SystemExit):
        config.run(train.train, flags)
    message = capsys.readouterr().err
    assert message.count("error: ") == 1 and "Traceback" not in message
    rows = [" ".join(line.split()) for line in message.splitlines()]
    assert "params/decoder/blocks/mlp/wi_0 float32[2, 16, 48] float32[2, 16, 32]" in rows
    assert "params/head float32[16, 2048] -" in rows
    assert not any(row.startswith("params/decoder/blocks/attention/query") for row in rows)
    assert "size 99" in message and "fingerprint 0123456789abcdef" in message
    assert "mlp_dim = 32 (here 48), tie_embeddings = True (here False)." in message
    assert not (tmp_path / "model" / "checkpoints").exists()


def test_a_mistake_has_no_traceback_and_a_non_zero_status_as_a_process():
    command = [sys.executable, "-m", "diffusion_t5x.train", "--gin_file=runs/pretrian.gin"]
    start = time.monotonic()
    process = subprocess.run(command, capture_output=True, text=True)
    assert process.returncode == 2
    assert "error: " in process.stderr and "Traceback" not in process.stderr
    assert time.monotonic() - start < 60


@pytest.mark.slow
def test_eight_devices_give_the_same_losses_however_they_are_arranged(eight_devices, pretrained, tmp_path):
    losses = {}
    for data, fsdp in ((8, 1), (2, 4)):
        model_dir = tmp_path / f"{data}x{fsdp}"
        flags = [*PRETRAIN, f"--gin.MODEL_DIR={model_dir}", "--gin.TRAIN_STEPS=20"]
        flags += [f"--gin.MeshConfig.data={data}", f"--gin.MeshConfig.fsdp={fsdp}"]
        command = [sys.executable, "-m", "diffusion_t5x.train", *flags]
        subprocess.run(command, check=True, env=eight_devices, cwd=os.fspath(tmp_path))
        losses[data, fsdp] = [line["loss"] for line in steps(model_dir)]
    np.testing.assert_allclose(losses[8, 1], losses[2, 4], rtol=1e-5)
    np.testing.assert_allclose(losses[8, 1], [line["loss"] for line in steps(pretrained)], rtol=1e-5)
