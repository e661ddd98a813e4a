"""int8 products against integer arithmetic in numpy, and which kernels of a checkpoint are int8."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ryzanstein_jax.errors import UnsupportedModelError
from ryzanstein_jax.model import int8
from ryzanstein_jax.model.layers import product
from ryzanstein_jax.model.quantization import (
    LINEAR,
    QUANTIZATIONS,
    Quantization,
    quantization_config,
    resolve_quantization,
)


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


W8A8 = {
    "quant_method": "compressed-tensors", "format": "int-quantized", "ignore": ["lm_head"],
    "config_groups": {
        "group_0": {
            "targets": ["Linear"],
            "weights": {
                "num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel", "dynamic": False,
                "group_size": None, "observer": "minmax",
            },
            "input_activations": {
                "num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True,
            },
            "output_activations": None,
        }
    },
}  # fmt: skip


def changed(**group):
    base = W8A8["config_groups"]["group_0"]
    group = {name: (base[name] or {}) | part if isinstance(part, dict) else part for name, part in group.items()}
    return W8A8 | {"config_groups": {"group_0": base | group}}


def test_a_checkpoint_says_what_is_int8():
    whole = QUANTIZATIONS["int8"]
    assert resolve_quantization(None, None) is None
    assert resolve_quantization("int8", None) == whole
    for held in (whole, Quantization("int8", LINEAR), Quantization("int8", ("down",), ("down",))):
        assert resolve_quantization(None, quantization_config(held)) == held
    assert resolve_quantization(None, W8A8) == Quantization("int8", LINEAR)
    assert resolve_quantization(None, W8A8 | {"ignore": []}) == Quantization("int8", (*LINEAR, "unembed"))
    assert resolve_quantization("int8", W8A8) == whole


@pytest.mark.parametrize(
    "config",
    [
        {"quant_method": "awq", "bits": 4},
        {"quant_method": "gptq", "bits": 4},
        {"quant_method": "ryzanstein_jax", "name": "int2", "roles": []},
        {"quant_method": "ryzanstein_jax", "name": "int8", "roles": ["router"], "fine": []},
        {"quant_method": "ryzanstein_jax", "name": "int8", "roles": ["down"], "fine": ["qkv"]},
        {"quant_method": "ryzanstein_jax", "name": "int8", "roles": ["down"], "fine": "down"},
        {"quant_method": "ryzanstein_jax", "name": "int8"},
        W8A8 | {"format": "pack-quantized"},
        W8A8 | {"ignore": ["lm_head", "model.layers.0.mlp.down_proj"]},
        W8A8 | {"ignore": "lm_head"},
        W8A8 | {"config_groups": {}},
        W8A8 | {"config_groups": []},
        W8A8 | {"kv_cache_scheme": {"num_bits": 8}},
        changed(weights={"num_bits": 4}),
        changed(weights={"type": "float"}),
        changed(weights={"symmetric": False}),
        changed(weights={"strategy": "group"}),
        changed(weights=None),
        changed(input_activations={"dynamic": False}),
        changed(input_activations=None),
        changed(output_activations={"num_bits": 8}),
        changed(targets=["re:.*q_proj"]),
        "int8",
        [],
        {"quant_method": "x" * 10_000},
    ],
)
def test_what_is_not_read_is_refused_with_what_is(config):
    with pytest.raises(UnsupportedModelError, match="quantization_config.*Known: compressed-tensors int") as caught:
        resolve_quantization("int8", config)
    assert len(str(caught.value)) < 600
