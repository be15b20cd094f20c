"""Layers against plain numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_t5x.models.layers import MLP, LayerNorm, RMSNorm, dense, dropout


@pytest.mark.parametrize("inputs,kernel,einsum", [(1, (6, 2, 3), "blhd,dnk->blhnk"), (2, (4, 6, 5), "blhd,hde->ble")])
def test_dense_contracts_the_last_axes_with_the_first(inputs, kernel, einsum):
    rng = np.random.default_rng(0)
    x, kernel = rng.standard_normal((2, 3, 4, 6)), rng.standard_normal(kernel)
    found = dense(x.astype(np.float32), kernel.astype(np.float32), inputs)
    np.testing.assert_allclose(found, np.einsum(einsum, x, kernel), rtol=1e-5, atol=1e-5)


def test_rms_norm():
    norm = RMSNorm(0.5, embed=4)
    norm.scale.set_value(jnp.array([1.0, 2.0, 0.0, -1.0]))
    x = np.array([[3.0, -1.0, 2.0, 0.0]])
    expected = x / np.sqrt(14 / 4 + 0.5) * [1, 2, 0, -1]
    np.testing.assert_allclose(norm(x.astype(np.float32)), expected, rtol=1e-6)
    assert norm(jnp.asarray(x, jnp.bfloat16)).dtype == jnp.bfloat16


def test_layer_norm():
    norm = LayerNorm(4, epsilon=0.5)
    norm.scale.set_value(jnp.array([1.0, 2.0, 0.0, -1.0]))
    norm.bias.set_value(jnp.array([0.0, 1.0, 3.0, 0.0]))
    x = np.array([[3.0, -1.0, 2.0, 0.0]])
    expected = np.array([2.0, -2.0, 1.0, -1.0]) / np.sqrt(10 / 4 + 0.5) * [1, 2, 0, -1] + [0, 1, 3, 0]
    np.testing.assert_allclose(norm(x.astype(np.float32))[0], expected, rtol=1e-6)
    assert norm(jnp.asarray(x, jnp.bfloat16)).dtype == jnp.bfloat16


def gelu(x):
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


@pytest.mark.parametrize("activation,gate", [("gelu", gelu), ("silu", lambda x: x / (1 + np.exp(-x)))])
def test_gated_mlp(activation, gate):
    mlp = MLP(jax.random.key(0), embed_dim=4, mlp_dim=6, activation=activation, dropout_rate=0.5)
    wi_0, wi_1, wo = (np.asarray(kernel.get_value()) for kernel in (mlp.wi_0, mlp.wi_1, mlp.wo))
    x = np.random.default_rng(0).standard_normal((2, 3, 4)).astype(np.float32)
    np.testing.assert_allclose(mlp(x, None)[0], (gate(x @ wi_0) * (x @ wi_1)) @ wo, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("gated", [True, False])
def test_mlp_with_biases(gated):
    mlp = MLP(jax.random.key(0), embed_dim=4, mlp_dim=6, activation="gelu", gated=gated, bias=True)
    rng = np.random.default_rng(0)
    for bias in (mlp.wi_0_bias, mlp.wo_bias, *([mlp.wi_1_bias] if gated else [])):
        bias.set_value(jnp.asarray(rng.standard_normal(bias.get_value().shape), jnp.float32))
    weights = {name: np.asarray(getattr(mlp, name).get_value()) for name in ("wi_0", "wi_0_bias", "wo", "wo_bias")}
    x = rng.standard_normal((2, 3, 4)).astype(np.float32)
    hidden = gelu(x @ weights["wi_0"] + weights["wi_0_bias"])
    if gated:
        hidden = hidden * (x @ np.asarray(mlp.wi_1.get_value()) + np.asarray(mlp.wi_1_bias.get_value()))
    np.testing.assert_allclose(mlp(x, None)[0], hidden @ weights["wo"] + weights["wo_bias"], rtol=1e-5, atol=1e-5)


def test_dropout_keeps_the_mean_and_shares_its_mask_over_the_length():
    keys, x = jax.random.split(jax.random.key(0), 8), np.ones((8, 5, 1000), np.float32)
    dropped = np.asarray(dropout(x, 0.3, keys))
    np.testing.assert_allclose(np.unique(dropped), [0, 1 / 0.7], rtol=1e-6)
    assert (dropped == dropped[:, :1]).all()  # the same over the length
    kept = (dropped[:, 0] > 0).mean()
    assert abs(kept - 0.7) < 5 * np.sqrt(0.7 * 0.3 / 8000)  # five standard errors
    assert len({row[0].tobytes() for row in dropped}) == 8  # another for each row
    np.testing.assert_array_equal(dropout(x[2:3], 0.3, keys[2:3]), dropped[2:3])  # whichever rows are beside it
    np.testing.assert_array_equal(dropout(x, 0.3, None), x)
