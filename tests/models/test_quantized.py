"""Matrices in few bits: published values and errors, a brute-force reference, and what a backward pass keeps."""

import functools
import statistics

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from diffusion_t5x.errors import UserError
from diffusion_t5x.models.frozen import freeze
from diffusion_t5x.models.layers import dense
from diffusion_t5x.models.quantized import NF4, Quantized, quantize

MATRICES = {  # shape, logical axes, axes of inputs
    "mlp": ((2, 128, 24), ("layers", "embed", "mlp"), (1,)),
    "query": ((2, 128, 3, 8), ("layers", "embed", "heads", "head_dim"), (1,)),
    "out": ((2, 3, 64, 24), ("layers", "heads", "head_dim", "embed"), (1, 2)),
    "short": ((2, 20, 24), ("layers", "mlp", "embed"), (1,)),
    "experts": ((2, 3, 64, 8), ("layers", "experts", "embed", "expert_mlp"), (2,)),
    "experts out": ((2, 3, 64, 8), ("layers", "experts", "expert_mlp", "embed"), (2,)),
}


@functools.partial(jax.jit, static_argnums=(1, 2))
def frozen(x, axes, dtype):
    return freeze(x, axes, dtype, "float32")


def matrix(name):
    shape, axes, inputs = MATRICES[name]
    x = np.random.default_rng(len(name)).standard_normal(shape).astype(np.float32)
    x[1, ..., 3] = 0  # an output channel of zeros
    return x, axes, inputs


def bitsandbytes(x, inputs):
    """NF4 as bitsandbytes computes it: of the weight `[outputs, inputs]` in one row, blocks of 64 values.

    Blocks are shorter where a row's last axis does not divide.
    """
    order = [axis for axis in range(x.ndim) if axis not in inputs] + list(inputs)
    flat = np.transpose(x, order)
    block = np.gcd(64, x.shape[inputs[-1]])
    blocks = flat.reshape(-1, block)
    values, table = np.empty_like(blocks), np.array(NF4, np.float32)
    for row, of_block in enumerate(blocks):
        absmax = np.abs(of_block).max()
        for column, value in enumerate(of_block):
            nearest = np.argmin(np.abs(table - value / absmax)) if absmax else 7
            values[row, column] = table[nearest] * absmax
    return np.transpose(values.reshape(flat.shape), np.argsort(order))


def test_the_16_values_are_the_quantiles_that_the_paper_defines():
    """As in bitsandbytes' `create_normal_map`: eight negative ones, nine from zero on, scaled to [-1, 1]."""
    quantile, most = statistics.NormalDist().inv_cdf, 0.9677083
    above = [quantile(p) for p in np.linspace(most, 0.5, 9)[:-1]]
    below = [-quantile(p) for p in np.linspace(most, 0.5, 8)[:-1]]
    values = np.array(sorted([*above, 0, *below]))
    np.testing.assert_allclose(values / values.max(), NF4, atol=1e-6)


@pytest.mark.parametrize("name", ["mlp", "out", "short", "experts"])
def test_nf4_is_that_of_bitsandbytes(name):
    x, axes, inputs = matrix(name)
    found = frozen(x, axes, "nf4")
    assert isinstance(found, Quantized) and found.shape == x.shape and found.size == x.size
    assert found.codes.size == x.size / 2 and found.absmax.size == x.size / np.gcd(64, x.shape[inputs[-1]])
    np.testing.assert_allclose(found.dequantized(), bitsandbytes(x, inputs), rtol=1e-6)
    again = found.requantized(found.dequantized())
    jax.tree.map(np.testing.assert_array_equal, again, found)


def test_the_error_of_nf4_is_the_published_one():
    """Mean error for normal numbers in blocks of 64, from bitsandbytes' own tests (tests/test_functional.py)."""
    x = np.random.default_rng(0).standard_normal((1, 1024, 1024)).astype(np.float32)
    error = np.abs(frozen(x, ("layers", "embed", "mlp"), "nf4").dequantized() - x)
    assert error.mean() == pytest.approx(0.072792, abs=2e-4)


@pytest.mark.parametrize("name", MATRICES)
def test_int8_rounds_to_the_127th_of_each_output_channels_largest_value(name):
    x, axes, inputs = matrix(name)
    found = frozen(x, axes, "int8")
    assert found.shape == x.shape and found.codes.dtype == np.int8
    step = np.abs(x.astype(np.float64)).max(axis=inputs, keepdims=True) / 127
    assert found.absmax.shape == step.shape
    codes = np.divide(x, step, out=np.zeros(x.shape), where=step > 0)
    clear = np.abs(np.abs(codes) % 1 - 0.5) > 1e-4  # not halfway between two, but for float32
    np.testing.assert_array_equal(np.asarray(found.codes)[clear], np.round(codes)[clear])
    np.testing.assert_allclose(found.dequantized(), found.codes * step, rtol=1e-6)
    assert np.all(np.abs(found.dequantized() - x) <= step / 2 * 1.0001)
    again = found.requantized(found.dequantized())
    np.testing.assert_array_equal(again.codes, found.codes)


@pytest.mark.parametrize("dtype", ["int8", "nf4"])
def test_a_product_and_its_gradient_are_those_of_the_dequantized_matrix(dtype):
    x, axes, _ = matrix("out")
    kernel = jax.tree.map(lambda part: part[0], frozen(x, axes, dtype))
    rows = jnp.asarray(np.random.default_rng(1).standard_normal((2, 5, 3, 64)), jnp.float32)

    def of(kernel):
        return jax.value_and_grad(lambda rows: jnp.sum(jnp.sin(dense(rows, kernel, inputs=2))))(rows)

    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6), of(kernel), of(kernel.dequantized())
    )
    assert dense(rows.astype(jnp.bfloat16), kernel, inputs=2).dtype == jnp.bfloat16
    assert kernel.dequantized(jnp.bfloat16).dtype == jnp.bfloat16


@pytest.mark.parametrize("dtype", ["int8", "nf4"])
def test_a_scan_over_layers_keeps_no_dequantized_matrices_for_the_backward_pass(dtype):
    layers, size = 6, 64
    x = jnp.asarray(np.random.default_rng(0).standard_normal((layers, size, size)), jnp.float32)
    kernels = quantize(x, dtype, range(1, 2))

    def loss(rows, kernels):
        return jnp.sum(jax.lax.scan(lambda y, kernel: (jnp.tanh(dense(y, kernel)), None), rows, kernels)[0])

    rows = jnp.ones((1, 2, size))
    stacked = (layers, size, size)
    text = str(jax.make_jaxpr(jax.grad(loss))(rows, kernels))
    assert f"f32[{','.join(map(str, stacked))}]" not in text
    plain = str(jax.make_jaxpr(jax.grad(loss))(rows, kernels.dequantized()))
    assert f"f32[{','.join(map(str, stacked))}]" in plain
    compiled = jax.jit(jax.grad(loss)).lower(rows, kernels).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < layers * size * size * 4 / 2


def test_nf4_refuses_inputs_that_are_no_multiple_of_four():
    with pytest.raises(UserError, match="a multiple of 4, not 6: choose int8"):
        quantize(jnp.ones((1, 6, 4)), "nf4", range(1, 2))


def test_what_is_no_matrix_of_a_layer_is_not_quantized():
    definition, params = tiny.make_model(tiny.LLAMA)
    axes = definition.axes()
    embedding = freeze(params["embedding"], axes["embedding"], "nf4", "bfloat16")
    assert embedding.dtype == jnp.bfloat16
    name = axes["decoder"]["blocks"]["mlp_norm"]["scale"], params["decoder"]["blocks"]["mlp_norm"]["scale"]
    assert freeze(name[1], name[0], "nf4", "bfloat16") is name[1]
