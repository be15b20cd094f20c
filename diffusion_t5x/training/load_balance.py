"""Loss-free balancing of experts (arXiv 2408.15664): the bias that chooses an expert follows its load."""

import jax
import jax.numpy as jnp
from jaxtyping import Bool

from diffusion_t5x.errors import UserError
from diffusion_t5x.models.experts import Experts
from diffusion_t5x.models.mixture import LOADS
from diffusion_t5x.models.output import Auxiliaries
from diffusion_t5x.models.transformer import Params
from diffusion_t5x.partitioning import leaf_name


def balanced(params: Params, experts: Experts | None, auxiliary: Auxiliaries, is_good: Bool[jax.Array, ""]) -> Params:
    """Returns parameters whose selection biases have moved by `Experts.bias_rate` towards an even load.

    The bias of an expert with less than the mean load grows, that of one with more shrinks, and that of one with just
    the mean load stays (DeepSeek-V3, arXiv 2412.19437, section 2.1.2).

    Args:
      params: with or without the biases.
      experts: the settings of the model's mixtures.
      auxiliary: the model's losses and statistics over the whole batch.
      is_good: False leaves all as they are.

    Raises:
      UserError: the objective drops the model's statistics.
    """
    if experts is None or not experts.bias_rate:
        return params
    if LOADS not in auxiliary:
        raise UserError("Experts.bias_rate needs an objective whose LossSums have the model's auxiliary losses.")
    loads = auxiliary[LOADS].ratio
    missing = jnp.sign(loads.denominator[:, None] - loads.numerator)  # [layers, experts]
    change = jnp.where(is_good, experts.bias_rate, 0) * missing

    def move(path, leaf):
        return leaf + change if leaf_name(path).endswith("/selection_bias") else leaf

    return jax.tree_util.tree_map_with_path(move, params)
