"""A frozen matrix with a trained low-rank update (LoRA, arXiv 2106.09685)."""

from typing import TypeVar

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Float

from diffusion_t5x.models.quantized import Quantized

Tree = TypeVar("Tree")


class LowRank(flax.struct.PyTreeNode):
    """Replaces a parameter by `base + scale * down up`; layers multiply by the three separately.

    Leading axes, such as that of stacked layers, are the same in all three.

    Attributes:
      base: `[..., inputs, outputs]`, with one or more axes each for inputs and outputs; they are one axis in the
        factors.
      down: `[..., inputs, rank]`.
      up: `[..., rank, outputs]`.
      scale: factor on the product.
      drafts_only: the update applies only to drafts (gated LoRA, arXiv 2507.11851); all other slots read the base.
      drafts: bool `[B, L]`, True in slots with a draft; None where there are none. Set by `at_drafts` for each pass.
    """

    base: Float[jax.Array, "..."] | Quantized
    down: jax.Array
    up: jax.Array
    scale: float = flax.struct.field(pytree_node=False)
    drafts_only: bool = flax.struct.field(pytree_node=False, default=False)
    drafts: jax.Array | None = None

    def merged(self) -> jax.Array:
        """The sum as one array, float32, with the base's shape."""
        product = jnp.matmul(self.down, self.up, precision=jax.lax.Precision.HIGHEST)
        base = self.base.dequantized() if isinstance(self.base, Quantized) else self.base.astype(jnp.float32)
        return base + self.scale * product.reshape(self.base.shape)


def at_drafts(tree: Tree, drafts: jax.Array | None) -> Tree:
    """Returns a tree whose updates of drafts apply in these slots, bool `[B, L]`; None: in none."""

    def placed(leaf):
        return leaf.replace(drafts=drafts) if isinstance(leaf, LowRank) and leaf.drafts_only else leaf

    return jax.tree.map(placed, tree, is_leaf=lambda leaf: isinstance(leaf, LowRank))
