"""SUNDAE's noise in numbers, and the floors of its first loss: exact posteriors, and a model that is trained."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny

from diffusion_t5x.data.vocabularies import TokenIds
from diffusion_t5x.models.config import ModelConfig
from diffusion_t5x.models.streams import row_keys
from diffusion_t5x.models.transformer import ModelDefinition
from diffusion_t5x.objectives.sundae import Sundae, corrupt

FLOORS = {2: 0.562335, 4: 1.073543, 27: 2.261174}  # nats a token, of i.i.d. uniform data


def vocabulary_of(size):
    """`size` noise ids and a MASK."""
    return TokenIds(size + 1, pad_id=0, eos_id=1, mask_id=size, start_id=0, noise_ranges=((0, size),))


def uniform_batch(size, rows, length, seed=0):
    """Rows of i.i.d. uniform targets."""
    tokens = np.random.default_rng(seed).integers(0, size, (rows, length))
    return tiny.one_a_row([([], row) for row in tokens.tolist()])


@functools.partial(jax.jit, static_argnums=1)
def corrupted(batch, vocabulary, key):
    return corrupt(batch, vocabulary, row_keys(key, batch.example_ids))


def noisy(batch, vocabulary, seed=0):
    return np.asarray(corrupted(batch, vocabulary, jax.random.key(seed)))


@pytest.mark.parametrize("size,expected", [(27, 0.48148), (4, 0.375)])
def test_expected_share_of_changed_tokens(size, expected):
    rows = 8000
    batch = uniform_batch(size, rows, 40)
    changed = (noisy(batch, vocabulary_of(size)) != batch.tokens).mean(axis=1)
    assert expected == pytest.approx(0.5 * (1 - 1 / size), abs=1e-5)
    assert abs(changed.mean() - expected) < 4 * changed.std() / np.sqrt(rows)  # 4 standard errors: about 0.013


def test_noise_level_is_uniform():
    batch = uniform_batch(27, 2000, 400)
    changed = (noisy(batch, vocabulary_of(27)) != batch.tokens).mean(axis=1)
    levels = np.sort(changed / (1 - 1 / 27))
    # Kolmogorov-Smirnov at 1e-4 (2.2 / sqrt(2000)); a row of 400 tells its level within about 0.025.
    assert np.abs(levels - (np.arange(2000) + 0.5) / 2000).max() < 2.2 / np.sqrt(2000) + 0.01


def test_packed_examples_have_levels_of_their_own():
    rng = np.random.default_rng(0)
    batch = tiny.pack([[tiny.random_example(rng, 0, 50), tiny.random_example(rng, 0, 50)] for _ in range(400)], 100)
    changed = (noisy(batch, tiny.VOCABULARY) != batch.tokens).reshape(400, 2, 50).mean(axis=2)
    assert abs(np.corrcoef(changed.T)[0, 1]) < 4 / np.sqrt(400)
    assert changed.std(axis=0).min() > 0.2


def test_noise_is_uniform_over_the_noise_vocabulary_and_on_targets_alone():
    batch = tiny.one_a_row([([20, 21] * 5, [22] * 30)] * 3000, length=45)  # no clean token is a noise id
    tokens = noisy(batch, tiny.VOCABULARY)
    np.testing.assert_array_equal(tokens[~batch.target_mask], batch.tokens[~batch.target_mask])
    ids, counts = np.unique(tokens[batch.target_mask], return_counts=True)
    assert ids.tolist() == [*tiny.VOCABULARY.noise_ids(), 22]
    share = counts[:-1] / counts[:-1].sum()
    assert np.abs(share - 1 / 19).max() < 5 * np.sqrt(1 / 19 / counts[:-1].sum())


def test_noise_follows_the_example_and_not_its_place():
    batch = tiny.one_a_row(tiny.random_examples(0, [(2, 9), (5, 4), (0, 12), (3, 3)]))
    tokens = noisy(batch, tiny.VOCABULARY)
    for rows in ([3, 1, 0, 2], [2], [1, 3]):
        np.testing.assert_array_equal(noisy(tiny.rows_of(batch, rows), tiny.VOCABULARY), tokens[rows])
    longer = jax.tree.map(lambda x: np.pad(x, ((0, 0), (0, 7))) if x.ndim == 2 else x, batch)
    np.testing.assert_array_equal(noisy(longer, tiny.VOCABULARY)[:, :12], tokens)
    assert (noisy(batch, tiny.VOCABULARY, seed=1) != tokens).any()


def exact_posterior(size, length):
    """`P(x_1 | z)` as `[*z, x_1]`, and `H(x_1 | z)` in nats, for rows of that many uniform tokens under one α.

    From the joint distribution of all clean and noisy rows, integrated over α by Gauss-Legendre quadrature.
    """
    nodes, weights = np.polynomial.legendre.leggauss(length + 1)
    joint = 0  # [x_1, .., x_n, z_1, .., z_n]
    for alpha, weight in zip((nodes + 1) / 2, weights / 2, strict=True):
        channel = ((1 - alpha) * np.eye(size) + alpha / size) / size  # P(x, z) of one token
        row = functools.reduce(np.multiply.outer, [channel] * length)
        joint = joint + weight * row
    joint = np.moveaxis(joint, range(0, 2 * length, 2), range(length))
    joint = joint.sum(axis=tuple(range(1, length)))  # [x_1, *z]
    posterior = np.moveaxis(joint / joint.sum(axis=0), 0, -1)
    return posterior, -(np.moveaxis(joint, 0, -1) * np.log(posterior)).sum()


@pytest.mark.parametrize("size,length", [(2, 4), (4, 3), (27, 1)])
def test_floor_is_the_entropy_given_the_whole_noisy_row(size, length):
    posterior, entropy = exact_posterior(size, length)
    assert entropy == pytest.approx(FLOORS[size], abs=1e-6)
    # On such data a token's neighbours tell nothing: not what it was, nor how much noise there is.
    for others in itertools.product(range(size), repeat=length - 1):
        here = posterior[(slice(None), *others)]
        np.testing.assert_allclose(here, posterior[(slice(None), *[0] * (length - 1))], rtol=1e-9)


@pytest.mark.parametrize("size", FLOORS)
def test_the_best_predictor_attains_the_floor_and_others_do_not(size):
    rows = 8000
    batch, vocabulary = uniform_batch(size, rows, 40), vocabulary_of(size)

    @jax.jit
    def row_losses(posterior):
        """The objective's loss of each row."""
        table = jnp.pad(jnp.log(posterior), ((0, 1), (0, 1)), constant_values=-1e9)  # MASK is never read nor written
        per_row = jax.tree.map(lambda x: x[:, None], batch)
        key, objective, model = jax.random.key(3), Sundae(num_unrolls=0), tiny.TableModel(table, vocabulary)
        return jax.lax.map(
            lambda row: objective.loss(model, row, key, train=False).loss.mean(), per_row, batch_size=500
        )

    posterior, _ = exact_posterior(size, 1)
    best = np.asarray(row_losses(posterior))
    assert abs(best.mean() - FLOORS[size]) < 4 * best.std() / np.sqrt(rows)  # about 0.04 of 2.26, 0.006 of 0.56
    for shift in (-0.1, 0.1):  # surer that a token is what it was, or less sure
        other = posterior + shift * (np.eye(size) - (1 - np.eye(size)) / (size - 1))
        assert row_losses(other).mean() > best.mean() + 0.005


@pytest.mark.slow
def test_a_trained_model_comes_to_the_floor_and_not_below():
    """Whatever the model could see of the clean targets would take it below."""
    vocabulary = vocabulary_of(4)
    config = ModelConfig(embed_dim=16, num_layers=1, num_heads=2, head_dim=8, mlp_dim=32, vocab_size=8)
    definition = ModelDefinition(config, vocabulary)
    params = tiny.random_params(definition)
    optimizer, objective = optax.adam(1e-2), Sundae(num_unrolls=0)
    example = uniform_batch(4, 128, 16)

    def step(carry, key):
        params, opt_state = carry
        data_key, noise_key = jax.random.split(key)
        batch = example.replace(tokens=jax.random.randint(data_key, (128, 16), 0, 4))
        loss, grads = jax.value_and_grad(lambda p: objective.loss(definition.bind(p), batch, noise_key).loss.mean())(
            params
        )
        updates, opt_state = optimizer.update(grads, opt_state)
        return (optax.apply_updates(params, updates), opt_state), loss

    keys = jax.random.split(jax.random.key(0), 300)
    _, losses = jax.jit(lambda p: jax.lax.scan(step, (p, optimizer.init(p)), keys))(params)
    last = np.asarray(losses[-100:])
    standard_error = last.std() / np.sqrt(100)
    assert FLOORS[4] - 4 * standard_error < last.mean() < FLOORS[4] + 0.02 + 4 * standard_error
