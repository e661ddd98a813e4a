"""Products with 4-bit kernels in groups, and with float8 kernels, against their values in NumPy."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from ryzanstein_jax.model import fp8, grouped
from ryzanstein_jax.model.kernels import quantized_product
from ryzanstein_jax.model.quantization import Scheme


def made(groups, zeros, dtype=ml_dtypes.int4, outputs=24, inputs=48):
    """A kernel, its scales and zero points, and the values that they stand for; `groups` 0: one scale for all."""
    rng = np.random.default_rng(groups)
    kernel = rng.integers(-8, 8, (outputs, inputs)).astype(dtype)
    shape = (outputs, groups) if groups else (outputs,)
    scale = rng.uniform(-2, 2, shape).astype(np.float32)
    zero = rng.integers(-8, 9, shape).astype(np.int8) if zeros else None
    wide = [
        np.repeat(one.reshape(outputs, -1), inputs // max(groups, 1), axis=1)
        for one in (scale, zero)
        if one is not None
    ]
    values = kernel.astype(np.float64)
    return kernel, scale, zero, (values - wide[1] if zeros else values) * wide[0]


@pytest.mark.parametrize("rows", [1, 3, 40])
@pytest.mark.parametrize("zeros", [False, True])
@pytest.mark.parametrize("groups", [0, 1, 4])
def test_a_product_is_that_of_the_values(rows, groups, zeros):
    kernel, scale, zero, values = made(groups, zeros)
    x = np.random.default_rng(rows).standard_normal((rows, 48)).astype(np.float32)
    scheme = Scheme("int4", group=48 // groups if groups else 0, zeros=zeros)
    got = jax.jit(quantized_product, static_argnums=4)(x, jnp.asarray(kernel), scale, zero, scheme)
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(np.asarray(got), x @ values.T, rtol=2e-5, atol=1e-4)


def test_what_a_gpu_does_with_few_tokens_is_the_same():
    """The branch that only a GPU takes, taken here."""
    kernel, scale, zero, values = made(4, True)
    x = np.random.default_rng(0).standard_normal((5, 48)).astype(np.float32)
    got = jax.jit(grouped.by_groups)(x, jnp.asarray(kernel), scale, zero)
    np.testing.assert_allclose(np.asarray(got), x @ values.T, rtol=2e-5, atol=1e-4)


def test_float8_kernels_with_groups_are_dequantized_too():
    kernel, scale, _, values = made(4, False, ml_dtypes.float8_e4m3fn)
    x = np.random.default_rng(0).standard_normal((5, 48)).astype(np.float32)
    got = quantized_product(x, jnp.asarray(kernel), scale, None, Scheme("fp8", group=12))
    np.testing.assert_allclose(np.asarray(got), x @ values.T, rtol=2e-5, atol=1e-4)


@pytest.mark.parametrize("rows", [1, 20])
def test_float8_without_a_gpu_rounds_no_activation(rows):
    kernel, scale, _, values = made(0, False, ml_dtypes.float8_e4m3fn)
    x = np.random.default_rng(rows).standard_normal((rows, 48)).astype(np.float32)
    got = jax.jit(fp8.product)(x, jnp.asarray(kernel), scale)
    np.testing.assert_allclose(np.asarray(got), x @ values.T, rtol=2e-5, atol=1e-4)


@pytest.mark.parametrize("rows", [1, 20])
def test_two_float8_matrices(rows):
    """What a GPU computes: exactly the product of the rounded activations, each token in a scale of its own."""
    kernel, scale, _, values = made(0, False, ml_dtypes.float8_e4m3fn)
    x = np.random.default_rng(rows).standard_normal((rows, 48)).astype(np.float32)
    x *= 10.0 ** np.random.default_rng(1).integers(-3, 3, (rows, 1))
    x[-1] = 0 if rows > 1 else x[-1]
    q, s = (np.asarray(one) for one in fp8.quantize_tokens(jnp.asarray(x)))
    assert q.dtype == ml_dtypes.float8_e4m3fn and s.shape == (rows, 1)
    held = q.astype(np.float64)
    assert np.isfinite(held).all()
    assert (np.abs(held).max(axis=1) == np.where(np.abs(x).max(axis=1) > 0, 448, 0)).all()
    assert (np.abs(held * s - x) <= np.maximum(np.abs(x) / 16, s / 512) * 1.001).all()
    got = np.asarray(jax.jit(fp8.of_two_float8)(x, jnp.asarray(kernel), scale))
    np.testing.assert_allclose(got, (held * s) @ values.T, rtol=1e-4, atol=1e-4 * np.abs(got).max())


def test_dequantized_kernels_have_the_dtype_of_the_activations():
    kernel, scale, zero, values = made(4, True)
    got = grouped.dequantized(jnp.asarray(kernel), jnp.asarray(scale), jnp.asarray(zero), jnp.bfloat16)
    assert got.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(got, np.float64), values, rtol=0.02)
