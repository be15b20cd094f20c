"""SeqIO sources: records that Python reads, shuffled as a whole, and data sets that TFDS has prepared."""

import functools
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import seqio
import tensorflow as tf
import tensorflow_datasets as tfds

from diffusion_t5x.errors import UserError

_TFDS_NAME = re.compile(r"\w+(/[\w.+-]+)?(:[\d.*]+)?")
Record = Mapping[str, str | Sequence[str] | np.ndarray]


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


class _Records(seqio.FunctionDataSource):
    """A source that knows its files.

    Attributes:
      list_files: returns the files of a split.
    """

    list_files: Callable[[str], Sequence[str]]


def records(
    load: Callable[[str], Sequence[Record]], splits: Sequence[str], list_files: Callable[[str], Sequence[str]]
) -> seqio.DataSource:
    """Returns a source of records from Python: `load(split)` is called once, when first read.

    Args:
      load: returns a sequence of at least one record; the first one defines the fields. Texts become strings `[]`,
        lists of texts strings `[n]`, arrays of ids int32 `[n]`.
      splits: the splits that `load` knows.
      list_files: returns the files of a split.
    """
    load = functools.cache(load)

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

    source = _Records(dataset, splits=splits)
    source.list_files = list_files
    return source


class PreparedTfds(seqio.TfdsDataSource):
    """A TFDS data set that has been downloaded and prepared before: a run never starts a download of its own.

    Args:
      tfds_name: name and version, such as "squad/v1.1:3.0.0".
      splits: SeqIO's names of the splits, and TFDS' names or slices for them.

    Raises:
      UserError: a name with more than a data set, its config and version; on first reading, if it is not there.
    """

    def __init__(self, tfds_name: str, splits: Mapping[str, str]):
        if not _TFDS_NAME.fullmatch(tfds_name):
            # A namespace, as in "huggingface:x", would be looked up in the net; arguments could name another folder.
            raise UserError(f"{tfds_name!r} is no data set of TFDS: write its name as in 'squad/v1.1:3.0.0'.")
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
