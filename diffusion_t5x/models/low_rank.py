"""A frozen matrix with a trained low-rank update (LoRA, arXiv 2106.09685)."""

import flax.struct
import jax
import jax.numpy as jnp


class LowRank(flax.struct.PyTreeNode):
    """Replaces a parameter by `base + scale * down up`; layers multiply by the three separately.

    Leading axes, such as that of stacked layers, are the same in all three.

    Attributes:
      base: `[..., inputs, outputs]`, with one or more axes each for inputs and outputs; they are one axis in the
        factors.
      down: `[..., inputs, rank]`.
      up: `[..., rank, outputs]`.
      scale: factor on the product.
    """

    base: jax.Array
    down: jax.Array
    up: jax.Array
    scale: float = flax.struct.field(pytree_node=False)

    def merged(self) -> jax.Array:
        """The sum as one array, float32, with the base's shape."""
        product = jnp.matmul(self.down, self.up, precision=jax.lax.Precision.HIGHEST)
        return self.base.astype(jnp.float32) + self.scale * product.reshape(self.base.shape)
