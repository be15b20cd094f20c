"""Training steps are timed as they run in training, and what they cost is that of the formula."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import pytest
import tiny

from diffusion_t5x import benchmark
from diffusion_t5x.data.seqio_source import SeqioDataset
from diffusion_t5x.errors import UserError
from diffusion_t5x.models.transformer import ModelDefinition
from diffusion_t5x.objectives.autoregressive import Autoregressive
from diffusion_t5x.objectives.distillation import Distillation
from diffusion_t5x.objectives.sundae import Sundae
from diffusion_t5x.partitioning import MeshConfig
from diffusion_t5x.performance import train_speed
from diffusion_t5x.performance.step_flops import step_flops
from diffusion_t5x.performance.train_speed import Case, Speed
from diffusion_t5x.performance.training_run import TrainingRun, Trial
from diffusion_t5x.training import optimizers

SMALL = dataclasses.replace(tiny.RELATIVE, num_layers=1, vocab_size=None, max_length=16)
SETTINGS = {"vocabulary_size": 12, "input_length": 3, "target_length": 5, "num_steps": 2, "repeats": 3}


@pytest.fixture(autouse=True)
def plain_params(monkeypatch):
    """The model's own initialiser takes seconds to compile."""
    ones = lambda self, key: jax.tree.map(lambda x: jnp.ones(x.shape, x.dtype), self.abstract())  # noqa: E731
    monkeypatch.setattr(ModelDefinition, "init", ones)


def train(folder, cases, **settings):
    optimizer = optimizers.adafactor(1e-3)
    benchmark.train(cases=cases, optimizer=optimizer, benchmark_output_dir=str(folder), **{**SETTINGS, **settings})


@pytest.mark.slow
def test_cases_side_by_side(tmp_path, capsys):
    apart = dataclasses.replace(SMALL, architecture="encoder_decoder")
    cases = {"AR": Case(SMALL, Autoregressive(), 4), "SUNDAE": Case(apart, Sundae(), 4, num_microbatches=2)}
    train(tmp_path / "out", cases)
    report = json.loads((tmp_path / "out" / "train_speed.json").read_text())
    for found, (label, case) in zip(report["cases"], cases.items(), strict=True):
        assert found["label"] == label and found["tokens"] == 4 * (3 + 5)
        assert len(found["seconds"]) == 3 and 0 < min(found["seconds"]) <= max(found["seconds"]) < 5
        model = dataclasses.replace(case.model, vocab_size=128)
        lengths = (5, 3) if label == "SUNDAE" else (8,)
        assert found["flops"] == step_flops(model, case.objective, 4, *lengths)
        assert found["tokens_per_second_per_device"] == pytest.approx(32 / found["seconds_median"])
        assert found["model_flops_utilization"] is None and found["peak_bytes"] > 0
    assert report["settings"]["cases"]["SUNDAE"]["num_microbatches"] == 2
    out = capsys.readouterr().out
    assert out.count("unknown") == 2 and "tokens/s/device" in out


def test_steps_are_timed():
    mesh = MeshConfig().make(jax.devices()[:1])
    watch = train_speed.StepWatch(mesh, Case(SMALL, Autoregressive(), 2), optimizers.adafactor(1e-3), 12, 3, 5, seed=0)
    assert 0 < watch.seconds(1) < 5


def test_a_trial_times_steps_on_real_data():
    pytest.importorskip("seqio")
    from diffusion_t5x.tasks import quickstart  # noqa: F401  (registers the task)

    dataset = SeqioDataset("quickstart_pairs", {"inputs": 24, "targets": 16}, batch_size=2)
    model = dataclasses.replace(SMALL, max_length=64)
    trial = Trial(TrainingRun(MeshConfig(), model, Autoregressive(), dataset, optimizers.adafactor(1e-3)))
    assert 0 < trial.seconds_per_step(num_steps=1) < 5


def test_utilization_is_of_all_devices_peak():
    speed = Speed("a", (0.5, 0.25, 1.0), 100, 8_000_000, 1, 1.0, num_devices=4, peak_flops=16e6)
    assert speed.flops_per_second == 4e6 and speed.utilization == 0.25
    assert "25.0%" in "".join(map(str, train_speed.table([speed], "four").columns[5].cells))


@pytest.mark.parametrize(
    ("cases", "settings", "message"),
    [
        ({}, {}, "must not be empty"),
        ({"a": Case(SMALL, Distillation(), 4)}, {}, "a: Distillation needs a teacher"),
        ({"a": Case(SMALL, Autoregressive(), 4, 3)}, {}, "a: 4 rows cannot be split into 3"),
        ({"a": Case(SMALL, Autoregressive(), 4)}, {"target_length": 99}, "max_length is 16"),
        ({"a": Case(SMALL, Autoregressive(), 4)}, {"repeats": 0}, "repeats must be at least 1"),
    ],
)
def test_what_does_not_fit_is_said_before_anything_is_compiled(cases, settings, message, tmp_path):
    with pytest.raises(UserError, match=message):
        train(tmp_path / "out", cases, **settings)
    assert not (tmp_path / "out").exists()
