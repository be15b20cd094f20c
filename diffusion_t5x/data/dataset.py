"""What training, evaluation and dry runs ask of a data set, wherever its rows come from."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

from diffusion_t5x.data.batch import Architecture, Batch
from diffusion_t5x.data.vocabularies import TokenIds


class Dataset(Protocol):
    """A data set: `seqio_source.SeqioDataset`, `cached_source.CachedDataset`, `templates.Templates`.

    Attributes:
      name: in messages.
      architecture: of the models that its rows are laid out for.
      task_feature_lengths: tokens, by feature.
      row_length: tokens of a row of the model's decoder.
      batch_size: rows.
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
        """Raises a UserError where settings do not fit the data; reads no examples."""

    def token_ids(self) -> TokenIds: ...

    def eval_batches(self, num_examples: int | None = None) -> Iterator[tuple[Batch, Sequence[Mapping[str, Any]]]]:
        """The evaluation set in order, with the examples' texts."""
