"""Learning from preference pairs through the verbs: fine-tuned on the chosen texts, then on the pairs."""

import json
import math

import pytest

from diffusion_t5x import train
from diffusion_t5x.command_line import config

pytestmark = pytest.mark.slow

SMALL = ["--gin.ModelConfig.embed_dim=16", "--gin.ModelConfig.num_layers=1", "--gin.ModelConfig.mlp_dim=16"]


def run(folder, model_dir, recipe, *flags):
    """Metrics of each logged training step, and of each evaluation of the loss."""
    files = {split: str(folder / "pairs.jsonl") for split in ("train", "validation")}
    config.run(
        train.train,
        [
            f"--gin_file=recipes/rl/{recipe}.gin", "--gin_file=tasks/local_pairs.gin", f"--gin.MODEL_DIR={model_dir}",
            f"--gin.FILES={files}", "--gin.VOCABULARY_FILE=None", "--gin.HELD_OUT=None", "--gin.INPUTS='{prompt}'",
            "--gin.TASK_FEATURE_LENGTHS={'inputs': 4, 'targets': 4}", "--gin.BATCH_SIZE=8", "--gin.EVAL_STEPS=1",
            "--gin.Periods.log=1", *SMALL, *flags,
        ],
    )  # fmt: skip
    found = (model_dir / "train" / "metrics.jsonl", *(model_dir / "training_eval").glob("*/metrics.jsonl"))
    return [[json.loads(line) for line in path.read_text().splitlines()] for path in found]


def test_pairs_are_told_apart_by_a_run_from_its_reference(tmp_path):
    pairs = [{"prompt": word, "chosen": word, "rejected": "zz"} for word in ("ab", "ac", "bc", "de")]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    run(tmp_path, tmp_path / "start", "sft", "--gin.TRAIN_STEPS=2")
    flags = [f"--gin.INITIAL_CHECKPOINT_PATH={tmp_path / 'start'}", "--gin.CHOSEN='{chosen}'"]
    flags += ["--gin.REJECTED='{rejected}'", "--gin.NLL_WEIGHT=0.0", "--gin.LEARNING_RATE=0.01"]
    flags += ["--gin.NUM_DECODED_EXAMPLES=0"]
    training, evaluated = run(tmp_path, tmp_path / "preferred", "preferences", *flags, "--gin.TRAIN_STEPS=30")
    assert training[0]["loss"] == pytest.approx(math.log(2), abs=1e-6) and training[0]["margin"] == 0
    assert training[-1]["loss"] < 0.6 and evaluated[-1]["accuracy"] == 1 and evaluated[-1]["loss"] < 0.6
