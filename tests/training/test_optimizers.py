"""Optimizers: T5X's published Adafactor numbers, a brute-force AdamW, and stacked layers treated one by one."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from diffusion_t5x.training import optimizers, schedules


def second_moments(state):
    """The single FactoredState in an Adafactor state."""
    is_moments = lambda x: hasattr(x, "v_row")  # noqa: E731
    return next(x for x in jax.tree.leaves(state, is_leaf=is_moments) if is_moments(x))


def t5x_adafactor_step(moments, **hyperparameters):
    """One update of ones(3, 2) with gradient ones(3, 2) at step 1, learning rate 0.1, from given second moments."""
    optimizer = optimizers.adafactor(0.1, **hyperparameters)
    params = {"x": jnp.ones((3, 2))}

    def at_step_one(x):
        if not hasattr(x, "v_row"):
            return x
        given = {name: jnp.full_like(getattr(x, name), value) for name, value in moments.items()}
        return x._replace(count=jnp.int32(1), **given)

    state = jax.tree.map(at_step_one, optimizer.init(params), is_leaf=lambda x: hasattr(x, "v_row"))
    updates, state = optimizer.update(params, state, params)
    return optax.apply_updates(params, updates)["x"], second_moments(state)


# The numbers are those of T5X's adafactor_test.py. The row of both is the shorter axis: 2 moments of row, 3 of column.
def test_adafactor_has_t5xs_numbers():
    params, moments = t5x_adafactor_step({"v_row": 0.9, "v_col": 0.1}, min_dim_size_to_factor=0)
    np.testing.assert_allclose(moments.v_row, [0.9574349] * 2, rtol=1e-6)
    np.testing.assert_allclose(moments.v_col, [0.6169143] * 3, rtol=1e-6)
    np.testing.assert_allclose(params, np.full((3, 2), 0.9), rtol=1e-6)


def test_adafactor_has_t5xs_numbers_unfactored():
    params, moments = t5x_adafactor_step({"v": 0.5}, min_dim_size_to_factor=32)
    np.testing.assert_allclose(moments.v, np.full((3, 2), 0.787174), rtol=1e-6)
    np.testing.assert_allclose(params, np.full((3, 2), 0.9), rtol=1e-6)


def test_adafactor_has_t5xs_numbers_with_clipping():
    moments = {"v_row": 0.9, "v_col": 0.1}
    params, moments = t5x_adafactor_step(moments, min_dim_size_to_factor=0, max_grad_norm=1.0)
    np.testing.assert_allclose(moments.v_row, [0.478811] * 2, rtol=2e-6)
    np.testing.assert_allclose(moments.v_col, [0.13829] * 3, rtol=2e-6)
    np.testing.assert_allclose(params, np.full((3, 2), 0.9), rtol=1e-6)


def random_tree(seed, layers=3):
    """A model's parameters: matrices, heads as axes of their own, a vector; stacked, beside two that are not."""
    shapes = {"query": (12, 2, 4), "key": (12, 1, 4), "out": (2, 4, 12), "wi": (12, 20), "norm": (12,)}
    rng = np.random.default_rng(seed)
    # Layers differ in scale, so that one treatment for all would show.
    scale = 10.0 ** np.arange(layers)
    blocks = {
        name: jnp.array(rng.normal(size=(layers, *shape)) * scale.reshape(-1, *[1] * len(shape)), jnp.float32)
        for name, shape in shapes.items()
    }
    embedding = jnp.array(rng.normal(size=(30, 12)), jnp.float32)
    return {"embedding": embedding, "final_norm": jnp.ones(12), "blocks": blocks}


def unstacked(tree):
    layers = len(jax.tree.leaves(tree["blocks"])[0])
    rest = {name: value for name, value in tree.items() if name != "blocks"}
    return rest | {f"layer_{i}": jax.tree.map(lambda x, i=i: x[i], tree["blocks"]) for i in range(layers)}


def as_matrices(tree):
    shapes = {"query": (12, 8), "key": (12, 4), "out": (8, 12)}
    return jax.tree_util.tree_map_with_path(lambda path, x: x.reshape(shapes.get(path[-1].key, x.shape)), tree)


def train(optimizer, gradients, params, steps=4):
    state = optimizer.init(params)
    for gradient in gradients[:steps]:
        updates, state = jax.jit(optimizer.update)(gradient, state, params)
        params = optax.apply_updates(params, updates)
    return params


@pytest.mark.slow
def test_adafactor_of_stacked_layers_is_optaxs_of_each_layers_matrices():
    params, *gradients = [random_tree(seed) for seed in range(5)]
    hyperparameters = {"min_dim_size_to_factor": 8, "decay_rate": 0.7, "clipping_threshold": 1.5}
    stacked = train(optimizers.adafactor(0.05, **hyperparameters), gradients, params)
    flat = lambda tree: as_matrices(unstacked(tree))  # noqa: E731
    reference = train(optax.adafactor(0.05, **hyperparameters), [flat(g) for g in gradients], flat(params))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-6), flat(stacked), reference)


def test_adafactor_factors_attention_as_matrices():
    blocks = {"query": jnp.ones((4, 96, 6, 16)), "out": jnp.ones((4, 6, 16, 96)), "key": jnp.ones((4, 96, 2, 16))}
    state = optimizers.adafactor(0.1, min_dim_size_to_factor=32).init({"blocks": blocks})[1]["blocks"]
    shapes = {name: (state[name][0].v_row.shape, state[name][0].v_col.shape) for name in state}
    assert shapes == {"query": ((4, 96), (4, 96)), "out": ((4, 96), (4, 96)), "key": ((4, 32), (4, 96))}


def test_adafactor_of_experts_is_that_of_each_experts_matrix():
    rng = np.random.default_rng(0)
    scale = 10.0 ** np.arange(6).reshape(2, 3, 1, 1)  # of two layers and three experts
    params, *gradients = [jnp.array(scale * rng.normal(size=(2, 3, 12, 20)), jnp.float32) for _ in range(4)]
    in_stack = [{"blocks": {"mlp": {"wi_0": x}}} for x in (params, *gradients)]
    apart = [{f"{i}": x.reshape(6, 12, 20)[i] for i in range(6)} for x in (params, *gradients)]
    hyperparameters = {"min_dim_size_to_factor": 8}
    found = train(optimizers.adafactor(0.05, **hyperparameters), in_stack[1:], in_stack[0])["blocks"]["mlp"]["wi_0"]
    expected = train(optax.adafactor(0.05, **hyperparameters), apart[1:], apart[0])
    for number, matrix in enumerate(found.reshape(6, 12, 20)):
        np.testing.assert_allclose(matrix, expected[f"{number}"], rtol=2e-5)


def test_adamw_is_the_papers_and_leaves_norms_and_biases_undecayed():
    params = random_tree(0, layers=2) | {"relative_bias": {"embedding": jnp.full((32, 2), 2.0)}}
    gradients = [jax.tree.map(lambda x, s=s: jnp.cos(x * s), params) for s in (1.0, 2.0, 3.0)]
    schedule = schedules.linear(0.1, total_steps=10)
    trained = train(optimizers.adamw(schedule, b1=0.8, b2=0.9, eps=1e-6, weight_decay=0.3), gradients, params)

    def by_hand(path, theta, *gradients):
        name = jax.tree_util.keystr(path)
        decay = 0.0 if "norm" in name or "bias" in name else 0.3
        theta, m, v = np.float64(theta), 0.0, 0.0
        for t, g in enumerate(map(np.float64, gradients), start=1):
            m, v = 0.8 * m + 0.2 * g, 0.9 * v + 0.1 * g * g
            update = (m / (1 - 0.8**t)) / (np.sqrt(v / (1 - 0.9**t)) + 1e-6)
            theta = theta - 0.1 * (1 - (t - 1) / 10) * (update + decay * theta)
        return theta

    expected = jax.tree_util.tree_map_with_path(by_hand, params, *gradients)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), trained, expected)


def test_weight_decay_by_name():
    params = {"blocks": {"mlp": {"wi_0": 1.0}, "attention_norm": {"scale": 1.0}}, "relative_bias": {"embedding": 1.0}}
    optimizer = optimizers.adamw(1.0, weight_decay=0.5)
    params = jax.tree.map(lambda x: jnp.full((2, 4), x), params)
    updates, _ = optimizer.update(jax.tree.map(jnp.zeros_like, params), optimizer.init(params), params)
    assert updates["blocks"]["mlp"]["wi_0"].max() == -0.5
    assert updates["blocks"]["attention_norm"]["scale"].max() == 0
    assert updates["relative_bias"]["embedding"].max() == 0


def test_global_norm_is_clipped_over_all_parameters():
    params = {"a": jnp.zeros(2), "b": jnp.zeros(1)}
    gradients = {"a": jnp.array([3.0, 0.0]), "b": jnp.array([4.0])}
    optimizer = optimizers.adamw(1.0, b1=0.0, b2=0.0, eps=1.0, weight_decay=0.0, max_grad_norm=1.0)
    updates, _ = optimizer.update(gradients, optimizer.init(params), params)
    # With eps = 1 and no memory the update is g / (|g| + 1), of g = (0.6, 0.8).
    np.testing.assert_allclose(updates["a"], [-0.6 / 1.6, 0.0], rtol=1e-6)
    np.testing.assert_allclose(updates["b"], [-0.8 / 1.8], rtol=1e-6)


@pytest.mark.parametrize("make", [optimizers.adamw, optimizers.adafactor])
def test_learning_rate_is_that_of_the_last_update(make):
    params = {"blocks": {"w": jnp.ones((2, 3, 4))}}
    optimizer = make(schedules.constant(0.4, warmup_steps=4))
    state = jax.jit(optimizer.init)(params)
    seen = []
    for _ in range(6):
        _, state = jax.jit(optimizer.update)(params, state, params)
        seen.append(float(optimizers.learning_rate(state)))
    assert seen == pytest.approx([0.0, 0.1, 0.2, 0.3, 0.4, 0.4])


@pytest.mark.parametrize("make", [optimizers.adamw, optimizers.adafactor])
def test_the_state_keeps_its_shape(make):
    params = random_tree(0)
    shapes = lambda optimizer: jax.tree.map(jnp.shape, jax.eval_shape(optimizer.init, params))  # noqa: E731
    assert shapes(make(0.1)) == shapes(make(schedules.cosine(0.1, 100, 10), max_grad_norm=1.0))
