"""Quantizes an import while it is written: matrices of layers are never whole in memory, nor on disk in more bits."""

import functools
from collections.abc import Mapping

import jax
import numpy as np

from diffusion_t5x.checkpointing.assignment import named_leaves
from diffusion_t5x.checkpointing.streaming import Streamed
from diffusion_t5x.models.frozen import Axes, freeze, frozen_axes
from diffusion_t5x.models.quantized import FewBits, Quantized, is_quantized
from diffusion_t5x.models.transformer import ModelDefinition


def quantized(params: Mapping[str, Streamed], definition: ModelDefinition, dtype: FewBits) -> dict[str, Streamed]:
    """Returns what a checkpoint has in place of the matrices of layers: codes and their scales. All others stay.

    Args:
      params: all parameters by name.
      definition: the model's.
      dtype: see `models.quantized.quantize`.

    Raises:
      UserError: see `quantize`.
    """
    axes = named_leaves(definition.axes(), lambda leaf: isinstance(leaf, tuple))
    found: dict[str, Streamed] = {}
    for name, array in params.items():
        if is_quantized(frozen_axes(axes[name], dtype)):
            found |= {f"{name}/{part}": leaf for part, leaf in _parts(array, axes[name], dtype).items()}
        else:
            found[name] = array
    return found


def _parts(array: Streamed, axes: Axes, dtype: FewBits) -> dict[str, Streamed]:
    """Returns the parts of a `Quantized`, which are read layer by layer. Each part reads the layer for itself."""

    @jax.jit
    def quantize(layer: jax.Array) -> Quantized:
        matrix = freeze(layer, axes, dtype, rest="float32")
        assert isinstance(matrix, Quantized)
        return matrix

    whole = jax.eval_shape(quantize, jax.ShapeDtypeStruct(array.shape, array.dtype))

    def read(part: str, start: int, stop: int) -> np.ndarray:
        return np.asarray(getattr(quantize(array.read(start, stop)), part))

    return {
        part: Streamed(leaf.shape, leaf.dtype, array.axis, array.step, functools.partial(read, part))
        for part, leaf in (("codes", whole.codes), ("absmax", whole.absmax))
    }
