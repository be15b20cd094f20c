"""The plan of ar2diff: microbatches by memory, steps by tokens or minutes, disk. Measurements are given here."""

import dataclasses
import pathlib
import types

import optax
import pytest

from diffusion_t5x.ar2diff import plan as plans
from diffusion_t5x.ar2diff.command import Command
from diffusion_t5x.ar2diff.data import TrainingData
from diffusion_t5x.ar2diff.plan import Plan
from diffusion_t5x.data.vocabularies import TokenIds
from diffusion_t5x.errors import UserError
from diffusion_t5x.models.config import ModelConfig
from diffusion_t5x.objectives.block import Block
from diffusion_t5x.partitioning import MeshConfig
from diffusion_t5x.performance.training_run import TrainingRun
from diffusion_t5x.training.lora import Lora

GIB = 2**30
IDS = TokenIds(size=64, pad_id=0, eos_id=1, mask_id=63, start_id=0, noise_ranges=((2, 63),))
ROWS = types.SimpleNamespace(
    batch_size=8, row_length=256, task_feature_lengths={"inputs": 128, "targets": 128}, token_ids=lambda: IDS
)
MODEL = ModelConfig(num_layers=1, embed_dim=16, num_heads=2, head_dim=8, mlp_dim=16)
RUN = TrainingRun(MeshConfig(), MODEL, Block(4), ROWS, optax.adam(1e-3), lora=Lora(rank=2, whole=("embedding",)))
COMMAND = Command("org/model", pathlib.Path("/"), "data", ("a.txt",), tokens=20_000)
DATA = TrainingData(("a.txt",), "x.gin", "paragraphs", 100, 5000, 20.0)


class Recipe:
    """Remembers what is written to it."""

    route, path = "shifted", pathlib.Path("recipe.gin")

    def __init__(self, run=RUN):
        self.run, self.written = run, []

    def write(self, settings):
        self.written.append(settings)
        return self.run


@pytest.fixture
def trial(monkeypatch):
    """Steps of 12 GiB over the microbatches and 2 GiB beside them, 1.5 s each, on a device of 10 GiB."""

    class Trial:
        def __init__(self, run):
            self.peak_bytes = 2 * GIB + 12 * GIB // run.microbatches

        def seconds_per_step(self):
            return 1.5

    monkeypatch.setattr(plans, "Trial", Trial)
    monkeypatch.setattr(plans, "memory_of_device", lambda: 10 * GIB)


def test_a_step_is_cut_into_the_fewest_microbatches_that_fit(trial):
    recipe = Recipe()
    plan = Plan.measure(COMMAND, recipe)
    assert (plan.microbatches, plan.memory) == (2, 8 * GIB)  # at most 0.8 of 10 GiB
    assert recipe.written[-1] == {"TRAIN_STEPS": 10, "EVAL_PERIOD": 3, "NUM_MICROBATCHES": 2}


def test_a_number_of_microbatches_that_was_asked_for_stays(trial):
    assert Plan.measure(COMMAND, Recipe(dataclasses.replace(RUN, microbatches=4))).microbatches == 4


def test_a_step_that_cannot_fit_is_refused(trial, monkeypatch):
    monkeypatch.setattr(plans, "memory_of_device", lambda: GIB)
    with pytest.raises(UserError, match=r"A step takes 3\.5 GiB of memory, and 819 MiB may be used: set fewer tokens"):
        Plan.measure(COMMAND, Recipe())


@pytest.mark.parametrize(
    ("asked", "steps", "period"),
    [({"tokens": 20_000}, 10, 3), ({"tokens": 1}, 1, 1), ({"tokens": None, "minutes": 60}, 2400, 400)],
    ids=str,
)
def test_tokens_or_measured_minutes_make_the_steps(trial, asked, steps, period):
    plan = Plan.measure(dataclasses.replace(COMMAND, **asked), Recipe())
    assert (plan.steps, plan.eval_period) == (steps, period)  # a checkpoint at least every 600 s


def test_a_disk_that_is_too_small_is_refused(trial, monkeypatch):
    monkeypatch.setattr(plans.shutil, "disk_usage", lambda path: types.SimpleNamespace(free=1000))
    with pytest.raises(UserError, match="has 0 MiB free, but this writes about"):
        Plan.measure(COMMAND, Recipe())


def test_the_plan_is_ten_lines_for_people(trial):
    recipe = Recipe()
    plan = Plan.measure(COMMAND, recipe)
    lines = plan.lines(COMMAND, recipe, RUN, DATA, types.SimpleNamespace(named="/start")).splitlines()
    assert len(lines) == 10 and all(line[:11].strip() and len(line) < 160 for line in lines)
    text = "\n".join(lines)
    assert "shifted: Block, masked tokens in blocks of 4" in text and "LoRA of rank 2 and embedding" in text
    assert "8 rows of 256 tokens, in 2 microbatches" in text and "10: 20,480 tokens" in text
    assert "read 5.1 times; 20 % held out" in text  # 20,480 of 4,000 tokens
