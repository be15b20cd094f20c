"""Rows of a `Batch` in numpy: code that all sources share, and the row layouts for sources without TensorFlow."""

import dataclasses
import itertools
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np

from diffusion_t5x.data.batch import Architecture, Batch
from diffusion_t5x.errors import UserError

Row = dict[str, np.ndarray]


def check_rows(task_feature_lengths: Mapping[str, int], batch_size: int, pack: bool, canvas: bool) -> None:
    """Raises a UserError if lengths or batch size are not positive, or packing and canvas are combined."""
    lengths = {f"{name} length": length for name, length in task_feature_lengths.items()}
    for name, number in {**lengths, "batch size": batch_size}.items():
        if not isinstance(number, int) or number < 1:
            raise UserError(f"The {name} must be a positive integer: {number!r}.")
    if pack and canvas:
        raise UserError("Packing and the target canvas exclude each other: set pack = False or canvas = False.")


def rows_of_shard(batch_size: int, num_shards: int, shard_index: int) -> np.ndarray:
    """Returns int32 `[batch_size / num_shards]`: a shard's rows in the global batch. Shards follow one another.

    Raises:
      UserError: the shards do not divide the batch.
    """
    if batch_size % num_shards:
        raise UserError(f"The batch size {batch_size} does not divide into {num_shards} shards.")
    rows = batch_size // num_shards
    return np.arange(shard_index * rows, (shard_index + 1) * rows, dtype=np.int32)


def fill_batches(
    examples: Iterable[tuple[Row, Any]], batch_size: int, pad_id: int
) -> Iterator[tuple[Batch, list[Any]]]:
    """Groups rows into batches with consecutive `example_ids`; empty rows (`segment_ids` 0) fill the last one.

    Args:
      examples: rows, each with any companion object.
      batch_size: number of rows in a batch.
      pad_id: token of the empty rows.

    Yields:
      A batch, and the companions of its rows that are not empty.
    """
    examples = iter(examples)
    for first in itertools.count(step=batch_size):
        group = list(itertools.islice(examples, batch_size))
        if not group:
            return
        empty = {name: np.full_like(x, pad_id if name.endswith("tokens") else 0) for name, x in group[0][0].items()}
        rows = [row for row, _ in group] + [empty] * (batch_size - len(group))
        arrays = {name: np.stack([row[name] for row in rows]) for name in empty}
        yield Batch(**arrays, example_ids=np.arange(first, first + batch_size, dtype=np.int32)), [x for _, x in group]


class LaidOut:
    """Rows of features with these lengths, for a model of this architecture."""

    task_feature_lengths: Mapping[str, int]
    architecture: Architecture

    @property
    def row_length(self) -> int:
        """Number of positions in the longest sequence that the model reads."""
        lengths = self.task_feature_lengths.values()
        return sum(lengths) if self.architecture == "decoder_only" else max(lengths)


@dataclasses.dataclass(frozen=True)
class RowLayout:
    """The layouts of `feature_converters.RowConverter`, token for token.

    An example first becomes `sequences`, which packing concatenates. Keys: "tokens" and "target_mask", and for an
    encoder-decoder "encoder_tokens".

    Attributes:
      task_feature_lengths: numbers of tokens in `inputs` (if there are any) and `targets`.
      architecture: the model's architecture.
      canvas: pad the targets to their length.
      pad_id: the pad token.
    """

    task_feature_lengths: Mapping[str, int]
    architecture: Architecture
    canvas: bool
    pad_id: int

    @property
    def lengths(self) -> dict[str, int]:
        """Lengths of a row's sequences, in tokens."""
        if self.architecture == "decoder_only":
            return dict.fromkeys(("tokens", "target_mask"), sum(self.task_feature_lengths.values()))
        targets = self.task_feature_lengths["targets"]
        return {"tokens": targets, "target_mask": targets, "encoder_tokens": self.task_feature_lengths["inputs"]}

    @property
    def fillers(self) -> dict[str, int | bool]:
        """Fill values of the empty positions in a row's sequences."""
        return {name: False if name == "target_mask" else self.pad_id for name in self.lengths}

    def sequences(self, example: Mapping[str, np.ndarray]) -> Row:
        """Returns the sequences of one example at their natural lengths."""
        targets = example["targets"].astype(np.int32)
        if self.canvas:
            blank = self.task_feature_lengths["targets"] - len(targets)
            targets = np.pad(targets, (0, blank), constant_values=self.pad_id)
        inputs = example["inputs"].astype(np.int32) if "inputs" in self.task_feature_lengths else targets[:0]
        if self.architecture == "encoder_decoder":
            return {"tokens": targets, "target_mask": np.ones(len(targets), bool), "encoder_tokens": inputs}
        tokens = np.concatenate([inputs, targets])
        return {"tokens": tokens, "target_mask": np.arange(len(tokens)) >= len(inputs)}

    def row(self, sequences: Row) -> Row:
        """Returns a row of one example."""
        packed: dict[str, np.ndarray] = {}
        for name, length in self.lengths.items():
            size = len(sequences[name])
            values = np.full(length, self.fillers[name], sequences[name].dtype)
            values[:size] = sequences[name]
            segment_ids, positions = np.zeros((2, length), np.int32)
            segment_ids[:size], positions[:size] = 1, np.arange(size)
            packed |= {name: values, f"{name}_segment_ids": segment_ids, f"{name}_positions": positions}
        return self.packed_row(packed)

    def packed_row(self, packed: Mapping[str, np.ndarray]) -> Row:
        """Returns a row from sequences that Grain has packed, with their `_segment_ids` and `_positions`."""
        row = {"target_mask": packed["target_mask"]}
        for prefix in ("", "encoder_") if self.architecture == "encoder_decoder" else ("",):
            row[f"{prefix}tokens"] = packed[f"{prefix}tokens"]
            row[f"{prefix}segment_ids"] = packed[f"{prefix}tokens_segment_ids"]
            row[f"{prefix}positions"] = packed[f"{prefix}tokens_positions"]
        return row
