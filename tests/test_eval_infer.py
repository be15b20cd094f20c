"""`eval`, `infer`, `generate` and the report as users run them, on what `train` left."""

import json
import re

import numpy as np
import pytest
from quickstart_runs import MODELS, SUNDAE, TASK, TINY

from diffusion_t5x import eval as evaluation
from diffusion_t5x import generate, infer
from diffusion_t5x.checkpointing import checkpoints
from diffusion_t5x.command_line import config
from diffusion_t5x.reporting.report import write_report
from diffusion_t5x.reporting.runs import read_runs

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
EVAL = [*MODELS, *SUNDAE, "--gin_file=runs/eval.gin", *TASK, *TINY]


def test_eval_writes_scores_and_all_it_takes_to_repeat_them(finetuned, tmp_path, capsys):
    flags = [*EVAL, f"--gin.CHECKPOINT_PATH={finetuned}", f"--gin.EVAL_OUTPUT_DIR={tmp_path}"]
    flags += ["--gin.NUM_DECODED_EXAMPLES=8", "--gin.SAMPLES_PER_EXAMPLE=2"]
    evaluation.main(flags)
    report = json.loads((tmp_path / "results.json").read_text())
    scores = report["results"]["quickstart_pairs"]
    assert {"bleu", "bleu_low", "bleu_high", "exact_match", "num_examples"} <= scores.keys()
    assert report["step"] == 3 and report["versions"]["jax"] and "num_samples=2" in report["evaluations"][0]
    (settings,) = report["settings"]["evaluations"]
    assert settings["decoder"]["num_samples"] == 2 and settings["seed"] == 0 and settings["samples_per_example"] == 2
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
    assert "different settings (evaluations[0].seed)" in capsys.readouterr().err


@pytest.mark.slow
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
    assert "2 of 3 checkpoints are already evaluated" in log and log.count("results.json") == 1
    assert (tmp_path / "checkpoint_15" / "results.json").exists()
    assert (tmp_path / "checkpoint_10" / "results.json").stat().st_mtime_ns == kept


def test_evaluations_with_settings_of_their_own_are_scopes_of_a_gin_file(finetuned, tmp_path, capsys):
    (tmp_path / "two.gin").write_text(TWO_TASKS)
    flags = [*MODELS, *TINY, *SUNDAE, "--gin_file=runs/eval.gin"]
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
    flags = [*MODELS, *SUNDAE, "--gin_file=runs/infer.gin", *TASK, *TINY]
    flags += [f"--gin.CHECKPOINT_PATH={finetuned}", "--gin.NUM_DECODED_EXAMPLES=20", "--gin.infer.infer.trace=True"]
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    config.run(infer.infer, [*flags, f"--gin.INFER_OUTPUT_DIR={whole}"])
    name = "quickstart_pairs-test.jsonl"
    lines = (whole / name).read_text().splitlines(keepends=True)
    records = [json.loads(line) for line in lines]
    assert [record["example_id"] for record in records] == list(range(20))
    assert all(len(record["trace"]["steps"]) == 4 for record in records)
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
    assert "started with different settings (random_seed" in capsys.readouterr().err
    assert len((cut / name).read_text().splitlines()) == 20


@pytest.mark.slow
def test_infer_fills_holes_and_refuses_what_writes_from_left_to_right(finetuned, tmp_path, capsys):
    templates = tmp_path / "texts.jsonl"
    lines = [
        {"template": "un<hole:3> deux<hole:2>", "inputs": "1"},
        {"template": "<hole:1>."},
        {"template": "<hole:5>"},
    ]
    templates.write_text("".join(json.dumps(line) + "\n" for line in lines))
    files = [*MODELS, "--gin_file=runs/infer.gin", f"--gin.CHECKPOINT_PATH={finetuned}", *TASK, *TINY]
    flags = [*files, *SUNDAE, f"--templates={templates}", "--trace", "--gin.BATCH_SIZE=2"]
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


def test_generate_needs_nothing_but_a_quickstart_run_s_folder(finetuned, capsys):
    generate.main(["--checkpoint", str(finetuned), "--prompt", "Saturday, May 23, 1981"])
    shown = capsys.readouterr().err
    assert "step 3, Sundae: " in shown and "SundaeDecoder(" in shown
    assert "24 tokens after at most 24 of a prompt" in shown


@pytest.mark.slow
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
    assert "started with different settings (num_draws" in capsys.readouterr().err

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
