"""What training carries from step to step, and where it lies on the mesh."""

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from diffusion_t5x import partitioning
from diffusion_t5x.models.transformer import ModelDefinition, Params


@flax.struct.dataclass
class TrainState:
    """All that a step reads and writes.

    Attributes:
      step: int32 scalar, steps taken.
      params: the model's parameters, float32.
      opt_state: the optimizer's state.
      ema: exponential moving average of the parameters, or None.
    """

    step: jax.Array
    params: Params
    opt_state: Any
    ema: Params | None = None

    @property
    def eval_params(self) -> Params:
        """The parameters to evaluate: the average where one is kept."""
        return self.params if self.ema is None else self.ema


def fresh_state(
    definition: ModelDefinition, optimizer: optax.GradientTransformation, keep_ema: bool, key: jax.Array
) -> TrainState:
    """The state before the first step. Run it through `init_state`, which makes it in place on the mesh."""
    params = definition.init(key)
    ema = jax.tree.map(jnp.copy, params) if keep_ema else None
    return TrainState(step=jnp.int32(0), params=params, opt_state=optimizer.init(params), ema=ema)


def abstract_state(
    mesh: Mesh, definition: ModelDefinition, optimizer: optax.GradientTransformation, keep_ema: bool
) -> TrainState:
    """Shapes, dtypes and shardings of the state: a TrainState of `jax.ShapeDtypeStruct`."""
    shapes = jax.eval_shape(lambda key: fresh_state(definition, optimizer, keep_ema, key), jax.random.key(0))
    params = partitioning.param_shardings(mesh, shapes.params, definition.axes())
    shardings = partitioning.like_params(mesh, shapes, shapes.params, params)
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, shardings)


def shardings_of(abstract: Any) -> Any:
    return jax.tree.map(lambda x: x.sharding, abstract)


def init_state(
    abstract: TrainState, definition: ModelDefinition, optimizer: optax.GradientTransformation, seed: int
) -> TrainState:
    """A fresh state, made where it belongs: nothing stands whole on one device."""
    init = jax.jit(
        lambda key: fresh_state(definition, optimizer, abstract.ema is not None, key),
        out_shardings=shardings_of(abstract),
    )
    return init(jax.random.key(seed))
