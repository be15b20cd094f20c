"""The layouts of weights in the source and here, for import and export."""

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
    """A source of a model's arrays: a folder whose headers have been read, but no weights.

    Attributes:
      path: path of the folder.
      tensors: arrays by name.
    """

    @property
    def path(self) -> pathlib.Path: ...

    @property
    def tensors(self) -> Mapping[str, Shaped]: ...

    def read(self, name: str, start: int = 0, stop: int | None = None, axis: int = 0) -> np.ndarray:
        """Returns an array as float32, or its part between two indices of an axis."""
        ...


@dataclasses.dataclass(frozen=True)
class Weight:
    """One parameter, or one per layer, or one per expert of each layer.

    Attributes:
      theirs: its name in the source; `{}` stands for the number of a layer and `{expert}` for that of an expert, whose
        arrays are stacked here.
      ours: its "/"-joined name here.
      inputs: number of leading axes of ours that are a matrix's inputs, the others being its outputs; 0 for a vector,
        which is flat in the source.
      transposed: the matrix is `[out, in]` in the source, not `[in, out]`.
      part: for a source tensor whose last axis concatenates several of ours: index and number of parts.
      rows: for a source tensor whose first axis concatenates several of ours: start and end of this one, and the total.
      layers: the first of the layers that are stacked, and the one after the last; None: all.
      experts: number of experts in a layer; None: the parameter is none of experts.
    """

    theirs: str
    ours: str
    inputs: int = 1
    transposed: bool = True
    part: tuple[int, int] = (0, 1)
    rows: tuple[int, int, int] | None = None
    layers: tuple[int, int] | None = None
    experts: int | None = None

    @property
    def stacked(self) -> bool:
        return "{}" in self.theirs

    @property
    def stacked_axes(self) -> int:
        """Number of our first axes along which arrays of the source are stacked: layers, experts."""
        return int(self.stacked) + (self.experts is not None)

    def stack(self, layers: int) -> tuple[int, ...]:
        """Returns the sizes of these axes, for a model with this number of layers."""
        first, end = self.layers or (0, layers)
        return (*([end - first] if self.stacked else []), *([] if self.experts is None else [self.experts]))

    def names_in(self, layer: int) -> list[str]:
        """Returns the names in the source of what lies in one layer, one or one per expert."""
        experts = [0] if self.experts is None else range(self.experts)
        return [self.theirs.format(layer, expert=expert) for expert in experts]

    def names(self, layers: int) -> list[str]:
        """Returns the names in the source, one, or one per layer, or one per layer and expert."""
        if not self.stacked:
            return [self.theirs]
        return [name for layer in range(*(self.layers or (0, layers))) for name in self.names_in(layer)]

    def their_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        """Returns the shape of one tensor in the source, from our shape without the stacked axes."""
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
        """Returns one array in our shape without the stacked axes, from its tensor."""
        number, parts = self.part
        array = np.split(array, parts, axis=-1)[number] if self.rows is None else array[slice(*self.rows[:2])]
        return (array.T if self.inputs and self.transposed else array).reshape(shape)

    def to_theirs(self, array: np.ndarray) -> np.ndarray:
        """Returns our array as a part of the source's tensor; the inverse of `to_ours`."""
        shape = self._matrix(array.shape)
        return array.reshape(shape[::-1]).T if self.inputs and self.transposed else array.reshape(shape)


def vector(theirs: str, ours: str) -> Weight:
    return Weight(theirs, ours, inputs=0)


def table(theirs: str, ours: str) -> Weight:
    """Returns the weight of a table with a row for each id, bucket or position."""
    return Weight(theirs, ours, transposed=False)


def under(prefix: Mapping[str, str], *weights: Weight) -> tuple[Weight, ...]:
    """Returns the weights with prefixes: `prefix` maps their prefix in the source to ours."""
    ((theirs, ours),) = prefix.items()
    return tuple(dataclasses.replace(w, theirs=f"{theirs}{w.theirs}", ours=f"{ours}{w.ours}") for w in weights)
