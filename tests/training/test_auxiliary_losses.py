"""A model's own losses: on their way through layers and objectives, in the loss that is minimised, in metrics."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny
from variants import quick

from diffusion_t5x.models.layers import MLP
from diffusion_t5x.models.masks import CAUSAL
from diffusion_t5x.models.output import Auxiliary, Ratio
from diffusion_t5x.models.reading import shift_right, shifted_slots
from diffusion_t5x.models.transformer import ModelDefinition, Transformer
from diffusion_t5x.objectives.autoregressive import Autoregressive
from diffusion_t5x.objectives.sundae import Sundae
from diffusion_t5x.partitioning import MeshConfig
from diffusion_t5x.training.state import TrainState, abstract_state
from diffusion_t5x.training.step import loss_and_gradients, make_loss_step, make_train_step, means

CONFIG = dataclasses.replace(tiny.RELATIVE, num_layers=2)
WEIGHT = 0.3
# Rows of 1 to 11 targets: microbatches differ in how many tokens they have.
BATCH = tiny.pack([tiny.random_examples(0, row) for row in [[(4, 1)], [(1, 11)], [(0, 2)], [(2, 9)]]], 12)
AR = Autoregressive()


class Measured(MLP):
    """Feed-forward with a loss of its own: the mean square of what it reads."""

    def __call__(self, x, dropout_keys):
        output, _ = super().__call__(x, dropout_keys)
        square = Ratio(jnp.sum(jnp.square(x)), jnp.float32(x.size))
        return output, {"square": Auxiliary(square, WEIGHT), "rows": Auxiliary(Ratio(len(x), jnp.float32(1)))}


class Counted(Transformer):
    """Its own loss is the mean square of the hidden states of tokens; padding does not count."""

    def __call__(self, tokens, slots, *args):
        output = super().__call__(tokens, slots, *args)
        there = (slots.segment_ids > 0)[..., None]
        square = Ratio(jnp.sum(jnp.square(output.hidden) * there), jnp.sum(there, dtype=jnp.float32))
        return output.replace(auxiliary={"square": Auxiliary(square, WEIGHT)})


class LayersDefinition(ModelDefinition):
    def _build(self, key):
        model = super()._build(key)
        for stack in (model.decoder, *([model.encoder] if self.config.architecture == "encoder_decoder" else [])):
            sizes = (self.config.embed_dim, self.config.mlp_dim)
            keys = jax.random.split(key, self.config.num_layers)
            stack.blocks.mlp = jax.vmap(lambda k, sizes=sizes: Measured(k, *sizes, activation="gelu"))(keys)
        return model


class CountedDefinition(ModelDefinition):
    def _build(self, key):
        return Counted(key, self.config, self.vocabulary)


def made(kind=CountedDefinition, config=CONFIG):
    definition = kind(config, tiny.VOCABULARY)
    return definition, tiny.random_params(definition, 0)


def by_hand(params, objective=AR):
    """The objective's mean plus the weighted mean square, both over the whole batch."""
    plain = ModelDefinition(CONFIG, tiny.VOCABULARY).bind(params)
    tokens = shift_right(BATCH.tokens, BATCH.positions, tiny.VOCABULARY.start_id)
    hidden = plain(tokens, shifted_slots(BATCH, tiny.VOCABULARY), CAUSAL).hidden
    squares = jnp.square(hidden)[np.asarray(BATCH.segment_ids) > 0].sum(-1)
    return objective.loss(plain, BATCH, None).loss.mean() + WEIGHT * squares.mean(), squares.mean()


@jax.jit
@jax.value_and_grad
def expected(params, factor):
    """The objective's mean times a factor, and the weighted mean square."""
    loss, square = by_hand(params)
    return (loss - WEIGHT * square) * factor + WEIGHT * square


@pytest.mark.parametrize("microbatches,factor", quick([(1, None), (1, 50.0), (2, 50.0), (4, None)], [(2, 50.0)]))
def test_loss_and_gradients_are_those_of_the_whole_batch(microbatches, factor):
    definition, params = made()
    found = functools.partial(loss_and_gradients, microbatches=microbatches, normalizing_factor=factor)
    sums, grads = jax.jit(lambda p: found(definition, AR.loss, p, BATCH, jax.random.key(0)))(params)
    value, gradient = expected(params, 1.0 if factor is None else BATCH.target_mask.sum() / factor)
    np.testing.assert_allclose(sums.total(), value, rtol=1e-5)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-6), grads, gradient)


def test_denominators_of_the_batch_cost_no_pass():
    definition, params = made()
    plain = ModelDefinition(CONFIG, tiny.VOCABULARY)

    def flops(definition):
        def run(params):
            return loss_and_gradients(definition, AR.loss, params, BATCH, jax.random.key(0), microbatches=4)

        return jax.jit(run).lower(params).compile().cost_analysis()["flops"]

    assert flops(definition) == pytest.approx(flops(plain), rel=0.05)


@pytest.mark.slow
def test_the_training_step_minimises_and_reports_it():
    definition, params = made()
    mesh, optimizer = MeshConfig().make(), optax.sgd(0.1)
    abstract = abstract_state(mesh, definition, optimizer, keep_ema=False)
    state = TrainState(jnp.int32(0), params, optimizer.init(params))
    (loss, square), gradient = jax.jit(jax.value_and_grad(by_hand, has_aux=True))(params)
    step = make_train_step(mesh, abstract, definition, AR, optimizer, seed=0, microbatches=2)
    stepped, metrics = step(jax.tree.map(jnp.copy, state), BATCH)
    assert float(metrics["loss"]) == pytest.approx(float(loss), rel=1e-5)
    assert float(metrics["square"]) == pytest.approx(float(square), rel=1e-5)  # without the weight
    jax.tree.map(
        lambda new, old, g: np.testing.assert_allclose(new, old - 0.1 * g, rtol=1e-4, atol=1e-6),
        stepped.params,
        params,
        gradient,
    )
    evaluated = means(make_loss_step(mesh, definition, AR, seed=0)(params, BATCH))
    assert float(evaluated["loss"]) == pytest.approx(float(loss), rel=1e-5)


def test_layers_and_the_encoder_hand_theirs_on():
    config = dataclasses.replace(CONFIG, architecture="encoder_decoder")
    batch = tiny.pack_apart([[example] for example in tiny.random_examples(0, [(2, 5), (5, 3)])], 6, 8)
    definition, params = made(LayersDefinition, config)
    read = []

    def spy(mlp, x, keys):
        jax.debug.callback(lambda x: read.append(np.asarray(x)), x)
        return MLP.__call__(mlp, x, keys)[0], {}

    def losses(params):
        return AR.loss(definition.bind(params), batch, None)

    found = jax.jit(losses)(params).auxiliary
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Measured, "__call__", spy)
        jax.block_until_ready(jax.jit(lambda params: losses(params))(params))
        jax.effects_barrier()
    assert len(read) == 4  # two layers of each stack
    squares = np.concatenate([np.square(x).reshape(-1) for x in read])
    assert float(found["square"].ratio.mean()) == pytest.approx(squares.mean(), rel=1e-5)
    assert found["rows"].weight == 0 and float(found["rows"].ratio.mean()) == 2


def test_unrolled_passes_add_up():
    definition, params = made()

    @functools.partial(jax.jit, static_argnums=1)
    def losses(params, unrolls):
        return Sundae(num_unrolls=unrolls).loss(definition.bind(params), BATCH, jax.random.key(0), train=False)

    one, two = losses(params, 0), losses(params, 1)
    assert float(two.auxiliary["square"].ratio.denominator) == 2 * float(one.auxiliary["square"].ratio.denominator)
    plain = float(two.loss.mean())
    assert float(two.total()) == pytest.approx(plain + WEIGHT * float(two.auxiliary["square"].ratio.mean()), rel=1e-6)
