"""SeqIO's vocabularies as the project's own, and back. Imports SeqIO: import it inside functions."""

import seqio

from diffusion_t5x.data.plain_vocabularies import ByteVocabulary, TokenIdVocabulary
from diffusion_t5x.data.sentencepiece_vocabulary import SentencePieceVocabulary, tf_tokenizer
from diffusion_t5x.data.vocabulary import Vocabulary
from diffusion_t5x.errors import UserError


def own(vocabulary: seqio.Vocabulary) -> Vocabulary:
    """One of SeqIO's vocabularies as the project's own; see `vocabulary.own`."""
    if vocabulary.eos_id is None:
        raise UserError(f"{type(vocabulary).__name__} has no EOS id: a target's end could not be written.")
    if isinstance(vocabulary, seqio.SentencePieceVocabulary):
        return _OfSeqio(vocabulary)
    if isinstance(vocabulary, seqio.ByteVocabulary):
        return ByteVocabulary(vocabulary.extra_ids)
    if isinstance(vocabulary, seqio.PassThroughVocabulary):
        return TokenIdVocabulary(vocabulary.vocab_size, vocabulary.eos_id, vocabulary.pad_id)
    raise UserError(
        f"{type(vocabulary).__name__} is not supported: use SeqIO's SentencePiece, Byte or PassThroughVocabulary, "
        "HuggingFaceVocabulary or Llama2cVocabulary."
    )


def in_seqio(vocabulary: Vocabulary) -> Vocabulary | seqio.Vocabulary:
    """SeqIO's own vocabulary of the same class and file, if it has one, so that tasks with either can be mixed."""
    if type(vocabulary) is ByteVocabulary:
        return seqio.ByteVocabulary(vocabulary.extra_ids)
    if type(vocabulary) is SentencePieceVocabulary and not vocabulary.added:
        return _SharedTokenizer(vocabulary.file, vocabulary.extra_ids)
    return vocabulary


class _OfSeqio(SentencePieceVocabulary):
    """The model of a vocabulary of SeqIO."""

    def __init__(self, vocabulary: seqio.SentencePieceVocabulary):
        super().__init__(vocabulary.sentencepiece_model_file, vocabulary.extra_ids)
        self._vocabulary = vocabulary

    @property
    def _model(self):
        return self._vocabulary.sp_model, self._vocabulary.tokenizer, self._vocabulary.vocab_size


class _SharedTokenizer(seqio.SentencePieceVocabulary):
    """SeqIO's, with one TensorFlow tokenizer for all graphs. SeqIO's loads the model, and logs, for each iterator."""

    @property
    def tf_tokenizer(self):
        return tf_tokenizer(self.sp_model)


_SharedTokenizer.__name__ = SentencePieceVocabulary.__name__  # for messages and checkpoints
