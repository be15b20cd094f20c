"""The interface of data sets for training, evaluation and dry runs."""

import abc
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

from diffusion_t5x.data.batch import Architecture, Batch
from diffusion_t5x.data.vocabularies import TokenIds, cells, signs, to_text, token_ids
from diffusion_t5x.data.vocabulary import AnyVocabulary


class Dataset(Protocol):
    """A data set: `seqio_source.SeqioDataset`, `cached_source.CachedDataset`, `templates.Templates`.

    Attributes:
      name: name in messages.
      architecture: the architecture that its rows are laid out for.
      task_feature_lengths: maximum number of tokens, by feature.
      row_length: number of tokens in a row of the model's decoder.
      batch_size: number of rows.
      pack: rows may hold several examples.
    """

    @property
    def name(self) -> str: ...

    @property
    def architecture(self) -> Architecture: ...

    @property
    def task_feature_lengths(self) -> Mapping[str, int]: ...

    @property
    def row_length(self) -> int: ...

    @property
    def batch_size(self) -> int: ...

    @property
    def pack(self) -> bool: ...

    def check(self) -> None:
        """Raises a UserError if settings do not fit the data, or files that Python reads are broken."""

    def token_ids(self) -> TokenIds: ...

    def eval_batches(self, num_examples: int | None = None) -> Iterator[tuple[Batch, Sequence[Mapping[str, Any]]]]:
        """Yields the evaluation set in order, with the examples' texts."""


class OfTexts(abc.ABC):
    """The vocabulary's share of a data set."""

    @abc.abstractmethod
    def vocabulary(self) -> AnyVocabulary:
        """The vocabulary that turns targets into text."""

    def token_ids(self) -> TokenIds:
        """The vocabulary's special ids and size, for models, objectives and decoders."""
        return token_ids(self.vocabulary())

    def to_text(self, tokens: Sequence[int]) -> str:
        """Returns the text of target tokens, up to EOS or the first pad."""
        return to_text(self.vocabulary(), tokens)

    def cells(self, tokens: Sequence[int]) -> list[str]:
        """Returns the texts of all target tokens, one each; joined they are the text: EOS as ¶, pad as ·, MASK as ▢."""
        return cells(self.vocabulary(), tokens, signs(self.vocabulary()))
