"""The output of a model: hidden states, and the model's own losses."""

from collections.abc import Mapping
from typing import Self

import flax.struct
import jax
import jax.numpy as jnp

from diffusion_t5x.shapes import FloatBLD, FloatScalar


class Ratio(flax.struct.PyTreeNode):
    """A mean with separate numerator and denominator, so that it adds up over microbatches and hosts."""

    numerator: FloatScalar
    denominator: FloatScalar

    def __add__(self, other: Self) -> Self:
        return jax.tree.map(jnp.add, self, other)

    def mean(self) -> FloatScalar:
        """The mean; 0 if there is nothing to average."""
        return self.numerator / self.divisor

    @property
    def divisor(self) -> FloatScalar:
        """The denominator; 1 if there is nothing to average."""
        return jnp.where(self.denominator == 0, 1, self.denominator)


class Auxiliary(flax.struct.PyTreeNode):
    """A loss of the model's own, such as how unevenly a router uses its experts; or a statistic, of weight 0.

    Attributes:
      ratio: usually a mean over tokens. The denominator must not depend on the parameters.
      weight: factor of the mean in the minimised loss.
      per_layer: layers are kept apart, for the training step; neither minimised nor logged.
    """

    ratio: Ratio
    weight: float = flax.struct.field(pytree_node=False, default=0.0)
    per_layer: bool = flax.struct.field(pytree_node=False, default=False)

    def __add__(self, other: Self) -> Self:
        return self.replace(ratio=self.ratio + other.ratio)

    def over_layers(self) -> Self:
        """Returns the mean over layers, whose axis is the first; itself if these are kept apart."""
        return self if self.per_layer else jax.tree.map(lambda of_layers: of_layers.sum(axis=0), self)


Auxiliaries = Mapping[str, Auxiliary]


def merged(*passes: Auxiliaries) -> dict[str, Auxiliary]:
    """Merges the auxiliary losses of several passes; those of one name become a mean over all of them."""
    total: dict[str, Auxiliary] = {}
    for each in passes:
        total |= {name: total[name] + loss if name in total else loss for name, loss in each.items()}
    return total


class Output(flax.struct.PyTreeNode):
    """The output of a pass over whole rows.

    Attributes:
      hidden: hidden states; `Transformer.logits` and `map_logits` read logits from them.
      auxiliary: the model's own losses and statistics, by their names in the log.
    """

    hidden: FloatBLD
    auxiliary: Auxiliaries = flax.struct.field(default_factory=dict)
