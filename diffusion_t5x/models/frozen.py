"""Frozen parameters in fewer bits than training needs."""

import dataclasses
from typing import Any, Literal

import jax

from diffusion_t5x.models.quantized import FEW_BITS, FewBits, Quantized, quantize
from diffusion_t5x.models.transformer import ModelDefinition, Params, is_matrix
from diffusion_t5x.shapes import KeyScalar

Axes = tuple[str, ...]
FrozenDtype = Literal["float32", "bfloat16", "int8", "nf4"]


def cut(axes: Axes, values: tuple[Any, ...]) -> tuple[tuple[Any, ...], ...]:
    """Splits values of a layer matrix's logical axes into those of stacked axes (layers, experts), inputs and outputs.

    One of the last two is `embed`.
    """
    first = 1 + (axes[1] == "experts")
    first_output = first + 1 if axes[first] == "embed" else len(axes) - 1
    return values[:first], values[first:first_output], values[first_output:]


def freeze(array: jax.Array, axes: Axes, dtype: FrozenDtype, rest: str) -> jax.Array | Quantized:
    """Returns a parameter as it is kept while it is frozen; norms, biases and routers stay float32.

    Args:
      array: the parameter.
      axes: its logical axes.
      dtype: dtype of matrices. Only those of layers are quantized.
      rest: dtype of embeddings and the output matrix where the others are quantized.
    """
    if not is_matrix(axes):
        return array
    if dtype == "float32" or dtype == "bfloat16":
        return array.astype(dtype)
    if "layers" not in axes:
        return array.astype(rest)
    stacked, inputs, _ = cut(axes, axes)
    return quantize(array, dtype, range(len(stacked), len(stacked) + len(inputs)))


def frozen_axes(axes: Axes, dtype: FrozenDtype) -> Axes | Quantized:
    """Returns the logical axes of what `freeze` returns."""
    if dtype not in FEW_BITS or not is_matrix(axes) or "layers" not in axes:
        return axes
    stacked, inputs, outputs = cut(axes, axes)
    blocks = ("channel",) * len(inputs) if dtype == "int8" else inputs
    return Quantized(codes=axes, absmax=(*stacked, *blocks, *outputs))  # type: ignore[arg-type]


@dataclasses.dataclass(frozen=True)
class FrozenDefinition(ModelDefinition):
    """A model that only computes, such as a teacher, with its layers' matrices in few bits.

    Attributes:
      dtype: "int8" or "nf4"; see `quantize`.
    """

    dtype: FewBits

    def init(self, key: KeyScalar) -> Params:
        return self._freeze(super().init(key))

    def abstract(self) -> Params:
        return jax.eval_shape(self._freeze, super().abstract())

    def axes(self) -> Params:
        plain = super().axes()
        return jax.tree.map(lambda axes: frozen_axes(axes, self.dtype), plain, is_leaf=lambda x: isinstance(x, tuple))

    def trained(self) -> Params:
        return jax.tree.map(lambda _: False, self.abstract())

    def _freeze(self, params: Params) -> Params:
        return jax.tree.map(lambda x, axes: freeze(x, axes, self.dtype, self.config.dtype), params, super().axes())
