"""The layouts of weights in the source and here, for both import and export."""

import dataclasses
import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import Protocol

import numpy as np

# Parameters with a row for each id, and the axis of the ids.
VOCABULARY_AXIS = {"embedding": 0, "head": 1}


class Shaped(Protocol):
    """An array that has not been read."""

    @property
    def shape(self) -> tuple[int, ...]: ...


class Source(Protocol):
    """Where a model's arrays lie: a folder whose headers have been read, and no weights yet.

    Attributes:
      path: the folder.
      tensors: the arrays by name.
    """

    @property
    def path(self) -> pathlib.Path: ...

    @property
    def tensors(self) -> Mapping[str, Shaped]: ...

    def read(self, name: str, start: int = 0, stop: int | None = None, axis: int = 0) -> np.ndarray:
        """An array as float32, or what lies between two indices of an axis."""
        ...


@dataclasses.dataclass(frozen=True)
class Weight:
    """One parameter, or that of every layer.

    Attributes:
      theirs: its name there; `{}` stands for the number of a layer, whose arrays are stacked here.
      ours: its "/"-joined name here.
      inputs: so many first axes of ours are the inputs of a matrix, the others its outputs; 0 is a vector, flat there.
      transposed: the matrix is `[out, in]` there, not `[in, out]`.
      part: of a tensor there whose last axis holds several of ours, one behind the other: which one, of how many.
      rows: of a tensor there whose first axis holds several of ours: where it begins and ends, and how many all are.
    """

    theirs: str
    ours: str
    inputs: int = 1
    transposed: bool = True
    part: tuple[int, int] = (0, 1)
    rows: tuple[int, int, int] | None = None

    @property
    def stacked(self) -> bool:
        return "{}" in self.theirs

    def names(self, layers: int) -> list[str]:
        """The names there, of one or of every layer."""
        return [self.theirs.format(i) for i in range(layers)] if self.stacked else [self.theirs]

    def their_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        """Shape of one layer's tensor in the source, from our shape."""
        *rest, last = self._matrix(shape)
        if self.rows is not None:
            return (self.rows[2], last)
        return (*rest, last * self.part[1])

    @property
    def joined_axis(self) -> int:
        """The axis of a tensor there on which the parts lie."""
        return -1 if self.rows is None else 0

    def _matrix(self, shape: Sequence[int]) -> tuple[int, ...]:
        if not self.inputs:
            return (math.prod(shape),)
        matrix = (math.prod(shape[: self.inputs]), math.prod(shape[self.inputs :]))
        return matrix[::-1] if self.transposed else matrix

    def to_ours(self, array: np.ndarray, shape: Sequence[int]) -> np.ndarray:
        """One layer's array, from its tensor, in the shape it has here."""
        number, parts = self.part
        array = np.split(array, parts, axis=-1)[number] if self.rows is None else array[slice(*self.rows[:2])]
        return (array.T if self.inputs and self.transposed else array).reshape(shape)

    def to_theirs(self, array: np.ndarray) -> np.ndarray:
        """The way back, to a part of the tensor."""
        shape = self._matrix(array.shape)
        return array.reshape(shape[::-1]).T if self.inputs and self.transposed else array.reshape(shape)


def vector(theirs: str, ours: str) -> Weight:
    return Weight(theirs, ours, inputs=0)


def table(theirs: str, ours: str) -> Weight:
    """With a row for each id, bucket or position, there and here."""
    return Weight(theirs, ours, transposed=False)


def under(prefix: Mapping[str, str], *weights: Weight) -> tuple[Weight, ...]:
    """The weights with their names below a prefix, there (the key) and here (the value)."""
    ((theirs, ours),) = prefix.items()
    return tuple(dataclasses.replace(w, theirs=f"{theirs}{w.theirs}", ours=f"{ours}{w.ours}") for w in weights)
