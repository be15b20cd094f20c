"""Tests products whose factors are rounded to bfloat16."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from variants import quick

from diffusion_t5x.models.layers import dense
from diffusion_t5x.models.masks import CAUSAL, Slots
from diffusion_t5x.models.products import matmul

_ROWS, _INPUTS, _COLUMNS = 24, 48, 40


def _rounded(x) -> np.ndarray:
    return np.asarray(jnp.asarray(x).astype(jnp.bfloat16)).astype(np.float64)


@pytest.fixture(scope="module")
def factors():
    keys = jax.random.split(jax.random.key(0), 3)
    shapes = (_ROWS, _INPUTS), (_INPUTS, _COLUMNS), (_ROWS, _COLUMNS)
    return [jax.random.normal(key, shape) for key, shape in zip(keys, shapes, strict=True)]


def test_rounds_both_factors_and_sums_in_float32(factors):
    x, kernel, cotangent = factors
    with jax.default_matmul_precision("bfloat16"):
        product, backward = jax.vjp(matmul, x, kernel)
        of_x, of_kernel = backward(cotangent)
    assert product.dtype == of_x.dtype == of_kernel.dtype == jnp.float32
    np.testing.assert_allclose(product, _rounded(x) @ _rounded(kernel), rtol=0, atol=1e-5)
    np.testing.assert_allclose(of_x, _rounded(cotangent) @ _rounded(kernel).T, rtol=0, atol=1e-5)
    np.testing.assert_allclose(of_kernel, _rounded(x).T @ _rounded(cotangent), rtol=0, atol=1e-5)


def test_float32_stays_float32_unless_asked(factors):
    x, kernel, _ = factors
    exact = np.asarray(x, np.float64) @ np.asarray(kernel, np.float64)
    np.testing.assert_allclose(matmul(x, kernel), exact, rtol=0, atol=1e-5)
    with jax.default_matmul_precision("bfloat16"):
        assert np.abs(np.asarray(matmul(x, kernel)) - exact).max() > 1e-3


@pytest.mark.parametrize("tie_embeddings", quick([True, False], [False]))
def test_every_kernel_of_a_model_is_rounded(tie_embeddings):
    definition, params = tiny.make_model(dataclasses.replace(tiny.LLAMA, tie_embeddings=tie_embeddings))
    batch = tiny.pack([tiny.random_examples(0, [(3, 4), (1, 4)])], 14)

    def logits(params):
        model = definition.bind(params)
        return model.logits(model(batch.tokens, Slots.of(batch), CAUSAL).hidden)

    with jax.default_matmul_precision("bfloat16"):
        program = jax.jit(logits).lower(params).as_text()
        found = np.asarray(logits(params))
    products = [line for line in program.splitlines() if "dot_general" in line]
    kernels = [line for line in products if "xbf16>) -> tensor<" in line and "xf32>" in line.split("->")[1]]
    assert len(kernels) == 8  # seven of a layer, of which the two are a scan, and the readout
    assert len(products) == 10  # and attention
    np.testing.assert_allclose(found, logits(params), rtol=0, atol=0.02 * np.abs(found).max())


def test_several_axes_are_one_product():
    x = jax.random.normal(jax.random.key(0), (2, 3, 4, 8))
    kernel = jax.random.normal(jax.random.key(1), (4, 8, 5))
    with jax.default_matmul_precision("bfloat16"):
        found = dense(x, kernel, inputs=2)
    np.testing.assert_allclose(found, np.tensordot(_rounded(x), _rounded(kernel), 2), rtol=0, atol=1e-5)
