"""Two small runs of the quickstart that tests of the verbs start from, and what is in a run's folder."""

import json
import pathlib

import numpy as np
import orbax.checkpoint as ocp
from flax.traverse_util import flatten_dict

from diffusion_t5x import train
from diffusion_t5x.checkpointing import checkpoints
from diffusion_t5x.command_line import config

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
    "--gin.BATCH_SIZE=2",
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
SUNDAE = ["--gin_file=decoding/sundae.gin", "--gin.SundaeDecoder.num_steps=4", "--gin.SundaeDecoder.num_samples=2"]
FINETUNE = [
    *MODELS,
    "--gin_file=objectives/sundae.gin",
    *SUNDAE,
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


def steps(model_dir: pathlib.Path) -> list[dict]:
    return [json.loads(line) for line in (model_dir / "train" / "metrics.jsonl").read_text().splitlines()]


def arrays(model_dir: pathlib.Path) -> dict[str, np.ndarray]:
    """Every array of the latest checkpoint, as stored."""
    state = ocp.PyTreeCheckpointer().restore(checkpoints.find_checkpoint(str(model_dir)) / "state")
    return {"/".join(path): np.asarray(leaf) for path, leaf in flatten_dict(state).items()}


def pretrain(folder: pathlib.Path) -> pathlib.Path:
    """A run of 20 steps that nothing disturbs."""
    (folder / "keep.gin").write_text(KEEP_THREE)
    model_dir = folder / "pretrained"
    config.run(train.train, [*PRETRAIN, f"--gin_file={folder / 'keep.gin'}", f"--gin.MODEL_DIR={model_dir}"])
    return model_dir


def finetune(pretrained: pathlib.Path) -> pathlib.Path:
    """Three steps of SUNDAE that go on from there."""
    model_dir = pretrained.parent / "finetuned"
    config.run(train.train, [*FINETUNE, f"--gin.MODEL_DIR={model_dir}", f"--gin.INITIAL_CHECKPOINT_PATH={pretrained}"])
    return model_dir
