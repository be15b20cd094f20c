"""Examples that were tokenised elsewhere, as JSON lines of ids: for vocabularies that are not at hand here."""

import functools
import json
import pathlib

import numpy as np
import seqio
import tensorflow as tf

from diffusion_t5x.errors import UserError

TASK = "token_ids"
FEATURES = ("inputs", "targets")


class TokenIdVocabulary(seqio.PassThroughVocabulary):
    """Ids for their own sake, with a pad id that need not be 0: in many vocabularies 0 is a piece of text."""

    def __init__(self, size: int, eos_id: int, pad_id: int):
        super().__init__(size, eos_id)
        self._pad_id = pad_id

    @property
    def pad_id(self) -> int:
        return self._pad_id

    def __eq__(self, other: object) -> bool:
        return super().__eq__(other) and self._pad_id == getattr(other, "_pad_id", None)


def register(train_file: str, validation_file: str, vocab_size: int, eos_id: int, pad_id: int) -> str:
    """Registers the SeqIO task `token_ids`, in place of an earlier one, and returns its name.

    Args:
      train_file, validation_file: UTF-8; a line is `{"inputs": [ids], "targets": [ids]}`, targets with their EOS. A
        line without targets is a prompt.
      vocab_size: ids of the vocabulary. MASK is the id behind them.
      eos_id, pad_id: of the vocabulary.

    Raises:
      UserError: a file that is not there; when it is read, a line (by its number) that is no such example.
    """
    files = {"train": train_file, "validation": validation_file}
    for file in files.values():
        if not pathlib.Path(file).expanduser().is_file():
            raise UserError(f"There is no file of token ids {file}.")

    @functools.cache
    def read(split: str) -> dict[str, tf.RaggedTensor]:
        with pathlib.Path(files[split]).expanduser().open(encoding="utf-8") as lines:
            found = [_example(line, vocab_size, f"{files[split]}, line {n}") for n, line in enumerate(lines, start=1)]
        return {name: _ragged([example[name] for example in found]) for name in FEATURES}

    def examples(split: str, shuffle_files: bool, seed: int | None = None) -> tf.data.Dataset:
        del shuffle_files, seed
        return tf.data.Dataset.from_tensor_slices(read(split))  # no generator: its position could not be saved

    feature = seqio.Feature(TokenIdVocabulary(vocab_size, eos_id, pad_id), add_eos=False)
    if TASK in seqio.TaskRegistry.names():
        seqio.TaskRegistry.remove(TASK)
    seqio.TaskRegistry.add(
        TASK,
        source=seqio.FunctionDataSource(examples, tuple(files)),
        preprocessors=[],
        output_features=dict.fromkeys(FEATURES, feature),
    )
    return TASK


def _ragged(rows: list[list[int]]) -> tf.RaggedTensor:
    values = np.array([token for row in rows for token in row], np.int32)
    return tf.RaggedTensor.from_row_lengths(values, np.array([len(row) for row in rows], np.int64))


def _example(line: str, vocab_size: int, where: str) -> dict[str, list[int]]:
    try:
        example = {"targets": [], **json.loads(line)}
        ids = {name: list(example[name]) for name in FEATURES}
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(
            f'{where}: expected {{"inputs": [ids], "targets": [ids]}}, not {line.strip()[:80]!r}.'
        ) from error
    if not all(isinstance(i, int) and 0 <= i < vocab_size for i in [*ids["inputs"], *ids["targets"]]):
        raise UserError(f"{where}: ids must be whole numbers from 0 to {vocab_size - 1}.")
    return ids
