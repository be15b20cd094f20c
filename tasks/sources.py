"""Sources of tasks: records that Python reads, shuffled as a whole, and data sets that TFDS has prepared.

These say what there is; `in_seqio` makes SeqIO's source of it, which imports SeqIO.
"""

import dataclasses
import functools
import re
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from diffusion_t5x.errors import UserError

if TYPE_CHECKING:
    import seqio

_TFDS_NAME = re.compile(r"\w+(/[\w.+-]+)?(:[\d.*]+)?")
Record = Mapping[str, str | Sequence[str] | np.ndarray]


class Records:
    """Records that Python holds or finds in its files.

    Args:
      load: gives a sequence of at least one record; the first one tells the fields: texts, lists of texts or int32 ids.
        It is called once for a split.
      splits: what `load` knows.
      list_files: the files of a split.
    """

    def __init__(
        self, load: Callable[[str], Sequence[Record]], splits: Sequence[str], list_files: Callable[[str], Sequence[str]]
    ):
        self.load, self.splits, self.list_files = functools.cache(load), splits, list_files

    def check(self, split: str) -> None:
        self.load(split)

    def in_seqio(self) -> "seqio.DataSource":
        from diffusion_t5x.tasks import seqio_sources

        return seqio_sources.records(self.load, self.splits, self.list_files)


@dataclasses.dataclass(frozen=True)
class Columns:
    """Texts held in memory: `load(split)` gives equally long lists by field, and is called when they are first read."""

    load: Callable[[str], Mapping[str, Sequence[str]]]
    splits: Sequence[str]

    def check(self, split: str) -> None:
        pass  # they are no files

    def in_seqio(self) -> "seqio.DataSource":
        from diffusion_t5x.tasks import seqio_sources

        return seqio_sources.columns(self.load, self.splits)


@dataclasses.dataclass(frozen=True)
class PreparedTfds:
    """A TFDS data set that has been downloaded and prepared before: a run never starts a download of its own.

    Attributes:
      tfds_name: name and version, such as "squad/v1.1:3.0.0".
      tfds_splits: SeqIO's names of the splits, and TFDS' names or slices for them.

    Raises:
      UserError: a name with more than a data set, its config and version.
    """

    tfds_name: str
    tfds_splits: Mapping[str, str]

    def __post_init__(self) -> None:
        if not _TFDS_NAME.fullmatch(self.tfds_name):
            # A namespace, as in "huggingface:x", would be looked up in the net; arguments could name another folder.
            raise UserError(f"{self.tfds_name!r} is not a TFDS data set: write its name as in 'squad/v1.1:3.0.0'.")

    @property
    def splits(self) -> Sequence[str]:
        return list(self.tfds_splits)

    def check(self, split: str) -> None:
        pass  # TFDS imports TensorFlow

    def in_seqio(self) -> "seqio.DataSource":
        """SeqIO's source, which raises a UserError on first reading if the data set is not there."""
        from diffusion_t5x.tasks import seqio_sources

        return seqio_sources.TfdsSource(self.tfds_name, self.tfds_splits)
