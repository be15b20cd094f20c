"""Products of activations and kernels, in the precision that JAX's setting asks for, even on a CPU."""

import jax
import jax.numpy as jnp
from jaxtyping import Float


def matmul(
    x: Float[jax.Array, "rows inputs"], kernel: Float[jax.Array, "inputs columns"]
) -> Float[jax.Array, "rows columns"]:
    """Returns `x @ kernel`; both have one dtype.

    With `jax_default_matmul_precision = "bfloat16"`, factors in float32 are rounded to bfloat16 and the products summed
    in float32, in the backward pass as well, as a TPU does with float32 by default. XLA's CPU backend ignores the
    setting; told explicitly, it uses the processor's own bfloat16 units (AMX, AVX512-BF16).
    """
    if rounds(x):
        return _rounded(x, kernel)
    return x @ kernel


def rounds(x: Float[jax.Array, "..."]) -> bool:
    """Returns whether products with x are rounded to bfloat16."""
    return x.dtype == jnp.float32 and jax.default_matmul_precision.value == "bfloat16"


@jax.custom_vjp
def _rounded(x, kernel):
    return _dot(x, kernel, 1, 0)


def _forward(x, kernel):
    return _rounded(x, kernel), (x, kernel)


def _backward(factors, cotangent):
    x, kernel = factors
    return _dot(cotangent, kernel, 1, 1), _dot(x, cotangent, 0, 0)


_rounded.defvjp(_forward, _backward)


def _dot(a, b, of_a: int, of_b: int):
    """Contracts one axis of each."""
    a, b = a.astype(jnp.bfloat16), b.astype(jnp.bfloat16)
    return jax.lax.dot_general(a, b, (((of_a,), (of_b,)), ((), ())), preferred_element_type=jnp.float32)
