"""Counts examples that are longer than the model's features, which SeqIO cuts silently."""

import functools
import logging
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import seqio

logger = logging.getLogger(__name__)


class CutCounter:
    """Counts, in the examples it sees, the features that were truncated to their first tokens (and EOS).

    Features without a pretokenized text, such as chunks of documents, count as whole.

    Args:
      lengths: number of tokens of each feature, EOS included.
      features: SeqIO's features, by name.

    Attributes:
      lengths: as given.
      examples: number of examples seen.
      cut: number of cut examples, by feature.
    """

    def __init__(self, lengths: Mapping[str, int], features: Mapping[str, "seqio.Feature"]):
        self.lengths = lengths
        self._features = features
        self.examples = 0
        self.cut = dict.fromkeys(lengths, 0)

    def add(self, example: Mapping[str, Any]) -> None:
        """Adds one example as SeqIO yields it, in numpy."""
        self.examples += 1
        for name, length in self.lengths.items():
            text = example.get(f"{name}_pretokenized")
            if text is not None and len(example[name]) == length:  # else nothing was cut, nor need be encoded again
                feature = self._features[name]
                self.cut[name] += len(feature.vocabulary.encode(text.decode())) + feature.add_eos > length

    def watch(self, examples: Iterable[tuple[Any, Mapping[str, Any]]], name: str) -> Iterator[tuple[Any, Any]]:
        """Yields (row, example) pairs unchanged; after the last one, logs what was truncated in the data set `name`."""
        for row, example in examples:
            self.add(example)
            yield row, example
        for feature, count in self.cut.items():
            if count:
                _warn_once(
                    f"{name}: the {feature} of {count} of {self.examples} examples are longer than "
                    f"{self.lengths[feature]} tokens and end there (TASK_FEATURE_LENGTHS)"
                )


@functools.cache
def _warn_once(message: str) -> None:
    logger.warning(message)
