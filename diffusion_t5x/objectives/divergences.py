"""Divergences of a student's distribution from its teacher's, and the entropy of one."""

import math
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Float

Divergence = Literal["forward_kl", "reverse_kl", "mixed_kl", "jsd"]


def divergence(
    teacher: Float[jax.Array, "*shape vocab"],
    student: Float[jax.Array, "*shape vocab"],
    kind: Divergence = "forward_kl",
    top_k: int | None = None,
    mix: float = 0.5,
) -> Float[jax.Array, "*shape"]:
    """Returns the divergence of a student's distribution q from its teacher's p, in nats.

    Ids that the teacher excludes (a logit of -inf) add exactly nothing to the forward KL, and their limit to the JSD.
    The reverse KL would be infinite there, so it is taken only over the teacher's support.

    Args:
      teacher, student: logits.
      kind: "forward_kl": KL(p || q). "reverse_kl": KL(q || p). "mixed_kl": (1 - mix) KL(p || q) + mix KL(q || p).
        "jsd": mix KL(p || m) + (1 - mix) KL(q || m) with m = mix p + (1 - mix) q; for a mix of 1/2 the Jensen-Shannon
        divergence, at most log 2.
      top_k: sum only the terms of the teacher's k most likely tokens, with their original probabilities.
        The sum may exceed the full one, and may be negative.
      mix: weight of the reverse KL, or of the teacher in a JSD.
    """
    log_p, log_q = jax.nn.log_softmax(teacher), jax.nn.log_softmax(student)
    if top_k is not None and top_k < log_p.shape[-1]:
        log_p, ids = jax.lax.top_k(log_p, top_k)
        log_q = jnp.take_along_axis(log_q, ids, axis=-1)
    # Where a probability is 0 its logarithm is replaced before anything is computed: no NaN, in gradients neither.
    p, q = jnp.exp(log_p), jnp.exp(log_q)
    has_p, has_q = p > 0, q > 0
    if kind == "jsd":
        some = has_p | has_q
        log_m = jnp.logaddexp(jnp.where(some, log_p, 0) + math.log(mix), jnp.where(some, log_q, 0) + math.log(1 - mix))
        of_p = p * (jnp.where(has_p, log_p, 0) - jnp.where(has_p, log_m, 0))
        of_q = q * (jnp.where(has_q, log_q, 0) - jnp.where(has_q, log_m, 0))
        return jnp.sum(mix * of_p + (1 - mix) * of_q, axis=-1)
    weight = {"forward_kl": 0.0, "reverse_kl": 1.0, "mixed_kl": mix}[kind]
    terms = jnp.zeros_like(p)
    if weight < 1:
        terms += (1 - weight) * p * (jnp.where(has_p, log_p, 0) - jnp.where(has_p, log_q, 0))
    if weight > 0:
        both = has_q & (log_p > -jnp.inf)
        terms += weight * jnp.where(both, q, 0) * (jnp.where(both, log_q, 0) - jnp.where(both, log_p, 0))
    return jnp.sum(terms, axis=-1)


def entropy(logits: Float[jax.Array, "*shape vocab"]) -> Float[jax.Array, "*shape"]:
    """Returns the entropy of a distribution, in nats; ids with a logit of -inf add exactly nothing.

    Args:
      logits: at least one of them finite.
    """
    log_p = jax.nn.log_softmax(logits)
    p = jnp.exp(log_p)
    return -jnp.sum(p * jnp.where(p > 0, log_p, 0), axis=-1)
