"""The training step: gradients whatever the microbatches, normalisers, averages, noise by seed and step."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny

from diffusion_t5x.models.transformer import ModelDefinition
from diffusion_t5x.objectives.autoregressive import Autoregressive
from diffusion_t5x.objectives.sundae import Sundae
from diffusion_t5x.partitioning import MeshConfig
from diffusion_t5x.training.step import loss_and_gradients, make_loss_step, make_train_step, step_key

# Very uneven rows: 1 to 11 targets, two packed rows, an empty one.
ROWS = [
    [[(4, 1)], [(1, 11)], [(0, 2), (3, 3)], [(2, 9)]],
    [[(1, 1)], [(5, 6)], [], [(2, 2), (0, 3), (1, 2)]],
]
BATCH = tiny.pack([tiny.random_examples(0, row) for row in ROWS[0]] + [tiny.random_examples(1, r) for r in ROWS[1]], 12)
DROPOUT = dataclasses.replace(tiny.RELATIVE, dropout_rate=0.2)


def assert_close(found, expected, rtol=1e-5, atol=1e-6):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=rtol, atol=atol), found, expected)


@functools.partial(jax.jit, static_argnums=0, static_argnames=("microbatches", "normalizing_factor"))
def _gradients(objective, params, batch, key, **settings):
    definition = ModelDefinition(DROPOUT, tiny.VOCABULARY)
    return loss_and_gradients(definition, objective.loss, params, batch, key, **settings)


def gradients(objective, batch, key=jax.random.key(0), **settings):  # noqa: B008
    """With dropout: rows draw from their own keys, so not even that depends on the microbatches."""
    return _gradients(objective, tiny.make_model()[1], batch, key, **settings)


AR, SUNDAE = Autoregressive(z_loss=0.01), Sundae(normalize="sequences")


@pytest.mark.parametrize(
    "objective", [AR, pytest.param(SUNDAE, marks=pytest.mark.slow)], ids=["target_tokens", "sequences"]
)
def test_microbatches_change_nothing(objective):
    assert_close(gradients(objective, BATCH, microbatches=4), gradients(objective, BATCH))


def test_normalizing_factor_takes_the_place_of_the_denominator():
    sums, grads = gradients(AR, BATCH)
    assert sums.loss.denominator == BATCH.target_mask.sum()
    other_sums, other_grads = gradients(AR, BATCH, normalizing_factor=50.0)
    assert other_sums.loss.mean() == sums.loss.numerator / 50
    assert_close(other_sums.metrics, sums.metrics)
    assert_close(other_grads, jax.tree.map(lambda g: g * sums.loss.denominator / 50, grads))


@pytest.mark.slow
def test_a_batch_without_targets_is_no_error_and_no_gradient():
    sums, grads = gradients(SUNDAE, BATCH.replace(target_mask=np.zeros_like(BATCH.target_mask)))
    assert sums.loss.mean() == 0
    assert all((g == 0).all() for g in jax.tree.leaves(grads))


@pytest.fixture(scope="module")
def run():
    """Three SGD steps with an average: the states before and after each, on the host, and the metrics."""
    mesh, optimizer = MeshConfig().make(), optax.sgd(0.1)
    definition = ModelDefinition(DROPOUT, tiny.VOCABULARY)
    abstract, state = tiny.fresh_state(mesh, definition, optimizer, keep_ema=True)
    step = make_train_step(mesh, abstract, definition, SUNDAE, optimizer, seed=3, ema_decay=0.75)
    states, metrics = [jax.device_get(state)], []
    with jax.set_mesh(mesh):
        for _ in range(3):
            state, found = step(state, BATCH)
            states.append(jax.device_get(state))
            metrics.append(jax.device_get(found))
        given = jax.tree.map(jnp.array, states[1])
        repeated, again = step(given, BATCH)
    assert all(x.is_deleted() for x in jax.tree.leaves(given))  # given up: its memory is used again
    return {"states": states, "metrics": metrics, "second again": (jax.device_get(repeated), jax.device_get(again))}


def test_a_step_is_an_optimizer_step_on_the_loss(run):
    sums, grads = gradients(SUNDAE, BATCH, step_key(3, 0))
    start, first = run["states"][:2]
    assert first.step == 1
    assert_close(first.params, jax.tree.map(lambda p, g: p - 0.1 * g, start.params, grads))
    metrics = run["metrics"][0]
    norm = np.sqrt(sum(np.square(g).sum() for g in jax.tree.leaves(grads)))
    assert metrics["loss"] == pytest.approx(float(sums.loss.mean()), rel=1e-5)
    assert metrics["gradient_norm"] == pytest.approx(norm, rel=1e-5)
    assert metrics["update_norm"] == pytest.approx(0.1 * norm, rel=1e-5)
    assert metrics["tokens"] == (BATCH.segment_ids > 0).sum()


def test_noise_is_another_at_each_step_and_the_same_when_a_step_is_repeated(run):
    definition = ModelDefinition(DROPOUT, tiny.VOCABULARY)
    reads = [np.asarray(SUNDAE.model_inputs(definition, BATCH, step_key(3, step))) for step in range(3)]
    changed = [(noisy != BATCH.tokens)[BATCH.target_mask] for noisy in reads]
    assert len({noise.tobytes() for noise in changed}) == 3
    for noise, metrics in zip(changed, run["metrics"], strict=True):
        assert metrics["noise_fraction"] == pytest.approx(noise.mean(), rel=1e-6)
    state, metrics = run["second again"]
    assert metrics == run["metrics"][1]
    jax.tree.map(np.testing.assert_array_equal, state, run["states"][2])


def test_another_seed_is_the_same_program():
    """So that it comes from the cache of compiled programs."""
    mesh, optimizer = MeshConfig().make(), optax.sgd(0.1)
    definition = ModelDefinition(DROPOUT, tiny.VOCABULARY)
    abstract, state = tiny.fresh_state(mesh, definition, optimizer)
    steps = [make_train_step(mesh, abstract, definition, AR, optimizer, seed=seed) for seed in (0, 2**33 + 7)]
    with jax.set_mesh(mesh):
        first, second = (step.lower(state, BATCH).as_text() for step in steps)
    assert first == second


@pytest.mark.parametrize("seed", [0, 3, -1, 2**32 - 1, 2**33 + 7])
def test_a_seed_in_an_argument_gives_the_same_keys(seed):
    found = step_key(jnp.uint32(seed % 2**32), 5)
    assert (jax.random.key_data(found) == jax.random.key_data(step_key(seed, 5))).all()


def test_moving_average_is_the_closed_form(run):
    start, *after = [state.params for state in run["states"]]

    def average(start, *after):
        decayed = 0.75 ** len(after) * start
        return decayed + sum(0.25 * 0.75 ** (len(after) - 1 - n) * p for n, p in enumerate(after))

    last = run["states"][-1]
    assert_close(last.ema, jax.tree.map(average, start, *after))
    for state, expected in ((last, last.ema), (last.replace(ema=None), last.params)):
        jax.tree.map(np.testing.assert_array_equal, state.eval_params, expected)


def test_evaluation_has_no_dropout_and_the_same_noise_each_time():
    definition, params = tiny.make_model(DROPOUT)
    mesh = MeshConfig().make()
    step = make_loss_step(mesh, definition, Sundae(), seed=0)
    first, again = step(params, BATCH), step(params, BATCH)
    jax.tree.map(np.testing.assert_array_equal, first, again)
    without = dataclasses.replace(definition, config=dataclasses.replace(DROPOUT, dropout_rate=0.0))
    jax.tree.map(np.testing.assert_array_equal, first, make_loss_step(mesh, without, Sundae(), seed=0)(params, BATCH))
