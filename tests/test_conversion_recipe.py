"""Routes from one autoregressive model to diffusion: what the comparison computes, and the comparison itself, small."""

import json
import pathlib
import sys

import pytest
from quickstart_runs import TINY
from scipy import stats

from diffusion_t5x import train
from diffusion_t5x.command_line import config

LAUNCH = pathlib.Path(__file__).parent.parent / "launch"


@pytest.fixture
def conversion(monkeypatch):
    monkeypatch.syspath_prepend(str(LAUNCH))
    import conversion

    return conversion


@pytest.fixture
def report(conversion):
    return conversion.conversion_report


def test_intervals_are_student_s(report):
    mean, low, high = report.interval([1.0, 2.0, 3.0])
    assert (mean, low, high) == pytest.approx((2.0, 2 - 4.302653 / 3**0.5, 2 + 4.302653 / 3**0.5), abs=1e-5)
    values = [3.0, 5.5, 4.0, 4.5]
    expected = stats.ttest_1samp(values, 0).confidence_interval(0.95)
    assert report.interval(values)[1:] == pytest.approx(expected, rel=1e-9)
    assert report.interval([7.0]) == (7.0, 7.0, 7.0)


def test_the_table_has_a_line_for_each_route_and_decoder(report, tmp_path):
    scores = [
        report.Score("a", seed, decoder, {"exact_match": value, "tokens_per_step": 0.5})
        for decoder, values in {"static": (10.0, 20.0, 30.0), "threshold": (1.0, 1.0, 1.0)}.items()
        for seed, value in enumerate(values)
    ]
    scores.append(report.Score("b", 0, "static", {"exact_match": 5.0, "tokens_per_step": 2.0, "acceptance": 0.25}))
    points = [
        report.Point("a", seed, step, step * 1e5, step * 1e12, 10.0 * seed) for seed in range(3) for step in (1, 2)
    ]
    report.write(tmp_path, ("exact_match", "tokens_per_step"), scores, points)
    table = (tmp_path / "report.md").read_text().splitlines()
    assert table[2] == "| a | static | 20.0 ± 24.8 | 0.500 ± 0.000 | 0.20 | 2.0 |"
    assert table[3] == "| a | threshold | 1.000 ± 0.000 | 0.500 ± 0.000 | 0.20 | 2.0 |"
    assert table[4] == "| b | static | 5.000 | 2.000 |  |  |"
    assert table[6] == "b, static: 25.0% ± 0.0% of the drafted tokens were accepted."
    # b has no cost, so no advice is on it.
    assert table[8] == "Which route to take, by exact_match:"
    assert table[12:] == ["| 0.5 | 2 | a | static | 20.000 ± 24.841 | none |"]
    for name in ("tokens", "flops", "passes"):
        assert "<svg" in (tmp_path / f"{name}.svg").read_text()
    assert not (tmp_path / "adapted.svg").exists()


def test_adaptation_is_drawn_over_its_steps(report, monkeypatch):
    scores = [
        report.Score(f"ar2diff_{steps}", seed, "static", {"exact_match": steps / 10 + seed, "tokens_per_step": 1.0})
        for steps in (300, 0, 100)
        for seed in range(3)
    ]
    scores.append(report.Score("ar2diff_0_and_more", 0, "static", {"exact_match": 99.0, "tokens_per_step": 1.0}))
    drawn = {}
    monkeypatch.setattr(report.charts, "line_chart", lambda title, x, y, lines: drawn.setdefault(x, lines))
    report.drawn("exact_match", scores, [])
    (line,) = drawn["N, steps on the pretraining data"]
    assert line.label == "static" and line.points == [(0, 1.0), (100, 11.0), (300, 31.0)]
    assert line.band[0] == pytest.approx(report.interval([0.0, 1.0, 2.0])[1:])


def test_what_a_route_costs(conversion):
    ground = conversion.Ground(
        *([], [], None, "task", ("exact_match",), ()),
        batch_size=32,
        num_inputs=24,
        num_targets=24,
        rollout=conversion.rollout(conversion.Ramp(24, 24)),
    )
    sizes = {"embed_dim": 128, "num_layers": 4, "num_heads": 4, "head_dim": 32, "mlp_dim": 256, "vocab_size": 2048}
    object.__setattr__(ground, "model", conversion.ModelConfig(**sizes))
    cost = {name: conversion.stage_flops(ground, stages[-1], 0) for name, stages in conversion.ROUTES.items()}
    assert cost["annealed"] == cost["shifted"] == cost["block_growth"] == cost["ar2diff_0"]
    # A student reads each row twice over, and reads out half of that; a teacher or a causal pass reads it once.
    assert 1 + 1 / 2 / 3 < cost["off_policy"] / cost["ar2diff_0"] < 1 + 1 / 3
    assert 1 + 1 / 2 < cost["joint"] / cost["ar2diff_0"] < 2
    # Drafts are read out, too; what is read from left to right is read in the same pass.
    assert 1 < cost["joint_drafts"] / cost["ar2diff_0"] < cost["joint"] / cost["ar2diff_0"]
    assert 1 + 1 / 8 < cost["aligned"] / cost["ar2diff_0"] <= 1 + 1 / 6  # its teacher reads, and computes no logits
    assert cost["opdlm"] > 1.4 * cost["off_policy"]


@pytest.mark.slow
def test_the_comparison_runs_and_goes_on(conversion, tmp_path, monkeypatch, capsys):
    short = ["--gin.TRAIN_STEPS=2", "--gin.WARMUP_STEPS=1", "--gin.BATCH_SIZE=4", *TINY]
    pretrain = ["--gin_file=recipes/quickstart/pretrain_ar.gin", f"--gin.MODEL_DIR={tmp_path / 'pretrained'}"]
    finetune = ["--gin_file=recipes/quickstart/finetune_ar.gin", f"--gin.MODEL_DIR={tmp_path / 'finetuned'}"]
    config.run(train.train, [*pretrain, *short])
    config.run(train.train, [*finetune, f"--gin.INITIAL_CHECKPOINT_PATH={tmp_path / 'pretrained'}", *short])
    command = ["conversion.py", "quickstart", "--output", str(tmp_path), "--seeds", "0", "--steps", "4"]
    command += ["--gin.BATCH_SIZE=4", "--gin.WARMUP_STEPS=1", "--gin.NUM_DECODED_EXAMPLES=4", *TINY]
    monkeypatch.setattr(
        conversion, "DECODERS", {"2 steps a block": ["--gin.NUM_STEPS=2", "--gin.NUM_DECODED_EXAMPLES=4", *TINY]}
    )
    few = {
        name: [*flags, "--gin.NUM_DECODED_EXAMPLES=4", *TINY] for name, flags in conversion.AUTOREGRESSIVE_TOO.items()
    }
    monkeypatch.setattr(conversion, "AUTOREGRESSIVE_TOO", few)
    monkeypatch.setattr(conversion, "ONE_BY_ONE", few["one by one"])
    monkeypatch.setattr(sys, "argv", [*command, "--routes", "shifted"])
    conversion.main()
    first = (tmp_path / "report.md").read_text()
    assert capsys.readouterr().out.count("python -m diffusion_t5x.train ") == 1
    monkeypatch.setattr(sys, "argv", [*command, "--routes", "shifted", "off_policy", "joint"])
    conversion.main()
    assert capsys.readouterr().out.count("python -m diffusion_t5x.train ") == 2
    table = (tmp_path / "report.md").read_text()
    rows = [line.split(" | ")[0].strip("| ") for line in table.split("\n\n")[0].splitlines()[2:]]
    assert rows == ["the start itself", "shifted", "off_policy", "joint", "joint", "joint"]
    assert first.splitlines()[3] in table.splitlines()
    written = tmp_path / "scores" / "test"
    texts = [
        [json.loads(line)["prediction"] for line in path.read_text().splitlines()]
        for path in sorted(written.glob("joint_0_[os]*/quickstart_pairs_predictions.jsonl"))
    ]
    assert len(texts) == 2 and texts[0] == texts[1]  # one by one, and by self-speculation
