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
    q, step = int8.quantize_tokens(jnp.asarray(x))
    largest = np.abs(x).max(axis=1, keepdims=True)
    np.testing.assert_allclose(np.asarray(step), largest / 127, rtol=1e-6)
    error = np.abs(np.asarray(q) * np.asarray(step) - x)
    assert (error <= np.asarray(step) * 0.5001).all()
    assert (np.abs(np.asarray(q)).max(axis=1) == np.where(largest[:, 0] > 0, 127, 0)).all()


def of_two_digits(x):
    """Values in steps, their high digits, and what a step counts."""
    q, step = int8.quantize_tokens(jnp.asarray(x), 2)
    low, high = np.split(np.asarray(q, np.int64), 2)
    return 256 * high + low, high, np.asarray(step, np.float64)


def test_low_digits_reach_four_mean_magnitudes_and_high_ones_are_for_outliers():
    x = tokens(5, 960)
    x[:, 7] *= 100
    x[0, 8:11] = np.abs(x[0]).mean() * np.asarray([3.9, -3.9, 4.6])
    q, high, step = of_two_digits(x)
    mean = np.abs(x).mean(axis=1, keepdims=True)
    np.testing.assert_allclose(step, mean * 4 / 127, rtol=1e-6)
    assert (np.abs(q * step - x) <= step * 0.5001).all(), "outliers too"
    outliers = np.abs(x) > 4.1 * mean
    assert 3 < outliers.sum() < 20 and outliers[0, 10] and not outliers[0, 8:10].any()
    assert high[outliers].all() and not high[np.abs(x) < 4 * mean].any()


def test_two_digits_hold_a_value_that_is_all_of_its_token():
    x = np.zeros((3, 40_000), np.float32)
    x[0, 1], x[1, 1] = 3e5, -3e5
    q, high, step = of_two_digits(x)
    np.testing.assert_allclose(q[:2, 1] * step[:2, 0], x[:2, 1], rtol=2e-5)
    assert high.max() == 127 and high.min() == -127 and not q[2].any() and step[2] == 0


def test_sums_of_two_digits_stay_within_int32():
    """However large the values are: a step grows with their mean."""
    x = np.full((2, 100_000), 1e6, np.float32)
    x[1, ::2] = 1e3
    kernel = np.full((8, 100_000), -127, np.int8)
    got = jax.jit(int8.product, static_argnums=3)(x, kernel, np.ones(8, np.float32), 2)
    np.testing.assert_allclose(got, x.astype(np.float64) @ kernel.T.astype(np.float64), rtol=1e-3)


def test_two_digits_are_never_coarser_than_one():
    rng = np.random.default_rng(5)
    x = np.stack([np.ones(64), rng.uniform(-1, 1, 64), rng.standard_normal(64)]).astype(np.float32)
    steps = [np.asarray(int8.quantize_tokens(jnp.asarray(x), digits)[1]) for digits in (1, 2)]
    assert (steps[1] <= steps[0]).all() and steps[1][0] == steps[0][0]


@pytest.mark.parametrize("digits", [1, 2])
def test_nan_comes_through(digits):
    x = tokens(3, 64)
    x[1, 5] = np.nan
    got = np.asarray(int8.product(jnp.asarray(x), jnp.ones((8, 64), jnp.int8), jnp.ones(8), digits))
    assert np.isnan(got[1]).all() and np.isfinite(got[[0, 2]]).all()


@pytest.mark.parametrize("digits", [1, 2])
@pytest.mark.parametrize("rows", [1, 4])
def test_a_product_is_that_of_the_quantized_values(rows, digits):
    rng = np.random.default_rng(3)
    x, kernel = tokens(rows, 64), rng.integers(-127, 128, (40, 64), dtype=np.int8)
    channels = rng.uniform(0.5, 2, 40).astype(np.float32)
    q, step = (np.asarray(part, np.float64) for part in int8.quantize_tokens(jnp.asarray(x), digits))
    values = sum(256**digit * part for digit, part in enumerate(np.split(q, digits))) * step
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
