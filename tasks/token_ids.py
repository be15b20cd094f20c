"""Examples tokenised elsewhere, as JSON lines of ids, for vocabularies that are not available here."""

import dataclasses
import functools

import numpy as np
import seqio
import tensorflow as tf

from diffusion_t5x.data import text_files
from diffusion_t5x.tasks import readers, registration

TASK = "token_ids"
FEATURES = ("inputs", "targets")


class TokenIdVocabulary(seqio.PassThroughVocabulary):
    """Ids without texts, with a pad id that need not be 0: in many vocabularies 0 is a piece of text."""

    def __init__(self, size: int, eos_id: int, pad_id: int):
        super().__init__(size, eos_id)
        self._pad_id = pad_id

    @property
    def pad_id(self) -> int:
        return self._pad_id

    def __eq__(self, other: object) -> bool:
        return super().__eq__(other) and self._pad_id == getattr(other, "_pad_id", None)


def register(train_file: str, validation_file: str, vocab_size: int, eos_id: int, pad_id: int) -> str:
    """Registers the SeqIO task `token_ids`, replacing any earlier one, and returns its name.

    Args:
      train_file, validation_file: JSON lines, optionally with .gz: `{"inputs": [ids], "targets": [ids]}`, with EOS in
        the targets. A line without targets is a prompt.
      vocab_size: number of ids in the vocabulary. MASK is the next id.
      eos_id, pad_id: ids in the vocabulary.

    Raises:
      UserError: a file does not exist; on reading, a line (named by its number) is not such an example.
    """
    files = {"train": text_files.expand(train_file), "validation": text_files.expand(validation_file)}

    @functools.cache
    def read(split: str) -> dict[str, tf.RaggedTensor]:
        lines = readers.Jsonl().read(files[split])
        found = list(dataclasses.replace(lines, parse=lambda i: _example(lines.parse(i), vocab_size)))
        return {name: _ragged([example[name] for example in found]) for name in FEATURES}

    def examples(split: str, shuffle_files: bool, seed: int | None = None) -> tf.data.Dataset:
        del shuffle_files, seed
        return tf.data.Dataset.from_tensor_slices(read(split))  # no generator: its position could not be saved

    feature = seqio.Feature(TokenIdVocabulary(vocab_size, eos_id, pad_id), add_eos=False)
    return registration.add(
        TASK,
        source=seqio.FunctionDataSource(examples, tuple(files)),
        preprocessors=[],
        output_features=dict.fromkeys(FEATURES, feature),
    )


def _ragged(rows: list[list[int]]) -> tf.RaggedTensor:
    values = np.array([token for row in rows for token in row], np.int32)
    return tf.RaggedTensor.from_row_lengths(values, np.array([len(row) for row in rows], np.int64))


def _example(fields: readers.Fields, vocab_size: int) -> dict[str, list[int]]:
    ids = {"targets": [], **fields}
    if not all(isinstance(ids.get(name), list) for name in FEATURES):
        raise ValueError('expected {"inputs": [ids], "targets": [ids]}.')
    if not all(type(i) is int and 0 <= i < vocab_size for name in FEATURES for i in ids[name]):
        raise ValueError(f"ids must be whole numbers from 0 to {vocab_size - 1}.")
    return {name: ids[name] for name in FEATURES}
