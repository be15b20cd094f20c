"""The attention mask annealing of DiffuLLaMA (arXiv 2410.17891), from causal to the objective's attention."""

import jax.numpy as jnp

from diffusion_t5x.errors import UserError
from diffusion_t5x.models.masks import Annealed, AttentionKind
from diffusion_t5x.models.streams import stream
from diffusion_t5x.shapes import IntScalar, KeyScalar


def check_anneal_steps(anneal_steps: int | None) -> None:
    if anneal_steps is not None and anneal_steps < 1:
        raise UserError(f"anneal_steps must be at least 1, or None for no annealing; got {anneal_steps}.")


def annealed(
    kind: AttentionKind, anneal_steps: int | None, step: IntScalar | None, key: KeyScalar
) -> AttentionKind | Annealed:
    """Returns the attention of a training step in transition from causal attention to `kind`.

    An edge of `kind` to a later slot is open with probability `min(1, (step + 1) / anneal_steps)`; edges to earlier
    slots are always open.

    Args:
      kind: the attention at the end.
      anneal_steps: number of steps; None: all edges are open from the first step.
      step: steps taken before this one; None means after the end.
      key: key of the step; all rows, layers and heads have the same edges.
    """
    if anneal_steps is None or step is None:
        return kind
    share = jnp.minimum(1.0, (step + 1) / anneal_steps)
    return Annealed(kind, share, stream(key, "annealing"))
