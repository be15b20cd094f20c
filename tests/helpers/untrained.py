"""Checkpoints as trainings would leave them, with random parameters."""

import dataclasses
import json
import pathlib

import numpy as np
import seqio
import tiny

from diffusion_t5x.checkpointing import checkpoints, manifest
from diffusion_t5x.command_line import config
from diffusion_t5x.data.vocabularies import token_ids
from diffusion_t5x.models.config import ModelConfig
from diffusion_t5x.models.transformer import ModelDefinition

SIZE = {"embed_dim": 16, "num_layers": 1, "num_heads": 2, "head_dim": 8, "mlp_dim": 32, "relative_buckets": 32}
LENGTHS = '{"inputs": 20, "targets": 12}'
RUN = [
    "--gin.MODEL_DIR=/tmp/nowhere",
    "--gin.TRAIN_STEPS=1",
    "--gin.INITIAL_CHECKPOINT_PATH=None",
    "--gin.VOCABULARY_FILE=None",
    '--gin.FILES={"train": "nowhere.jsonl"}',
]


def untrained(folder, *files, architecture="decoder_only", run="runs/finetune.gin", settings=(), form="old", edit=str):
    """A checkpoint as a training on JSON lines, in bytes, would leave it, but with random parameters.

    In the old form its metadata have no record, in the new one they do. `edit` makes another text of their
    configuration.
    """
    files = [f"models/{architecture}.gin", "sizes/tiny.gin", *files[:1], run, "tasks/local_jsonl.gin", *files[1:]]
    size = [f"ModelConfig.{name}={value}" for name, value in SIZE.items()]
    given = [flag.removeprefix("--gin.") for flag in RUN]
    config.load(files, [*size, *given, f"TASK_FEATURE_LENGTHS={LENGTHS}", *settings])
    model = ModelConfig(**SIZE, architecture=architecture, tie_embeddings=architecture == "decoder_only")
    definition = ModelDefinition(model, token_ids(seqio.ByteVocabulary(extra_ids=100)))
    save_old(folder, definition, tiny.random_params(definition), edit(config.operative_text()))
    if form == "new":
        give_record(folder)
    return folder


def save_old(folder, definition, params, text):
    """checkpoint_0 as it was written before checkpoints had records: a gin text says what the model is."""
    store = checkpoints.Checkpoints(str(pathlib.Path(folder, "checkpoints")), asynchronous=False)
    metadata = {"step": 0, "metrics": {}, "vocabulary": definition.vocabulary.describe(), "config": text}
    store.save(0, {"step": np.zeros((), np.int32), "params": params}, {}, metadata)
    store.close()


def give_record(folder, **changed):
    """Writes the record of the checkpoint in a folder into its metadata, with some fields changed."""
    checkpoint = checkpoints.open_checkpoint(str(folder))
    record = dataclasses.replace(checkpoint.record, **changed)
    metadata = checkpoint.metadata | record.metadata()
    (checkpoint.path / "metadata" / "metadata").write_text(json.dumps(metadata), encoding="utf-8")
    (checkpoint.path / "manifest.json").unlink()
    manifest.write(checkpoint.path)
