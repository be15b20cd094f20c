"""The training state and its sharding on the mesh."""

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from diffusion_t5x import partitioning
from diffusion_t5x.checkpointing.assignment import named_leaves
from diffusion_t5x.models.transformer import ModelDefinition, Params


class TrainState(flax.struct.PyTreeNode):
    """The state that a training step reads and writes.

    Attributes:
      step: int32 scalar, number of steps taken.
      params: the model's parameters.
      opt_state: the optimizer's state of the trained parameters.
      ema: exponential moving average of the trained parameters, or None.
    """

    step: jax.Array
    params: Params
    opt_state: Any
    ema: Params | None = None

    @property
    def eval_params(self) -> Params:
        """The parameters to evaluate: the moving average, if there is one."""
        return self.params if self.ema is None else join(self.ema, self.params)


def split(definition: ModelDefinition, params: Params) -> tuple[Params, Params]:
    """Splits parameters into trained and frozen ones: two trees, each with None where the other has an array."""
    trained = definition.trained()
    return (
        jax.tree.map(lambda is_trained, x: x if is_trained else None, trained, params),
        jax.tree.map(lambda is_trained, x: None if is_trained else x, trained, params),
    )


def join(trained: Params, others: Params) -> Params:
    """Joins parameters: those of `others` where `trained` has None."""
    return jax.tree.map(lambda x, other: other if x is None else x, trained, others, is_leaf=lambda x: x is None)


def fresh_state(
    definition: ModelDefinition, optimizer: optax.GradientTransformation, keep_ema: bool, key: jax.Array
) -> TrainState:
    """Returns the state before the first step. Run it through `init_state`, which makes it in place on the mesh."""
    params = definition.init(key)
    trained, _ = split(definition, params)
    ema = jax.tree.map(jnp.copy, trained) if keep_ema else None
    return TrainState(step=jnp.int32(0), params=params, opt_state=optimizer.init(trained), ema=ema)


def abstract_state(
    mesh: Mesh, definition: ModelDefinition, optimizer: optax.GradientTransformation, keep_ema: bool
) -> TrainState:
    """Returns shapes, dtypes and shardings of the state: a TrainState of `jax.ShapeDtypeStruct`."""
    shapes = jax.eval_shape(lambda key: fresh_state(definition, optimizer, keep_ema, key), jax.random.key(0))
    params = partitioning.param_shardings(mesh, shapes.params, definition.axes())
    shardings = partitioning.like_params(mesh, shapes, shapes.params, params)
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, shardings)


def shardings_of(abstract: Any) -> Any:
    return jax.tree.map(lambda x: x.sharding, abstract)


def describe_model(definition: ModelDefinition, abstract: TrainState) -> str:
    """Describes a model: its size, and each parameter on a line with shape, logical axes and partition."""
    names = jax.tree.leaves(definition.axes(), is_leaf=lambda x: isinstance(x, tuple))
    rows = [
        f"  {name} {list(leaf.shape)} ({', '.join(axes)}) {leaf.sharding.spec}"
        for (name, leaf), axes in zip(named_leaves(abstract.params).items(), names, strict=True)
    ]
    trained, _ = split(definition, abstract.params)
    size, whole = sum(leaf.size for leaf in jax.tree.leaves(trained)), definition.num_params()
    of_which = "" if size == whole else f", {size:,} of them trained"
    return "\n".join([f"model: {whole:,} parameters{of_which}", *rows])


def init_state(
    abstract: TrainState, definition: ModelDefinition, optimizer: optax.GradientTransformation, seed: int
) -> TrainState:
    """Makes a fresh state with its shardings: no array is whole on one device."""
    init = jax.jit(
        lambda key: fresh_state(definition, optimizer, abstract.ema is not None, key),
        out_shardings=shardings_of(abstract),
    )
    return init(jax.random.key(seed))
