"""One training step, and one evaluation of the loss: pure functions of state and batch."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from diffusion_t5x import partitioning
from diffusion_t5x.data.batch import Batch
from diffusion_t5x.models.streams import seed_number, stream
from diffusion_t5x.models.transformer import ModelDefinition, Params
from diffusion_t5x.objectives.distillation import Teacher
from diffusion_t5x.objectives.objective import LossSums, Objective
from diffusion_t5x.training import optimizers
from diffusion_t5x.training.load_balance import balanced
from diffusion_t5x.training.state import TrainState, join, shardings_of, split

Metrics = Mapping[str, jax.Array]
Loss = Callable[..., LossSums]  # an objective's `loss`


def loss_of(objective: Objective, teacher: Teacher | None, teacher_params: Params | None, params: Params) -> Loss:
    """Returns the objective's loss; if the objective needs a teacher, with the teacher of these parameters.

    Args:
      objective: the objective.
      teacher: its teacher, if it has one.
      teacher_params: the teacher's own parameters.
      params: the student's.
    """
    if teacher is None or not objective.needs_teacher:
        return objective.loss
    assert teacher_params is not None
    return functools.partial(objective.loss, teacher=teacher.model(teacher_params, params))


def loss_and_gradients(
    definition: ModelDefinition,
    loss: Loss,
    params: Params,
    batch: Batch,
    key: jax.Array,
    *,
    microbatches: int = 1,
    normalizing_factor: float | None = None,
) -> tuple[LossSums, Params]:
    """Returns an objective's sums over a batch and its loss's gradients by trained parameters, by microbatches.

    The loss is the sum of the microbatches' numerators over the sum of their denominators, which does not depend on the
    assignment of rows to microbatches; a mean of means would. The same holds for each auxiliary loss of the model.

    Args:
      definition: the model.
      loss: an objective's.
      params: the model's parameters.
      batch: rows divisible by `microbatches`.
      key: rows draw from it by their `example_ids`.
      microbatches: number of pieces of the batch.
      normalizing_factor: denominator of the summed loss, instead of the objective's own (T5X's
        LOSS_NORMALIZING_FACTOR).
    """

    trained, frozen = split(definition, params)

    def sums_of(trained, piece):
        return loss(definition.bind(join(trained, frozen)), piece, key)

    def numerator(trained, piece, denominators):
        sums = sums_of(trained, piece)
        return sums.total_numerator(denominators or whole(sums.denominators())), sums

    def whole(denominators):
        return denominators if normalizing_factor is None else denominators | {"loss": jnp.float32(normalizing_factor)}

    gradients = jax.grad(numerator, has_aux=True)
    if microbatches == 1:
        grads, sums = gradients(trained, batch, None)
    else:
        # Rows are dealt out in turn, so every microbatch has rows of every device.
        pieces = jax.tree.map(lambda x: x.reshape(-1, microbatches, *x.shape[1:]).swapaxes(0, 1), batch)
        denominators = None
        if jax.eval_shape(sums_of, trained, jax.tree.map(lambda x: x[0], pieces)).auxiliary:
            # They need no pass of the model: the compiler drops what is computed here and not read.
            denominators = whole(_summed(lambda piece: sums_of(trained, piece).denominators(), pieces))
        grads, sums = _summed(lambda piece: gradients(trained, piece, denominators), pieces)
    if normalizing_factor is not None:
        sums = sums.replace(loss=sums.loss.replace(denominator=jnp.float32(normalizing_factor)))
    scale = 1 / sums.loss.divisor
    return sums, jax.tree.map(lambda g: g * scale, grads)


def _summed(function: Callable[[Any], Any], pieces: Any) -> Any:
    """Sums a function's results over the leading axis of `pieces`, one at a time."""
    shapes = jax.eval_shape(function, jax.tree.map(lambda x: x[0], pieces))
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    return jax.lax.scan(lambda total, piece: (jax.tree.map(jnp.add, total, function(piece)), None), zeros, pieces)[0]


def step_key(seed: int | jax.Array, step: int | jax.Array) -> jax.Array:
    """Returns the key of noise and dropout for a step; the first step is 0."""
    return jax.random.fold_in(stream(jax.random.key(seed), "steps"), step)


def means(sums: LossSums) -> Metrics:
    """Returns the minimised loss, the objective's metrics, and the model's auxiliary losses without their weights."""
    auxiliary = {name: loss.ratio.mean() for name, loss in sums.auxiliary.items() if not loss.per_layer}
    return {"loss": sums.total(), **{name: ratio.mean() for name, ratio in sums.metrics.items()}, **auxiliary}


@dataclasses.dataclass(frozen=True)
class TrainStep:
    """A jitted training step. Its seed is an argument of the program: another seed needs no other program."""

    jitted: jax.stages.Wrapped
    teacher_params: Params | None
    mesh: Mesh
    seed: int

    @functools.cached_property
    def _seed(self) -> jax.Array:
        """The seed on the mesh."""
        with jax.transfer_guard("allow"):  # once a run
            return partitioning.put_whole(self.mesh, seed_number(self.seed))

    def __call__(
        self, state: TrainState, batch: Batch, loss_limit: jax.Array | float = np.inf
    ) -> tuple[TrainState, Metrics]:
        """Returns the state after a step, and its metrics.

        If the loss or the gradient's norm is not finite, or the loss is above the limit, the state is unchanged except
        for its `step`, and the metric "bad" is 1. "clipped" is 1 if the optimizer clips the gradient's norm.
        """
        return self.jitted(self.teacher_params, state, batch, jnp.asarray(loss_limit, jnp.float32), self._seed)

    def lower(self, state: TrainState, batch: Batch) -> jax.stages.Lowered:
        """Lowers the step for compilation ahead of time, for shapes with shardings or for arrays.

        What is compiled takes `(teacher's parameters, state, batch, loss limit, seed)`.
        """
        limit, seed = (jax.ShapeDtypeStruct((), dtype) for dtype in (np.float32, np.uint32))
        return self.jitted.lower(self.teacher_params, state, batch, limit, seed)


def make_train_step(
    mesh: Mesh,
    abstract: TrainState,
    definition: ModelDefinition,
    objective: Objective,
    optimizer: optax.GradientTransformation,
    *,
    seed: int,
    microbatches: int = 1,
    normalizing_factor: float | None = None,
    ema_decay: float | None = None,
    teacher: Teacher | None = None,
) -> TrainStep:
    """Returns the step of a run; its input state is donated.

    Noise and dropout of step s are keyed by `(seed, s, example_ids)`, so a resumed run repeats them. The teacher, if
    there is one, is never donated.
    """
    max_grad_norm = optimizers.max_grad_norm(optimizer)

    def step(
        teacher_params: Params | None, state: TrainState, batch: Batch, loss_limit: jax.Array, seed: jax.Array
    ) -> tuple[TrainState, Metrics]:
        sums, grads = loss_and_gradients(
            definition,
            functools.partial(loss_of(objective, teacher, teacher_params, state.params), step=state.step),
            state.params,
            batch,
            step_key(seed, state.step),
            microbatches=microbatches,
            normalizing_factor=normalizing_factor,
        )
        trained, frozen = split(definition, state.params)
        updates, opt_state = optimizer.update(grads, state.opt_state, trained)
        loss, gradient_norm = sums.total(), optax.tree.norm(grads)
        is_good = jnp.isfinite(loss) & jnp.isfinite(gradient_norm) & (loss <= loss_limit)
        params, frozen = (
            balanced(tree, definition.config.experts, sums.auxiliary, is_good)
            for tree in (optax.apply_updates(trained, updates), frozen)
        )
        ema = state.ema
        if ema_decay is not None:
            ema = optax.incremental_update(params, state.ema, 1 - ema_decay)
        stepped = TrainState(step=state.step, params=params, opt_state=opt_state, ema=ema)
        before = state.replace(params=trained)
        kept = jax.tree.map(lambda new, old: jnp.where(is_good, new, old), stepped, before)
        clipped = {} if max_grad_norm is None else {"clipped": jnp.float32(gradient_norm > max_grad_norm)}
        metrics = {
            **means(sums),
            **clipped,
            "bad": jnp.float32(~is_good),
            "gradient_norm": gradient_norm,
            "update_norm": optax.tree.norm(updates),
            "parameter_norm": optax.tree.norm(params),
            "tokens": jnp.sum(batch.segment_ids > 0),
        }
        return kept.replace(step=state.step + 1, params=join(kept.params, frozen)), metrics

    shardings, teacher_params = shardings_of(abstract), teacher and teacher.params
    jitted = jax.jit(
        step,
        in_shardings=(shardings_of(teacher_params), shardings, partitioning.batch_sharding(mesh), None, None),
        out_shardings=(shardings, partitioning.replicated(mesh)),
        donate_argnums=1,
    )
    return TrainStep(jitted, teacher_params, mesh, seed)


def make_loss_step(
    mesh: Mesh, definition: ModelDefinition, objective: Objective, *, seed: int, teacher: Teacher | None = None
) -> Callable[[Params, Batch], LossSums]:
    """Returns the jitted `(params, batch) -> sums` for evaluation: no dropout, the same noise at each evaluation."""

    def step(params: Params, batch: Batch, teacher_params: Params | None) -> LossSums:
        loss = loss_of(objective, teacher, teacher_params, params)
        return loss(definition.bind(params), batch, jax.random.key(seed), train=False)

    jitted, teacher_params = jax.jit(step, out_shardings=partitioning.replicated(mesh)), teacher and teacher.params
    return lambda params, batch: jitted(params, batch, teacher_params)
