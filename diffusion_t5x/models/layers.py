"""Layers: plain pytrees whose parameters declare shape, logical axes and initialiser once."""

import functools
import math
from collections.abc import Callable
from typing import overload

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Float

from diffusion_t5x.models.low_rank import LowRank
from diffusion_t5x.models.output import Auxiliaries
from diffusion_t5x.models.products import matmul
from diffusion_t5x.models.quantized import Quantized
from diffusion_t5x.partitioning import pieces_of
from diffusion_t5x.shapes import FloatBLD, IntB, IntScalar, KeyB, KeyScalar

Initializer = Callable[..., jax.Array]
ACTIVATE = {"gelu": jax.nn.gelu, "silu": jax.nn.silu}


def param(key: KeyScalar | None, init: Initializer, **axes: int) -> nnx.Param:
    """Declares a float32 parameter; keywords name its logical axes and give their sizes, in order."""
    return nnx.Param(init(key, tuple(axes.values()), jnp.float32), axes=tuple(axes))


def normal(variance: float) -> Initializer:
    """T5's initialiser: normal with the given variance (usually one over the number of inputs)."""
    return jax.nn.initializers.normal(stddev=variance**0.5)


def dense(
    x: Float[jax.Array, "..."], kernel: Float[jax.Array, "..."] | LowRank | Quantized, inputs: int = 1
) -> Float[jax.Array, "..."]:
    """Contracts the last `inputs` axes of x with the first ones of the kernel, in x's dtype.

    The product is one of two plain matrices: XLA's CPU backend is more than twice as fast with these in the backward
    pass as with `[B, L, D]`. If the length is sharded, rows and positions cannot become one axis.
    """
    if isinstance(kernel, LowRank):
        product = dense(x, kernel.base, inputs)
        if kernel.drafts_only and kernel.drafts is None:
            return product
        update = dense(dense(x.reshape(*x.shape[: x.ndim - inputs], -1), kernel.down), kernel.up)
        update = jnp.asarray(kernel.scale, x.dtype) * update.reshape(product.shape)
        if kernel.drafts is not None:
            update = jnp.where(jnp.expand_dims(kernel.drafts, tuple(range(2, update.ndim))), update, 0)
        return product + update
    if isinstance(kernel, Quantized):
        return dequantizing(functools.partial(dense, inputs=inputs))(x, kernel)
    if pieces_of("length") > 1:
        return jnp.tensordot(x, kernel.astype(x.dtype), axes=inputs)
    split = x.ndim - inputs
    rows, columns = math.prod(x.shape[:split]), math.prod(kernel.shape[inputs:])
    product = matmul(x.reshape(rows, -1), kernel.astype(x.dtype).reshape(-1, columns))
    return product.reshape(*x.shape[:split], *kernel.shape[inputs:])


def dequantizing(product: Callable[..., jax.Array]) -> Callable[[jax.Array, Quantized], jax.Array]:
    """Returns a product of x with a plain kernel as one with a quantized kernel, in x's dtype.

    The backward pass dequantizes it again: all layers' plain kernels would not fit into memory.
    """
    return jax.checkpoint(lambda x, kernel: product(x, kernel.dequantized(x.dtype)))


def add_bias(x: Float[jax.Array, "*shape"], bias: nnx.Param | None) -> Float[jax.Array, "*shape"]:
    """Returns the sum, in x's dtype; x if there is no bias."""
    return x if bias is None else x + bias.get_value().astype(x.dtype)


def softcap(x: Float[jax.Array, "*shape"], cap: float | None) -> Float[jax.Array, "*shape"]:
    """Returns `cap * tanh(x / cap)`: x limited to the cap. None: no cap."""
    return x if cap is None else cap * jnp.tanh(x / cap)


@overload
def fold_in(keys: KeyB, number: IntScalar | IntB | int) -> KeyB: ...
@overload
def fold_in(keys: None, number: IntScalar | IntB | int) -> None: ...
def fold_in(keys: KeyB | None, number: IntScalar | IntB | int) -> KeyB | None:
    """Returns each row's key for one of several uses, of one number or a number for each row; None stays None."""
    axis = 0 if jnp.ndim(number) else None
    return None if keys is None else jax.vmap(jax.random.fold_in, (0, axis))(keys, number)


def dropout(
    x: Float[jax.Array, "batch length *rest"], rate: float, keys: KeyB | None
) -> Float[jax.Array, "batch length *rest"]:
    """Applies dropout to x with a key for each row; the mask is shared over the length, as in T5."""
    if keys is None or rate == 0:
        return x
    keep = jax.vmap(lambda key: jax.random.bernoulli(key, 1 - rate, x.shape[2:]))(keys)[:, None]
    return jnp.where(keep, x / (1 - rate), 0).astype(x.dtype)


class RMSNorm(nnx.Module):
    """Root-mean-square norm with a learned scale, computed in float32.

    Args:
      epsilon: added to the mean square.
      offset: the parameter is the scale minus 1.
      **axes: names and sizes of the last axes, which are normalised together.
    """

    def __init__(self, epsilon: float, offset: bool = False, **axes: int):
        init = jax.nn.initializers.zeros if offset else jax.nn.initializers.ones
        self.scale = param(None, init, **axes)
        self.epsilon = epsilon
        self.offset = offset

    def __call__(self, x: Float[jax.Array, "*shape"]) -> Float[jax.Array, "*shape"]:
        y, scale = x.astype(jnp.float32), self.scale.get_value()
        axes = tuple(range(-scale.ndim, 0))
        y = y * jax.lax.rsqrt(jnp.mean(jnp.square(y), axis=axes, keepdims=True) + self.epsilon)
        return (y * (1 + scale if self.offset else scale)).astype(x.dtype)


class LayerNorm(nnx.Module):
    """Layer norm (arXiv 1607.06450) with a learned scale and bias, computed in float32.

    Args:
      size: size of the last axis, `embed`, which is normalised.
      epsilon: added to the variance.
    """

    def __init__(self, size: int, epsilon: float):
        self.scale = nnx.Param(jnp.ones(size, jnp.float32), axes=("embed",))
        self.bias = nnx.Param(jnp.zeros(size, jnp.float32), axes=("embed",))
        self.epsilon = epsilon

    def __call__(self, x: Float[jax.Array, "*shape embed"]) -> Float[jax.Array, "*shape embed"]:
        y = x.astype(jnp.float32)
        y = y - jnp.mean(y, axis=-1, keepdims=True)
        y = y * jax.lax.rsqrt(jnp.mean(jnp.square(y), axis=-1, keepdims=True) + self.epsilon)
        return (y * self.scale.get_value() + self.bias.get_value()).astype(x.dtype)


class MLP(nnx.Module):
    """Feed-forward layer: `wo(activation(wi_0 x) * wi_1 x)` (arXiv 2002.05202), or without the gate.

    Args:
      key: key of the initial values.
      embed_dim, mlp_dim: outer and inner size.
      activation: "gelu" (the tanh approximation) or "silu".
      gated: False is `wo(activation(wi_0 x))`.
      bias: add a bias to each product.
      dropout_rate: dropout on the input of wo.
    """

    def __init__(
        self,
        key: KeyScalar,
        embed_dim: int,
        mlp_dim: int,
        *,
        activation: str,
        gated: bool = True,
        bias: bool = False,
        dropout_rate: float = 0.0,
    ):
        keys, zeros = jax.random.split(key, 3), jax.nn.initializers.zeros
        self.wi_0 = param(keys[0], normal(1 / embed_dim), embed=embed_dim, mlp=mlp_dim)
        self.wi_0_bias = param(key, zeros, mlp=mlp_dim) if bias else None
        if gated:
            self.wi_1 = param(keys[1], normal(1 / embed_dim), embed=embed_dim, mlp=mlp_dim)
            self.wi_1_bias = param(key, zeros, mlp=mlp_dim) if bias else None
        self.wo = param(keys[2], normal(1 / mlp_dim), mlp=mlp_dim, embed=embed_dim)
        self.wo_bias = param(key, zeros, embed=embed_dim) if bias else None
        self.activation = activation
        self.gated = gated
        self.dropout_rate = dropout_rate

    def __call__(self, x: FloatBLD, dropout_keys: KeyB | None) -> tuple[FloatBLD, Auxiliaries]:
        """Returns the update of the residual stream, and the layer's own losses, such as a mixture's balance loss."""
        hidden = ACTIVATE[self.activation](add_bias(dense(x, self.wi_0.get_value()), self.wi_0_bias))
        if self.gated:
            hidden = hidden * add_bias(dense(x, self.wi_1.get_value()), self.wi_1_bias)
        hidden = dropout(hidden, self.dropout_rate, dropout_keys)
        return add_bias(dense(hidden, self.wo.get_value()), self.wo_bias), {}
