"""Finds a model's vocabulary for prompts, without its task where the checkpoint says enough."""

from collections.abc import Mapping

from diffusion_t5x.data import vocabulary_files
from diffusion_t5x.data.seqio_source import SeqioDataset
from diffusion_t5x.data.vocabulary import AnyVocabulary
from diffusion_t5x.errors import UserError
from diffusion_t5x.models.config import ModelConfig


def open_vocabulary(
    vocabulary: "AnyVocabulary | None",
    file: str | None,
    adds_eos: bool | None,
    task: str | None,
    task_feature_lengths: Mapping[str, int] | None,
    model: ModelConfig,
) -> tuple[AnyVocabulary, bool]:
    """Returns a model's vocabulary, and whether EOS ends its prompts.

    Args:
      vocabulary: the vocabulary, if known.
      file: its file, see `data.vocabulary_files.vocabulary`.
      adds_eos: whether EOS ends prompts, if known.
      task: supplies what the others leave open. Without it, only encoder-decoders get EOS after the prompt.
      task_feature_lengths: of the task.
      model: the model's dimensions.

    Raises:
      UserError: neither a vocabulary nor a task is given, or they cannot be read.
    """
    dataset = None if task is None else SeqioDataset(task, task_feature_lengths or {})
    if vocabulary is None and file is not None:
        vocabulary = vocabulary_files.vocabulary(file)
    elif vocabulary is None and dataset is not None:
        vocabulary = dataset.vocabulary()
    elif vocabulary is None:
        raise UserError(
            "The checkpoint names neither a task nor a vocabulary: give its file, --tokenizer FILE, or the task that "
            "it was trained on, --gin_file=tasks/... --gin.MIXTURE_OR_TASK_NAME=..."
        )
    if adds_eos is None and dataset:
        adds_eos = "inputs" in dataset.task_feature_lengths and dataset.adds_eos("inputs")
    elif adds_eos is None:
        adds_eos = model.architecture == "encoder_decoder"
    return vocabulary, adds_eos
