"""Reads vocabularies from their files."""

import os

from diffusion_t5x.data.plain_vocabularies import ByteVocabulary
from diffusion_t5x.data.vocabularies import SENTINELS, sentinels
from diffusion_t5x.data.vocabulary import Vocabulary
from diffusion_t5x.errors import UserError


def vocabulary(file: str | None, extra_ids: int = SENTINELS, mask_id: int | None = None) -> Vocabulary:
    """A vocabulary by its file.

    Args:
      file: a Hugging Face tokenizer (.json, or merges.txt with vocab.json), llama2.c's (.bin), a SentencePiece model,
        which gets sentinels behind its own pieces unless it ends in sentinels, as mT5's does, and the tokens that files
        beside it add, or the config.json of a model without a tokenizer; None takes bytes.
      extra_ids: how many sentinels.
      mask_id: of MASK, in a vocabulary of Hugging Face's kind; None takes the one that its files name.

    Raises:
      UserError: there is no such file, or it has none of these formats.
    """
    if file is None:
        return ByteVocabulary(extra_ids=extra_ids)
    path = os.path.expanduser(file)
    if not os.path.isfile(path):
        raise UserError(
            f"There is no vocabulary file {file}: name a tokenizer's .json or .bin, a SentencePiece model, or None, "
            "with --gin.VOCABULARY_FILE=FILE."
        )
    if os.path.basename(path) == "config.json":
        from diffusion_t5x.data.id_vocabulary import IdVocabulary

        return IdVocabulary(path, mask_id)
    if path.endswith(".json") or os.path.basename(path) == "merges.txt":
        from diffusion_t5x.data.huggingface_vocabulary import HuggingFaceVocabulary

        return HuggingFaceVocabulary(path, mask_id)
    if path.endswith(".bin"):
        from diffusion_t5x.data.llama2c_vocabulary import Llama2cVocabulary

        return Llama2cVocabulary(path)
    from google.protobuf.message import DecodeError

    from diffusion_t5x.data.sentencepiece_vocabulary import SentencePieceVocabulary, with_added_tokens

    own = SentencePieceVocabulary(path)
    try:
        has_sentinels = len(sentinels(own)) > 0
    except (DecodeError, RuntimeError) as error:
        raise UserError(f"{file} is not a SentencePiece model.") from error
    return with_added_tokens(own, extra_ids=0 if has_sentinels else extra_ids)
