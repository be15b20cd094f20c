"""Checkpoints as trainings would leave them, with random parameters."""

import numpy as np
import seqio
import tiny

from diffusion_t5x import config
from diffusion_t5x.conversion import output
from diffusion_t5x.data.vocabularies import token_ids
from diffusion_t5x.models.config import ModelConfig
from diffusion_t5x.models.transformer import ModelDefinition
from diffusion_t5x.training.assignment import named_leaves

SIZE = {"embed_dim": 16, "num_layers": 1, "num_heads": 2, "head_dim": 8, "mlp_dim": 32, "relative_buckets": 32}
LENGTHS = '{"inputs": 20, "targets": 12}'
RUN = [
    "--gin.MODEL_DIR=/tmp/nowhere",
    "--gin.TRAIN_STEPS=1",
    "--gin.INITIAL_CHECKPOINT_PATH=None",
    "--gin.VOCABULARY_FILE=None",
    '--gin.FILES={"train": "nowhere.jsonl"}',
]


def untrained(folder, *files, architecture="decoder_only", run="runs/finetune.gin", settings=(), edit=str):
    """A checkpoint as a training on JSON lines, in bytes, would leave it, but with random parameters.

    `edit` makes another text of its configuration.
    """
    files = [f"models/{architecture}.gin", "sizes/tiny.gin", *files[:1], run, "tasks/local_jsonl.gin", *files[1:]]
    size = [f"ModelConfig.{name}={value}" for name, value in SIZE.items()]
    given = [flag.removeprefix("--gin.") for flag in RUN]
    config.load(files, [*size, *given, f"TASK_FEATURE_LENGTHS={LENGTHS}", *settings])
    model = ModelConfig(**SIZE, architecture=architecture, tie_embeddings=architecture == "decoder_only")
    definition = ModelDefinition(model, token_ids(seqio.ByteVocabulary(extra_ids=100)))
    params = {name: np.asarray(leaf) for name, leaf in named_leaves(tiny.random_params(definition)).items()}
    output.save(folder, definition, params, edit(config.operative_text()))
    return folder
