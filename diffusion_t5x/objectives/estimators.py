"""The reverse KL divergence, estimated from tokens that the student drew: k1 and k3 of Schulman's note.

http://joschu.net/blog/kl-approx.html. With q the student, p the teacher and r = p(x) / q(x) for a token x ~ q,
k1 = -log r and k3 = r - 1 - log r. Both have the mean KL(q || p); k3 varies less near r = 1, and is never negative.

Their derivatives are not estimates of its gradient: that of k1, the score of x, has the mean 0, and that of k3 the
gradient of the *forward* KL as mean, for x is drawn from q as well. The gradient of the mean is the mean of
k1 * score(x), and k3 gives the same, draw by draw, if both of its dependencies on q count. So both estimators
have this gradient here: that of a policy whose advantage is -k1.
"""

from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Float

from diffusion_t5x.shapes import AnyBoolBL, AnyIntBL, Array, IntBL

Estimate = Literal["exact", "k1", "k3"]


def sampled_kl(
    student: Float[Array, "*shape"],
    teacher: Float[Array, "*shape"],
    drawn: Float[Array, "*shape"],
    kind: Literal["k1", "k3"],
    max_weight: float | None = None,
) -> tuple[Float[jax.Array, "*shape"], Float[jax.Array, "*shape"]]:
    """Returns estimates of KL(student || teacher) from one token each, and the tokens' importance weights.

    Over tokens from the distribution that drew them, an estimate has the student's divergence as its mean, in nats, and
    its gradient the divergence's gradient, if no weight is clipped.

    Args:
      student, teacher: log-probabilities of the tokens; gradients are the student's.
      drawn: log-probabilities of the tokens when they were drawn, by an earlier student.
      kind: what the value is; the gradient does not depend on it.
      max_weight: maximum of the weights (student over drawn): less variance, with some bias. None does not clip.
    """
    weight = jnp.exp(student - drawn)
    weight = jax.lax.stop_gradient(weight if max_weight is None else jnp.minimum(weight, max_weight))
    k1 = jax.lax.stop_gradient(student - teacher)
    value = weight * (k1 if kind == "k1" else jnp.expm1(-k1) + k1)
    return value + weight * k1 * (student - jax.lax.stop_gradient(student)), weight


def drawn_now(masked: AnyBoolBL, written_at: AnyIntBL, starts: IntBL) -> AnyBoolBL:
    """Returns the masked tokens that were drawn in exactly this state of masks; others were drawn later.

    Args:
      masked: masked targets, of states that a decoder went through (`visited_states`).
      written_at: see `Batch`.
      starts: row index of the first target of each target's block.
    """
    length = masked.shape[-1]
    last = jnp.iinfo(jnp.int32).max
    at = jnp.where(masked & (jnp.asarray(written_at) >= 0), written_at, last)
    first = jax.vmap(lambda at, starts: jax.ops.segment_min(at, starts, length)[starts])(at, jnp.maximum(starts, 0))
    return masked & (at == first) & (at < last)
