"""Optimizers: factories of `optax.GradientTransformation` for nested dictionaries of parameters.

The state keeps its shape when clipping is switched on or off or the schedule changes, so a run can be resumed with
either changed. The learning rate of the last update is in the state: `learning_rate(opt_state)`.
"""

import re

import jax
import optax

from diffusion_t5x.models.stack import STACKED
from diffusion_t5x.partitioning import leaf_name
from diffusion_t5x.training import schedules

_NO_DECAY = re.compile(r"norm|bias|scale")


def adamw(
    learning_rate: optax.ScalarOrSchedule,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 0.01,
    max_grad_norm: float | None = None,
) -> optax.GradientTransformation:
    """AdamW (Loshchilov & Hutter, arXiv 1711.05101).

    Weight decay leaves out norms and biases, including the relative position bias: every parameter with `norm`, `bias`
    or `scale` in its path. Names decide, because layers are stacked and a vector per layer is a matrix.

    Args:
      learning_rate: a number, or a schedule.
      b1: decay of the mean of the gradients.
      b2: decay of the mean of their squares.
      eps: added to the root of that mean.
      weight_decay: share of a parameter that a step subtracts, times the learning rate.
      max_grad_norm: gradients with a larger global norm are scaled down to it; None does not clip.
    """
    return _clipping(
        max_grad_norm,
        optax.scale_by_adam(b1, b2, eps),
        optax.add_decayed_weights(weight_decay, mask=_decay_mask),
        _scale_by_learning_rate(learning_rate),
    )


def adafactor(
    learning_rate: optax.ScalarOrSchedule,
    decay_rate: float = 0.8,
    clipping_threshold: float = 1.0,
    multiply_by_parameter_scale: bool = True,
    min_dim_size_to_factor: int = 128,
    max_grad_norm: float | None = None,
) -> optax.GradientTransformation:
    """Adafactor (Shazeer & Stern, arXiv 1804.04235) with T5X's defaults and no momentum.

    Second moments, clipping and scale are those of each layer's own matrix, and each expert's, as in T5X: optax alone
    would factor the two largest axes of a stacked parameter, layers and heads included, and clip all layers together.

    Args:
      learning_rate: a number, or a schedule. It is relative to the parameter's scale, so much larger than Adam's.
      decay_rate: the second moments decay at `1 - step ** -decay_rate`.
      clipping_threshold: largest root mean square of a parameter's update before the learning rate.
      multiply_by_parameter_scale: scale an update by the root mean square of its parameter (at least 1e-3).
      min_dim_size_to_factor: second moments are factored if the numbers of rows and columns are both at least this.
      max_grad_norm: gradients with a larger global norm are scaled down to it; None does not clip.
    """
    scale = optax.chain(
        optax.scale_by_factored_rms(decay_rate=decay_rate, min_dim_size_to_factor=min_dim_size_to_factor),
        optax.clip_by_block_rms(clipping_threshold),
        optax.scale_by_param_block_rms() if multiply_by_parameter_scale else optax.identity(),
    )
    return _clipping(max_grad_norm, _per_matrix(scale), _scale_by_learning_rate(learning_rate))


def learning_rate(opt_state: optax.OptState) -> jax.Array:
    """Returns the learning rate of the last update, a float32 scalar (before any update, that of the first)."""
    return optax.tree_utils.tree_get(
        opt_state, "learning_rate", filtering=lambda _, value: isinstance(value, jax.Array)
    )


def _scale_by_learning_rate(value: optax.ScalarOrSchedule) -> optax.GradientTransformation:
    schedule = value if callable(value) else schedules.constant(value)
    return optax.inject_hyperparams(optax.scale_by_learning_rate)(learning_rate=schedule)


class _Clipping(optax.GradientTransformation):
    """An optimizer that exposes the norm to which it clips gradients, `max_grad_norm`."""


def max_grad_norm(optimizer: optax.GradientTransformation) -> float | None:
    """Returns the global norm to which an optimizer of this module clips gradients; None if it does not clip."""
    return getattr(optimizer, "max_grad_norm", None)


def _clipping(max_norm: float | None, *rest: optax.GradientTransformation) -> optax.GradientTransformation:
    clip = optax.identity() if max_norm is None else optax.clip_by_global_norm(max_norm)
    found = _Clipping(*optax.chain(clip, *rest))
    found.max_grad_norm = max_norm
    return found


def _decay_mask(params: optax.Params) -> optax.Params:
    return jax.tree_util.tree_map_with_path(lambda path, _: not _NO_DECAY.search(leaf_name(path)), params)


def _per_matrix(transform: optax.GradientTransformation) -> optax.GradientTransformation:
    """Applies a transformation to each matrix separately, even where layers and experts are stacked."""

    def init_one(param):
        return transform.init(_as_matrix(param))

    def update_one(update, state, param):
        new_update, new_state = transform.update(_as_matrix(update), state, _as_matrix(param))
        return new_update.reshape(update.shape), new_state

    def over_stacked(path, param, function):
        names = set(leaf_name(path).split("/"))
        if not STACKED & names:
            return function
        # A feed-forward layer's matrix has two axes, and its layers' a third one: the fourth is that of experts.
        of_experts = "mlp" in names and param.ndim == 4
        return jax.vmap(jax.vmap(function)) if of_experts else jax.vmap(function)

    def init(params):
        return jax.tree_util.tree_map_with_path(lambda path, param: over_stacked(path, param, init_one)(param), params)

    def update(updates, state, params):
        pairs = jax.tree_util.tree_map_with_path(
            lambda path, update, *args: over_stacked(path, update, update_one)(update, *args), updates, state, params
        )
        # The pairs hang where the parameters hung: take them apart into two such trees.
        new_updates = jax.tree.map(lambda _, pair: pair[0], updates, pairs)
        return new_updates, jax.tree.map(lambda _, pair: pair[1], updates, pairs)

    return optax.GradientTransformation(init, update)


def _as_matrix(x: jax.Array) -> jax.Array:
    """Merges axes until two are left, with minimal rows + columns: `[embed, heads, kv]` -> `[embed, heads * kv]`.

    The parameters of attention are matrices whose rows or columns have two axes. The split with the least state is the
    one between inputs and outputs.
    """
    if x.ndim <= 2:
        return x
    size, rows, splits = x.size, 1, []
    for axis in x.shape[:-1]:
        rows *= axis
        splits.append((rows, size // rows))
    return x.reshape(min(splits, key=sum))
