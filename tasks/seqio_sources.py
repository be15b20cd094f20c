"""SeqIO's sources that the tasks are read from. Imports SeqIO: import it inside functions."""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import seqio
import tensorflow as tf
import tensorflow_datasets as tfds

from diffusion_t5x.errors import UserError
from diffusion_t5x.tasks.sources import Record


def index_blocks(size: int, shuffle: bool, seed: int | None) -> tf.data.Dataset:
    """Returns the numbers below `size` in blocks of at most 64, in order or in a pseudorandom order, new each epoch.

    It needs no buffer of examples, which would make checkpoints large.
    """
    blocks = tf.data.Dataset.range(size).batch(64)  # TensorFlow's cost is by the call
    if not shuffle:
        return blocks
    shuffled = functools.partial(tf.random.experimental.index_shuffle, max_index=size - 1)
    # Two numbers that differ from epoch to epoch.
    epoch = tf.data.Dataset.range(256).shuffle(256, seed=seed).batch(2, drop_remainder=True).take(1)
    return epoch.flat_map(lambda key: blocks.map(lambda indices: shuffled(indices, key)))


class RecordSource(seqio.FunctionDataSource):
    """A source that knows its files.

    Attributes:
      list_files: the files of a split.
    """

    list_files: Callable[[str], Sequence[str]]


def records(
    load: Callable[[str], Sequence[Record]], splits: Sequence[str], list_files: Callable[[str], Sequence[str]]
) -> RecordSource:
    """Returns the source of `sources.Records`: texts are strings `[]`, lists of them `[n]`, ids int32 `[n]`."""

    def dataset(split: str, shuffle_files: bool, seed: int | None = None) -> tf.data.Dataset:
        found = load(split)
        shapes = {name: [] if isinstance(value, str) else [None] for name, value in found[0].items()}
        dtypes = [tf.int32 if isinstance(value, np.ndarray) else tf.string for value in found[0].values()]

        def read(index: np.ndarray) -> list[np.ndarray]:
            record = found[int(index)]
            return [np.array(record[name], dtype.as_numpy_dtype) for name, dtype in zip(shapes, dtypes, strict=True)]

        def look_up(index: tf.Tensor) -> dict[str, tf.Tensor]:
            # Stateless: else no position in the data could be saved.
            values = tf.numpy_function(read, [index], dtypes, stateful=False)
            return {name: tf.ensure_shape(x, shapes[name]) for name, x in zip(shapes, values, strict=True)}

        indices = index_blocks(len(found), shuffle_files, seed).unbatch()
        return indices.map(look_up).apply(tf.data.experimental.assert_cardinality(len(found)))

    source = RecordSource(dataset, splits=splits)
    source.list_files = list_files
    return source


class TfdsSource(seqio.TfdsDataSource):
    """The source of `sources.PreparedTfds`, with its arguments."""

    def __init__(self, tfds_name: str, splits: Mapping[str, str]):
        super().__init__(tfds_name=tfds_name, splits=dict(splits), read_only=True)

    def get_dataset(self, *args: Any, **kwargs: Any) -> tf.data.Dataset:
        self._check()
        return super().get_dataset(*args, **kwargs)

    def list_shards(self, split: str) -> Sequence[str]:
        self._check()
        return super().list_shards(split)

    def num_input_examples(self, split: str) -> int | None:
        self._check()
        return super().num_input_examples(split)

    def _check(self) -> None:
        name = self.tfds_dataset.name
        try:
            # Not the loader's own builder, which is kept and would not see what is prepared later.
            builder = tfds.builder(name, data_dir=self.tfds_dataset.data_dir)
        except (tfds.core.DatasetNotFoundError, ValueError) as error:
            raise UserError(f"TFDS has no data set {name!r}: {str(error).strip().splitlines()[0]}") from error
        if not builder.is_prepared():
            raise UserError(
                f"The TFDS data set {name!r} is not in {builder.data_dir}. Prepare it once with `tfds build {name}`, "
                "or name the folder that has it with --tfds_data_dir."
            )


def columns(load: Callable[[str], Mapping[str, Sequence[str]]], splits: Sequence[str]) -> seqio.DataSource:
    """Returns the source of `sources.Columns`."""

    def dataset(split: str, shuffle_files: bool, seed: int | None = None) -> tf.data.Dataset:
        table = {name: tf.constant(texts) for name, texts in load(split).items()}
        blocks = index_blocks(len(next(iter(table.values()))), shuffle_files, seed)
        return blocks.map(lambda indices: {name: tf.gather(texts, indices) for name, texts in table.items()}).unbatch()

    return seqio.FunctionDataSource(dataset, splits=splits)


class Shots(seqio.experimental.FewshotDataSource):
    """SeqIO's source of examples with shots, each of them another training example."""

    def get_dataset(self, *args: Any, **kwargs: Any) -> tf.data.Dataset:
        available = self._original_source.get_dataset("train", shuffle=False).cardinality().numpy()
        if 0 <= available < self._num_shots:  # it is negative where SeqIO does not know it
            raise UserError(
                f"There are {available} training examples for {self._num_shots} shots: lower NUM_SHOTS, or give more."
            )
        return super().get_dataset(*args, **kwargs)
