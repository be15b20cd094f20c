"""Finds the examples behind training rows, which hold their tokens alone."""

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from diffusion_t5x.data.batch import Batch
from diffusion_t5x.data.dataset import Dataset
from diffusion_t5x.errors import UserError

logger = logging.getLogger(__name__)

Example = Mapping[str, Any]


class Examples:
    """The examples of a data set, by the tokens of their inputs and targets. All are read at the start and kept.

    Args:
      dataset: its split is read once, as `eval_batches` yields it.

    Raises:
      UserError: two examples with the same tokens have different fields.
    """

    def __init__(self, dataset: Dataset):
        self._name = dataset.name
        self._found: dict[tuple[bytes, bytes], Example] = {}
        for batch, examples in dataset.eval_batches():
            for key, example in zip(_keys(batch), examples, strict=False):  # the last batch is filled up
                if _fields(self._found.setdefault(key, example)) != _fields(example):
                    raise UserError(
                        f"{self._name} has two examples with equal tokens and different fields, which a reward could "
                        f"not tell apart: {example['inputs_pretokenized'][:80]!r}. Raise TASK_FEATURE_LENGTHS."
                    )
        logger.info("%s: %d examples are kept for rewards", self._name, len(self._found))

    def of(self, batch: Batch) -> list[Example]:
        """Returns the example of each row, one a row: see `Dataset.eval_batches`.

        Raises:
          UserError: it was not among the examples, as when preprocessors draw at random.
        """
        try:
            return [self._found[key] for key in _keys(batch)]
        except KeyError:
            raise UserError(
                f"A reward needs the example behind each prompt, but {self._name} yields other tokens in training than "
                "in evaluation: its preprocessors must not draw at random."
            ) from None


def _keys(batch: Batch) -> Sequence[tuple[bytes, bytes]]:
    targets, asked = np.asarray(batch.tokens, np.int32), np.asarray(batch.target_mask)
    inputs, given = targets, np.asarray(batch.input_mask)
    if batch.encoder_tokens is not None:
        inputs, given = np.asarray(batch.encoder_tokens, np.int32), np.asarray(batch.encoder_segment_ids) > 0
    rows = zip(inputs, given, targets, asked, strict=True)
    return [(read[is_read].tobytes(), row[is_asked].tobytes()) for read, is_read, row, is_asked in rows]


def _fields(example: Example) -> dict[str, Any]:
    return {name: value for name, value in example.items() if name != "example_id"}
