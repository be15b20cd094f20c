"""Examples tokenised elsewhere, as JSON lines of ids, for vocabularies that are not available here."""

import dataclasses
import functools
from typing import TYPE_CHECKING, Any

import numpy as np

from diffusion_t5x.data import text_files
from diffusion_t5x.data.plain_vocabularies import TokenIdVocabulary
from diffusion_t5x.tasks import readers, registration

if TYPE_CHECKING:
    import tensorflow as tf

TASK = "token_ids"
FEATURES = ("inputs", "targets")


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
    def read(split: str) -> dict[str, "tf.RaggedTensor"]:
        lines = readers.Jsonl().read(files[split])
        found = list(dataclasses.replace(lines, parse=lambda i: _example(lines.parse(i), vocab_size)))
        return {name: _ragged([example[name] for example in found]) for name in FEATURES}

    def examples(split: str, shuffle_files: bool, seed: int | None = None) -> "tf.data.Dataset":
        import tensorflow as tf

        del shuffle_files, seed
        return tf.data.Dataset.from_tensor_slices(read(split))  # no generator: its position could not be saved

    def make() -> dict[str, Any]:
        import seqio

        feature = seqio.Feature(TokenIdVocabulary(vocab_size, eos_id, pad_id), add_eos=False)
        return {
            "source": seqio.FunctionDataSource(examples, tuple(files)),
            "preprocessors": [],
            "output_features": dict.fromkeys(FEATURES, feature),
        }

    return registration.add(TASK, make)


def _ragged(rows: list[list[int]]) -> "tf.RaggedTensor":
    import tensorflow as tf

    values = np.array([token for row in rows for token in row], np.int32)
    return tf.RaggedTensor.from_row_lengths(values, np.array([len(row) for row in rows], np.int64))


def _example(fields: readers.Fields, vocab_size: int) -> dict[str, list[int]]:
    ids = {"targets": [], **fields}
    if not all(isinstance(ids.get(name), list) for name in FEATURES):
        raise ValueError('expected {"inputs": [ids], "targets": [ids]}.')
    if not all(type(i) is int and 0 <= i < vocab_size for name in FEATURES for i in ids[name]):
        raise ValueError(f"ids must be whole numbers from 0 to {vocab_size - 1}.")
    return {name: ids[name] for name in FEATURES}
