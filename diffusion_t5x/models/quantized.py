"""Matrices in few bits: int8, and the 4-bit NormalFloat of QLoRA (NF4, arXiv 2305.14314).

Not by a library: AQT has no NF4; qwix keeps it in uint4, which Orbax cannot store, and decodes the flattened matrix,
which undoes its sharding.
"""

import functools
import itertools
import math
import operator
from collections.abc import Callable
from typing import Literal, get_args

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Float

from diffusion_t5x.errors import UserError

FewBits = Literal["int8", "nf4"]
FEW_BITS = get_args(FewBits)

# The values of NF4's codes (arXiv 2305.14314, appendix E).
NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
    -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
    0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
BLOCK = 64  # values of a column that share a scale in NF4
_MOST = 127  # int8's largest code


class Quantized(flax.struct.PyTreeNode):
    """A float32 matrix in few bits; stands for a parameter.

    Leading axes, such as that of stacked layers, are the same in both arrays.

    Attributes:
      codes: int8, in the matrix's shape; or for NF4 uint8, half as long on one axis of inputs: each byte has two values
        of a block, the first half's in the lower four bits.
      absmax: float32, the largest absolute value of an output channel (int8: its axes of inputs have size 1) or of a
        block (NF4: the axis of inputs has an entry for each block).
    """

    codes: jax.Array
    absmax: jax.Array

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the matrix."""
        shape = list(self.codes.shape)
        if self.codes.dtype == jnp.uint8:
            shape[self._packed] *= 2
        return tuple(shape)

    @property
    def size(self) -> int:
        """Number of values."""
        return math.prod(self.shape)

    @property
    def dtype(self) -> jnp.dtype:
        """Dtype of the matrix that it stands for."""
        return jnp.dtype(jnp.float32)

    @property
    def _packed(self) -> int:
        """The axis of which two values are in a byte: blocks have at least four, so the shapes differ there."""
        pairs = zip(self.codes.shape, self.absmax.shape, strict=True)
        return next(axis for axis, (codes, blocks) in enumerate(pairs) if codes != blocks)

    def dequantized(self, dtype: DTypeLike = jnp.float32) -> jax.Array:
        """Returns the matrix, rounded once to this dtype."""
        if self.codes.dtype == jnp.int8:
            return (self.codes.astype(jnp.float32) * (self.absmax / _MOST)).astype(dtype)
        axis = self._packed
        codes = jnp.expand_dims(_in_blocks(self.codes, axis, self.absmax.shape[axis]), axis + 1).astype(jnp.int32)
        low_and_high = jnp.arange(0, 8, 4).reshape(2, *[1] * (codes.ndim - axis - 2))
        values = _value(codes >> low_and_high) * jnp.expand_dims(self.absmax, (axis + 1, axis + 2))
        return values.astype(dtype).reshape(self.shape)

    def requantized(self, stacked: jax.Array) -> "Quantized":
        """Returns other stacked matrices quantized like these."""
        if self.codes.dtype == jnp.int8:
            reduced = tuple(axis for axis, size in enumerate(self.absmax.shape) if axis and size == 1)
            return _by_layer(lambda x: _int8(x, reduced), stacked)
        return _by_layer(lambda x: _nf4(x, self._packed, self.absmax.shape[self._packed]), stacked)


def is_quantized(leaf: object) -> bool:
    """True for a `Quantized`; as `is_leaf`, it keeps these whole."""
    return isinstance(leaf, Quantized)


def quantize(stacked: Float[jax.Array, "*shape"], dtype: FewBits, inputs: range) -> Quantized:
    """Quantizes the matrices of stacked layers; blocks of NF4 lie along the last axis of inputs.

    A block has `BLOCK` values, or the largest divisor of that number which also divides the axis.

    Args:
      stacked: `[layers, ..., inputs, outputs]`, with one or more axes each for inputs and outputs.
      dtype: "int8" rounds to the nearest of 255 multiples of an output channel's largest value / 127; "nf4" to the
        nearest of 16 multiples of a block's largest value.
      inputs: the axes of inputs.

    Raises:
      UserError: the last axis of inputs is no multiple of 4, which NF4 needs.
    """
    if dtype == "int8":
        return _by_layer(lambda x: _int8(x, tuple(inputs)), stacked)
    size = stacked.shape[inputs[-1]]
    block = math.gcd(BLOCK, size)
    if block < 4:
        raise UserError(f"NF4 needs matrices whose inputs are a multiple of 4, not {size}: choose int8.")
    return _by_layer(lambda x: _nf4(x, inputs[-1], size // block), stacked)


def _by_layer(function: Callable[[jax.Array], Quantized], stacked: jax.Array) -> Quantized:
    """Quantizes one layer at a time, which keeps the temporaries small."""
    return jax.lax.map(lambda layer: jax.tree.map(lambda x: x[0], function(layer[None])), stacked)


def _int8(x: jax.Array, inputs: tuple[int, ...]) -> Quantized:
    x = x.astype(jnp.float32)
    absmax = jnp.max(jnp.abs(x), axis=inputs, keepdims=True)
    return Quantized(jnp.round(x / _or_one(absmax) * _MOST).astype(jnp.int8), absmax)


def _nf4(x: jax.Array, axis: int, blocks: int) -> Quantized:
    in_blocks = _in_blocks(x.astype(jnp.float32), axis, blocks)
    absmax = jnp.max(jnp.abs(in_blocks), axis=axis + 1, keepdims=True)
    low, high = jnp.split(_nearest(in_blocks / _or_one(absmax)), 2, axis=axis + 1)
    packed = (low | high << 4).reshape(*x.shape[:axis], x.shape[axis] // 2, *x.shape[axis + 1 :])
    return Quantized(packed, absmax.squeeze(axis + 1))


def _in_blocks(x: jax.Array, axis: int, blocks: int) -> jax.Array:
    """Splits an axis into blocks and what is in them."""
    return x.reshape(*x.shape[:axis], blocks, -1, *x.shape[axis + 1 :])


def _or_one(absmax: jax.Array) -> jax.Array:
    return jnp.where(absmax > 0, absmax, 1)


def _nearest(x: jax.Array) -> jax.Array:
    """Returns the code, uint8, of NF4's nearest value; halfway between two, the lower one, as in bitsandbytes."""
    middles = [(low + high) / 2 for low, high in itertools.pairwise(NF4)]
    return functools.reduce(operator.add, ((x > middle).astype(jnp.uint8) for middle in middles))


def _value(codes: jax.Array) -> jax.Array:
    """Returns NF4's values of the codes in the lower four bits, float32.

    Selected bit by bit in integers: for attention's matrices, the TPU compiler needs a third of the time that it needs
    for a choice by masks. Written with `jnp.where`, constants in the shape of the codes would be moved out of a scan
    over layers, where all 16 of them would take memory.
    """
    values = np.asarray(NF4, np.float32).view(np.int32).tolist()
    for bit in range(4):
        is_set = -(codes >> bit & 1)  # all bits or none
        values = [low ^ (is_set & (low ^ high)) for low, high in zip(values[::2], values[1::2], strict=True)]
    return jax.lax.bitcast_convert_type(values[0], jnp.float32)
