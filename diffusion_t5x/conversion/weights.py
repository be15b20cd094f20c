"""How weights lie there and here, said once for both ways."""

import dataclasses
import math
from collections.abc import Mapping, Sequence

import numpy as np

# Parameters with a row for each id, and the axis of the ids.
VOCABULARY_AXIS = {"embedding": 0, "head": 1}


@dataclasses.dataclass(frozen=True)
class Weight:
    """One parameter, or that of every layer.

    Attributes:
      theirs: its name there; `{}` stands for the number of a layer, whose arrays are stacked here.
      ours: its "/"-joined name here.
      inputs: so many first axes of ours are the inputs of a matrix, the others its outputs; 0 is a vector, flat there.
      transposed: the matrix is `[out, in]` there, not `[in, out]`.
    """

    theirs: str
    ours: str
    inputs: int = 1
    transposed: bool = True

    @property
    def stacked(self) -> bool:
        return "{}" in self.theirs

    def names(self, layers: int) -> list[str]:
        """The names there, of one or of every layer."""
        return [self.theirs.format(i) for i in range(layers)] if self.stacked else [self.theirs]

    def their_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        """Of one layer, from its shape here."""
        if not self.inputs:
            return (math.prod(shape),)
        matrix = (math.prod(shape[: self.inputs]), math.prod(shape[self.inputs :]))
        return matrix[::-1] if self.transposed else matrix

    def to_ours(self, array: np.ndarray, shape: Sequence[int]) -> np.ndarray:
        """One layer's array, in the shape it has here."""
        return (array.T if self.inputs and self.transposed else array).reshape(shape)

    def to_theirs(self, array: np.ndarray) -> np.ndarray:
        """The way back."""
        shape = self.their_shape(array.shape)
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
