"""Products of consecutive groups of rows with one matrix each."""

import jax
import jax.numpy as jnp
from jaxtyping import Float, Int

from diffusion_t5x.partitioning import platform

_TILE = (512, 1024, 1024)  # rows, inputs and outputs that a TPU's kernel reads together; must fit into its close memory


@jax.custom_vjp
def grouped(
    x: Float[jax.Array, "rows inputs"],
    kernel: Float[jax.Array, "groups inputs outputs"],
    sizes: Int[jax.Array, " groups"],
) -> Float[jax.Array, "rows outputs"]:
    """Returns the products; those of rows after the last group are undefined, and so are their gradients."""
    return jax.lax.ragged_dot(x, kernel, sizes)


def _forward(x, kernel, sizes):
    return grouped(x, kernel, sizes), (x, kernel, sizes)


def _backward(kept, toward):
    x, kernel, sizes = kept
    of_x = jax.lax.ragged_dot(toward, kernel.swapaxes(1, 2), sizes)
    return of_x, _of_kernel(x, toward, sizes).astype(kernel.dtype), None


def _of_kernel(x, toward, sizes):
    """Returns `x.T @ toward` of each group, `[groups, inputs, outputs]`."""
    if platform() == "tpu":  # where XLA would multiply all rows for every group
        from jax.experimental.pallas.ops.tpu.megablox.gmm import tgmm

        tile = (_TILE[0], *(min(pair) for pair in zip(_TILE[1:], (x.shape[1], toward.shape[1]), strict=True)))
        x, toward = (jnp.pad(each, ((0, -len(each) % tile[0]), (0, 0))) for each in (x, toward))
        return tgmm(x.T, toward, sizes, x.dtype, tile)
    contracted = jax.lax.RaggedDotDimensionNumbers(
        dot_dimension_numbers=(((0,), (0,)), ((), ())), lhs_ragged_dimensions=(0,), rhs_group_dimensions=()
    )
    return jax.lax.ragged_dot_general(x, toward, sizes, contracted)


grouped.defvjp(_forward, _backward)
