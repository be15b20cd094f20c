"""A mixture of experts in place of a feed-forward layer: the router, the experts, and how evenly they are used."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Bool, Float, Int

from diffusion_t5x.models.dispatch import routed
from diffusion_t5x.models.experts import Experts
from diffusion_t5x.models.layers import ACTIVATE, MLP, normal, param
from diffusion_t5x.models.output import Auxiliaries, Auxiliary, Ratio
from diffusion_t5x.shapes import BoolBL, FloatBLD, KeyB, KeyScalar

FloatBLE = Float[jax.Array, "batch length experts"]
IntBLC = Int[jax.Array, "batch length chosen"]
FloatBLC = Float[jax.Array, "batch length chosen"]
BoolBLC = Bool[jax.Array, "batch length chosen"]

LOADS = "loads"
_TINY = 1e-20  # added to a sum of factors, which could be 0, as in DeepSeek-V3 and LLaDA2


class Mixture(nnx.Module):
    """The sum of the outputs of a token's experts, times their factors, and of the shared experts' output.

    Args:
      key: key of the initial values.
      embed_dim: outer size.
      experts: the settings.
      activation: "gelu" or "silu", of every expert.
      dropout_rate: dropout inside the shared experts.
    """

    def __init__(self, key: KeyScalar, embed_dim: int, experts: Experts, *, activation: str, dropout_rate: float = 0.0):
        keys, zeros = jax.random.split(key, 5), jax.nn.initializers.zeros
        number, inner = experts.number, experts.mlp_dim
        self.router = param(keys[0], normal(1 / embed_dim), embed=embed_dim, routes=number)
        self.selection_bias = param(key, zeros, routes=number) if experts.selection_bias else None
        self.wi_0 = param(keys[1], normal(1 / embed_dim), experts=number, embed=embed_dim, expert_mlp=inner)
        self.wi_1 = param(keys[2], normal(1 / embed_dim), experts=number, embed=embed_dim, expert_mlp=inner)
        self.wo = param(keys[3], normal(1 / inner), experts=number, expert_mlp=inner, embed=embed_dim)
        if experts.shared_mlp_dim:
            shared = (embed_dim, experts.shared_mlp_dim)
            self.shared = MLP(keys[4], *shared, activation=activation, dropout_rate=dropout_rate)
        self.experts = experts
        self.activation = activation

    def __call__(self, x: FloatBLD, dropout_keys: KeyB | None, counted: BoolBL) -> tuple[FloatBLD, Auxiliaries]:
        """Returns the update of the residual stream, and the balance loss and statistics of the `counted` slots."""
        scores = self.scores(x)
        bias = None if self.selection_bias is None else self.selection_bias.get_value()
        chosen, factors = choose(self.experts, scores, bias)
        kernels = tuple(kernel.get_value() for kernel in (self.wi_0, self.wi_1, self.wo))
        update, kept = routed(x, chosen, factors, kernels, ACTIVATE[self.activation], self.experts.capacity_factor)
        if self.experts.shared_mlp_dim:
            update = update + self.shared(x, dropout_keys)[0]
        statistics = balance(self.experts, scores, chosen, counted)
        if self.experts.capacity_factor is not None:
            statistics["dropped_choices"] = dropped(kept, counted)
        return update, statistics

    def scores(self, x: FloatBLD) -> FloatBLE:
        """Returns the scores of all experts, float32: a rounded product could choose another expert."""
        logits = jnp.einsum(
            "bld,de->ble", x.astype(jnp.float32), self.router.get_value(), precision=jax.lax.Precision.HIGHEST
        )
        return jax.nn.softmax(logits, axis=-1) if self.experts.scores == "softmax" else jax.nn.sigmoid(logits)


def choose(
    experts: Experts, scores: FloatBLE, bias: Float[jax.Array, " experts"] | None = None
) -> tuple[IntBLC, FloatBLC]:
    """Returns the experts of each token, the best first, and the factors on their outputs.

    Ties go to the expert with the lower number. The choice has no gradient.
    """
    judged = jax.lax.stop_gradient(scores if bias is None else scores + bias)
    if experts.groups > 1:
        in_groups = judged.reshape(*judged.shape[:-1], experts.groups, -1)
        best_two, _ = jax.lax.top_k(in_groups, min(2, in_groups.shape[-1]))
        _, groups = jax.lax.top_k(best_two.sum(axis=-1), experts.groups_per_token)
        is_open = jnp.any(groups[..., None] == jnp.arange(experts.groups), axis=-2)
        judged = jnp.where(is_open[..., None], in_groups, -jnp.inf).reshape(judged.shape)
    _, chosen = jax.lax.top_k(judged, experts.per_token)
    factors = jnp.take_along_axis(scores, chosen, axis=-1)
    if experts.normalize:
        factors = factors / (factors.sum(axis=-1, keepdims=True) + _TINY)
    return chosen, factors * experts.scale


def balance(experts: Experts, scores: FloatBLE, chosen: IntBLC, counted: BoolBL) -> dict[str, Auxiliary]:
    """Returns the balance loss, and statistics of the load, over the counted slots.

    The loss is that of DeepSeek-V3 (arXiv 2412.19437, equations 17 to 20): in each row, the sum over experts of their
    share of all choices times their mean share of the scores, times the number of experts. It is 1 if all are used
    evenly. Rows count by their counted slots, so it adds up over microbatches.

    Statistics: "busiest_expert", the load of the layer's busiest expert as a multiple of the mean load, and
    "idle_experts", the share of experts that read no counted slot. With `bias_rate` also `LOADS`, the load of each
    expert as a multiple of the mean load: a ratio of whole numbers, so that sums over microbatches are exact.
    """
    counted_f = counted.astype(jnp.float32)
    uses = jnp.sum(jax.nn.one_hot(chosen, experts.number, dtype=jnp.float32), axis=2) * counted_f[..., None]
    slots = jnp.maximum(counted_f.sum(axis=1), 1)[:, None]  # [B, 1]
    share_of_choices = uses.sum(axis=1) / (slots * experts.per_token)  # [B, E]
    shares = scores / scores.sum(axis=-1, keepdims=True) if experts.scores == "sigmoid" else scores
    share_of_scores = jnp.sum(shares * counted_f[..., None], axis=1) / slots
    per_row = experts.number * jnp.sum(share_of_choices * share_of_scores, axis=-1)
    loads, total = uses.sum(axis=(0, 1)), counted_f.sum()
    mean_load = jnp.maximum(total, 1) * experts.per_token / experts.number
    one = jnp.float32(1)
    ratio = Ratio(experts.number * loads, experts.per_token * total)
    return ({LOADS: Auxiliary(ratio, per_layer=True)} if experts.bias_rate else {}) | {
        "balance": Auxiliary(Ratio(jnp.sum(per_row * counted_f.sum(axis=1)), total), experts.balance_weight),
        "busiest_expert": Auxiliary(Ratio(loads.max() / mean_load, one)),
        "idle_experts": Auxiliary(Ratio(jnp.mean(loads == 0, dtype=jnp.float32), one)),
    }


def dropped(kept: BoolBLC, counted: BoolBL) -> Auxiliary:
    """Returns the share of the counted slots' choices whose experts have not read them."""
    lost, counted = jnp.sum(~kept, axis=-1, dtype=jnp.float32), counted.astype(jnp.float32)
    return Auxiliary(Ratio(jnp.sum(lost * counted), kept.shape[-1] * counted.sum()))
