"""Opens models for the Python API: checkpoints of this project, and models in the format of Hugging Face."""

import os

import jax
from flax import traverse_util
from jax.sharding import Mesh

from diffusion_t5x.checkpointing import checkpoints
from diffusion_t5x.checkpointing.rebuilding import model_config
from diffusion_t5x.checkpointing.record import Record
from diffusion_t5x.data import vocabulary_files
from diffusion_t5x.data.vocabularies import token_ids
from diffusion_t5x.data.vocabulary import AnyVocabulary
from diffusion_t5x.errors import UserError
from diffusion_t5x.evaluation.loading import abstract_params, load_model
from diffusion_t5x.importing import from_hf, hub
from diffusion_t5x.models.transformer import ModelDefinition, Params


def opened(
    name: str, mesh: Mesh, vocabulary: "str | AnyVocabulary | None"
) -> tuple[Record, AnyVocabulary, ModelDefinition, Params]:
    """Returns a model's record, vocabulary, structure and parameters; arguments as of `api.load`.

    Raises:
      UserError: there is no model of this name, it is broken, or its vocabulary is missing.
    """
    local = hub.local_folder(name)
    if from_hf.is_foreign(local):
        record, definition, streams = from_hf.in_memory(local)
        tokenizer = _vocabulary(record, local, name, vocabulary)
        abstract = traverse_util.flatten_dict(abstract_params(mesh, definition), sep="/")
        params = traverse_util.unflatten_dict(
            {path: jax.device_put(streams[path].whole().astype(x.dtype), x.sharding) for path, x in abstract.items()},
            sep="/",
        )
        return record, tokenizer, definition, params
    checkpoint = checkpoints.open_checkpoint(local)
    record = checkpoint.record
    tokenizer = _vocabulary(record, checkpoint.model_dir, name, vocabulary)
    definition, params = load_model(checkpoint, model_config(record, name), token_ids(tokenizer), mesh)
    return record, tokenizer, definition, params


def _vocabulary(
    record: Record, folder: str | os.PathLike, name: str, given: "str | AnyVocabulary | None"
) -> AnyVocabulary:
    if given is not None:
        return vocabulary_files.vocabulary(given) if isinstance(given, str) else given
    arguments = record.vocabulary_arguments(folder)
    if arguments is None:
        raise UserError(f"{name} does not say how its vocabulary is made: give vocabulary=FILE or a SeqIO vocabulary.")
    return vocabulary_files.vocabulary(**arguments)
