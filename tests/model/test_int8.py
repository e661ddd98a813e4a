"""int8 products against integer arithmetic in numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ryzanstein_jax.model import int8
from ryzanstein_jax.model.layers import product


def tokens(rows, inputs, seed=0):
    """Rows of very unlike sizes, one of them zero."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((rows, inputs)) * 10.0 ** rng.integers(-3, 3, (rows, 1))
    x[rows // 2] = 0 if rows > 1 else x[0]
    return x.astype(np.float32)


@pytest.mark.parametrize("rows", [1, 2, 3, 16, 70])
def test_integer_products_are_exact(rows):
    rng = np.random.default_rng(rows)
    q = rng.integers(-127, 128, (rows, 200), dtype=np.int8)
    kernel = rng.integers(-127, 128, (48, 200), dtype=np.int8)
    q[0], kernel[0] = 127, -127  # the largest sum that there is
    got = np.asarray(jax.jit(int8.integer_product)(q, kernel))
    assert got.dtype == np.int32
    np.testing.assert_array_equal(got, q.astype(np.int64) @ kernel.astype(np.int64).T)


@pytest.mark.parametrize("rows", [1, 5])
def test_one_digit(rows):
    x = tokens(rows, 96)
    q, (scale,) = int8.quantize_tokens(jnp.asarray(x))
    largest = np.abs(x).max(axis=1, keepdims=True)
    np.testing.assert_allclose(np.asarray(scale), largest / 127, rtol=1e-6)
    error = np.abs(np.asarray(q) * np.asarray(scale) - x)
    assert (error <= np.asarray(scale) * 0.5001).all()
    assert (np.abs(np.asarray(q)).max(axis=1) == np.where(largest[:, 0] > 0, 127, 0)).all()


def test_a_second_digit_is_254_times_finer():
    x = tokens(5, 96)
    q, scales = int8.quantize_tokens(jnp.asarray(x), 2)
    first, second = (np.asarray(part, np.float64) for part in np.split(np.asarray(q), 2))
    coarse, fine = (np.asarray(scale, np.float64) for scale in scales)
    error = np.abs(first * coarse + second * fine - x)
    assert (error <= coarse / 254 * 0.51 + 1e-7 * np.abs(x)).all() and error.max() > 0


@pytest.mark.parametrize("digits", [1, 2])
@pytest.mark.parametrize("rows", [1, 4])
def test_a_product_is_that_of_the_quantized_values(rows, digits):
    rng = np.random.default_rng(3)
    x, kernel = tokens(rows, 64), rng.integers(-127, 128, (40, 64), dtype=np.int8)
    channels = rng.uniform(0.5, 2, 40).astype(np.float32)
    q, scales = (jax.device_get(part) for part in int8.quantize_tokens(jnp.asarray(x), digits))
    values = sum(part * scale.astype(np.float64) for part, scale in zip(np.split(q, digits), scales, strict=True))
    expected = values @ (kernel * channels[:, None].astype(np.float64)).T
    got = np.asarray(jax.jit(int8.product, static_argnums=3)(x, kernel, channels, digits))
    np.testing.assert_allclose(got, expected, rtol=2e-6, atol=1e-6 * np.abs(expected).max())


def test_a_single_row_of_bfloat16_is_the_first_of_two():
    rng = np.random.default_rng(4)
    x, kernel = (jnp.asarray(rng.standard_normal(shape), jnp.bfloat16) for shape in ((1, 64), (40, 64)))
    got = jax.jit(product)(x, kernel)
    exact = np.asarray(x, np.float64) @ np.asarray(kernel, np.float64).T
    assert got.shape == (1, 40) and got.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(got, np.float64), exact, rtol=0.01, atol=0.05)
    text = jax.jit(product).lower(x, kernel).compile().as_text()
    assert "bf16[2,40]" in text or "f32[2,40]" in text, "the library takes no single row"
