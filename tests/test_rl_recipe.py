"""Reinforcement learning through the verbs: an untrained model, its rollouts, a run that is resumed."""

import json

import numpy as np
import pytest

from diffusion_t5x import train
from diffusion_t5x.command_line import config

pytestmark = pytest.mark.slow

# Eight sentences: the pairs' 39,000 examples take half a minute to read.
TASK = [
    "--gin_file=tasks/overfit.gin",
    "--gin.MIXTURE_OR_TASK_NAME='overfit_prefix_lm'",
]
SMALL = ["--gin.ModelConfig.embed_dim=16", "--gin.ModelConfig.num_layers=1", "--gin.ModelConfig.mlp_dim=16"]


def run(recipe, model_dir, *flags):
    config.run(
        train.train, [f"--gin_file=recipes/rl/{recipe}.gin", f"--gin.MODEL_DIR={model_dir}", *TASK, *SMALL, *flags]
    )
    return {
        folder: [json.loads(line) for line in (model_dir / folder / "metrics.jsonl").read_text().splitlines()]
        for folder in ("train", "rollout")
        if (model_dir / folder).exists()
    }


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rl") / "sft"
    run("sft", folder, "--gin.TRAIN_STEPS=2", "--gin.EVAL_STEPS=1")
    return folder


def reinforce(start, folder, steps, *flags):
    """Six updates a rollout, with a reward that a model without any training earns, too."""
    settings = {"INITIAL_CHECKPOINT_PATH": start, "NUM_DECODED_EXAMPLES": 4, "BATCH_SIZE": 8, "GROUP_SIZE": 4}
    given = [f"--gin.{name}={value}" for name, value in settings.items()]
    given += [
        "--gin.KL_WEIGHT=0.1",
        "--gin.Rollout.num_batches=3",
        "--gin.PASSES=2",
        "--gin.linear.total_steps=8",
        "--gin.Periods.log=1",
        "--gin.Periods.save=4",
    ]
    given += ["--gin_allow=my_reward", "--gin_file=my_reward.gin", f"--gin.TRAIN_STEPS={steps}", *flags]
    return run("quickstart", folder, *given)


@pytest.fixture(autouse=True)
def my_reward(tmp_path, monkeypatch):
    """A function of the user's, in a module and a gin file of the user's."""
    (tmp_path / "my_reward.py").write_text("def shorter(text, example):\n    return 1 / (1 + len(text))\n")
    (tmp_path / "my_reward.gin").write_text(
        "from __gin__ import dynamic_registration\n\nimport my_reward\n\nREWARD = @my_reward.shorter\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)


def test_a_run_resumed_within_a_rollout_goes_on_the_same(start, tmp_path):
    """Six updates a rollout, a checkpoint after four: texts and advantages that are left over are in the checkpoint."""
    whole = reinforce(start, tmp_path / "whole", 8)
    reinforce(start, tmp_path / "parts", 4)
    parts = reinforce(start, tmp_path / "parts", 8)
    for name in ("loss", "ratio", "nll", "kl_from_start", "gradient_norm", "text_length", "parameter_norm"):
        np.testing.assert_array_equal([x[name] for x in parts["train"]], [x[name] for x in whole["train"]])
    # Logged once all texts of its three batches are judged: by the third update, or before a checkpoint.
    assert [x["step"] for x in parts["rollout"]] == [3, 8]
    assert [x["step"] for x in whole["rollout"]] == [3, 8]
    for name in ("reward", "best_reward", "groups_without_spread", "text_length"):
        assert [x[name] for x in parts["rollout"]] == [x[name] for x in whole["rollout"]]
    assert 0 < whole["rollout"][0]["reward"] < 1 and whole["rollout"][0]["groups_without_spread"] < 1
    ratios = [x["ratio"] for x in whole["train"]]
    assert abs(whole["train"][0]["kl_from_start"]) < 1e-6 < whole["train"][-1]["kl_from_start"]
    assert ratios[0] == pytest.approx(1, abs=1e-5) == pytest.approx(ratios[6], abs=1e-5)  # a rollout's first update


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--gin.GROUP_SIZE=3"], "does not divide into groups of 3"),
        (["--gin.INITIAL_CHECKPOINT_PATH=None"], "Set INITIAL_CHECKPOINT_PATH"),
        (["--gin.train.train.teacher_checkpoint_path=/tmp"], "Set TEACHER_CHECKPOINT_PATH = None"),
        (["--gin.ROLLOUT=None"], "needs texts that the model writes"),
        (["--gin.Rollout.rewards=None"], "learns from rewards"),
        (["--gin.rollout/MaskedDecoder.order='confidence'"], "an order other than confidence"),
    ],
)
def test_mistakes(start, tmp_path, capsys, flags, message):
    with pytest.raises(SystemExit):
        reinforce(start, tmp_path / "model", 8, *flags)
    assert message in capsys.readouterr().err
    assert not (tmp_path / "model" / "checkpoints").exists()
