"""Shared parts of tests against `transformers`: its process, and models as this framework reads them."""

import os
import pathlib
import subprocess
import sys

import gin
import numpy as np
import theirs

from diffusion_t5x import partitioning
from diffusion_t5x.command_line import config
from diffusion_t5x.data import vocabulary_files
from diffusion_t5x.data.batch import Batch
from diffusion_t5x.data.vocabularies import token_ids
from diffusion_t5x.evaluation.loading import load_model
from diffusion_t5x.models.config import ModelConfig


def run_theirs(*arguments):
    script = pathlib.Path(theirs.__file__)
    environment = os.environ | {"PYTHONPATH": str(script.parent), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, str(script), *map(str, arguments)], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]


def load_ours(folder, tokenizer="tokenizer.json", **changes):
    """As eval and infer load it."""
    config.load([str(folder / "model.gin")])
    model = ModelConfig(**gin.get_bindings(ModelConfig) | changes)
    ids = token_ids(vocabulary_files.vocabulary(str(folder / tokenizer)))
    return load_model(str(folder), model, ids, partitioning.MeshConfig().make())


def as_batch(said, has_encoder):
    there, inputs_there = said["there"], said["inputs_there"]
    places = np.arange(there.shape[1])
    return Batch(
        tokens=said["tokens"],
        target_mask=there,
        segment_ids=there.astype(np.int32),
        positions=np.where(there, places, 0),
        example_ids=np.arange(len(there)),
        encoder_tokens=said["inputs"] if has_encoder else None,
        encoder_segment_ids=inputs_there.astype(np.int32) if has_encoder else None,
        encoder_positions=np.where(inputs_there, places, 0) if has_encoder else None,
    )
