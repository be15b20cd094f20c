"""Describes a checkpoint, and finds its vocabulary for prompts, without its task where it says enough."""

import jax

from diffusion_t5x.checkpointing.checkpoints import OpenCheckpoint
from diffusion_t5x.data import vocabulary_files
from diffusion_t5x.data.seqio_source import SeqioDataset
from diffusion_t5x.data.vocabulary import AnyVocabulary
from diffusion_t5x.errors import UserError
from diffusion_t5x.models.config import ModelConfig
from diffusion_t5x.models.transformer import ModelDefinition


def open_vocabulary(
    vocabulary: "AnyVocabulary | None", file: str | None, dataset: SeqioDataset | None
) -> AnyVocabulary:
    """Returns a model's vocabulary.

    Args:
      vocabulary: the vocabulary, if known.
      file: its file, see `data.vocabulary_files.vocabulary`.
      dataset: the model's task, which is asked if neither is given.

    Raises:
      UserError: nothing is given, or it cannot be read.
    """
    if vocabulary is not None:
        return vocabulary
    if file is not None:
        return vocabulary_files.vocabulary(file)
    if dataset is not None:
        return dataset.vocabulary()
    raise UserError(
        "The checkpoint names neither a task nor a vocabulary: give its file, --tokenizer FILE, or the task that "
        "it was trained on, --gin_file=tasks/... --gin.MIXTURE_OR_TASK_NAME=..."
    )


def about(checkpoint: OpenCheckpoint, definition: ModelDefinition) -> str:
    """Returns a line about a model: its checkpoint and step, how it was trained, its size, the device."""
    how = checkpoint.record.trained_by or "imported"
    step, size = checkpoint.metadata["step"], definition.num_params()
    return f"{checkpoint.named}, step {step}, {how}: {size:,} parameters on {jax.devices()[0].device_kind}"


def adds_eos(given: bool | None, dataset: SeqioDataset | None, model: ModelConfig) -> bool:
    """Returns True if prompts end in EOS: as given, as in the model's task, or for encoder-decoders."""
    if given is not None:
        return given
    if dataset is not None:
        return "inputs" in dataset.task_feature_lengths and dataset.adds_eos("inputs")
    return model.architecture == "encoder_decoder"
