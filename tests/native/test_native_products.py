"""Products by kernels of our own: the same numbers as numpy's, whatever the rows, and sharded as XLA's are."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from ryzanstein_jax import native
from ryzanstein_jax.model import int8
from ryzanstein_jax.model.layers import product
from ryzanstein_jax.native import calls
from ryzanstein_jax.native.products import Shape
from ryzanstein_jax.sharding import make_mesh

#: Rows on both sides of every change of kernel or of tile.
ROWS = (1, 2, 3, 4, 7, 12, 13, 33, 65, 90)
#: Outputs and inputs: with tiles of 4 outputs only, and with blocks of each size.
SIZES = [(36, 64), (64, 192), (1024, 128)]


def operands(rows, size, dtype=np.float32):
    rng = np.random.default_rng(rows)
    x, kernel = (jnp.asarray(rng.standard_normal(shape), dtype) for shape in ((rows, size[1]), size))
    return x, kernel


def calls_ours(run, *arguments):
    """Whether what is traced calls a kernel of ours, and what it gives, on the mesh in use."""
    jitted = jax.jit(run)
    return "ryzanstein." in jitted.lower(*arguments).as_text(), jitted(*arguments)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("rows", ROWS)
def test_float32(rows, size):
    x, kernel = operands(rows, size)
    with jax.set_mesh(make_mesh(1)):
        ours, y = calls_ours(product, x, kernel)
    assert ours == calls_take(rows, size, "float32")
    wanted = np.asarray(x, np.float64) @ np.asarray(kernel, np.float64).T
    np.testing.assert_allclose(y, wanted, atol=3e-6 * size[1])


def calls_take(rows, size, dtype):
    with jax.set_mesh(make_mesh(1)):
        return calls.takes(rows, size, dtype)


@pytest.mark.parametrize("result", [jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("rows", ROWS)
def test_bfloat16(rows, size, result):
    x, kernel = operands(rows, size, jnp.bfloat16)
    with jax.set_mesh(make_mesh(1)):
        _, y = calls_ours(lambda x, kernel: product(x, kernel, result), x, kernel)
    wanted = np.asarray(x, np.float64) @ np.asarray(kernel, np.float64).T
    assert y.dtype == result
    # A result in bfloat16 has eight bits; sums are in float32.
    np.testing.assert_allclose(np.asarray(y, np.float64), wanted, rtol=2**-8 if result != jnp.float32 else 0, atol=1e-3)


@pytest.mark.parametrize("digits", [1, 2])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("rows", ROWS)
def test_int8_is_xlas_exact_product_scaled(rows, size, digits):
    rng = np.random.default_rng(rows)
    x = jnp.asarray(rng.standard_normal((rows, size[1])) * 10.0 ** rng.integers(-3, 3, (rows, 1)), jnp.float32)
    x = x.at[-1].set(0)
    kernel = jnp.asarray(rng.integers(-128, 128, size), jnp.int8)
    scale = jnp.asarray(rng.uniform(0.5, 2, size[0]), jnp.float32)
    wanted = jax.jit(lambda *a: int8.product(*a, digits))(x, kernel, scale)  # without a mesh it is XLA's
    with jax.set_mesh(make_mesh(1)):
        ours, y = calls_ours(lambda *a: int8.product(*a, digits), x, kernel, scale)
    assert ours == calls_take(rows * digits, size, "int8")
    largest = np.max(np.abs(wanted), axis=1, keepdims=True)
    assert (np.abs(y - wanted) <= 1e-6 * largest).all()
    assert not np.asarray(y)[-1].any(), "a token that is all zero stays zero"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("digits", [1, 2])
def test_tokens_are_quantized_as_xla_does_it(digits, dtype):
    from ryzanstein_jax.native.products import Quantize

    rng = np.random.default_rng(digits)
    x = jnp.asarray(rng.standard_normal((5, 64)), dtype)
    # Halves between two steps go to the even one.
    x = x.at[1, :4].set(jnp.asarray([127.0, 0.5, 1.5, -2.5], dtype)).at[1, 4:].set(0).at[2].set(0)
    shapes = (
        jax.ShapeDtypeStruct((digits * 5, 64), jnp.int8),
        jax.ShapeDtypeStruct((5,), jnp.float32),
        jax.ShapeDtypeStruct((digits * 5,), jnp.float32),
    )
    with jax.set_mesh(make_mesh(1)):
        name = native.register(Quantize(digits, int8.FINER, dtype))
        q, counts, sums = jax.jit(lambda x: jax.ffi.ffi_call(name, shapes)(x))(x)
    wanted, scales = jax.jit(lambda x: int8.quantize_tokens(x, digits))(x)
    np.testing.assert_array_equal(q, wanted)
    np.testing.assert_allclose(counts, scales[0][:, 0], rtol=1e-6)
    np.testing.assert_array_equal(sums, np.asarray(q, np.int64).sum(axis=1))


@pytest.mark.parametrize("rows", [1, 40])
@pytest.mark.parametrize("width", [2, 4])
@pytest.mark.parametrize("sharded", ["outputs", "inputs", None])
def test_sharded(sharded, width, rows):
    x, kernel = operands(rows, (256, 256))
    mesh = make_mesh(width)
    specs = {
        "outputs": (PartitionSpec(), PartitionSpec("tp")),
        "inputs": (PartitionSpec(None, "tp"), PartitionSpec(None, "tp")),
        None: (PartitionSpec(), PartitionSpec()),
    }
    placed = [
        jax.device_put(array, NamedSharding(mesh, spec))
        for array, spec in zip((x, kernel), specs[sharded], strict=True)
    ]
    with jax.set_mesh(mesh):
        ours, y = calls_ours(lambda x, kernel: product(x, kernel, sharded=sharded), *placed)
    assert ours == calls_take(rows, (256, 256), "float32")
    np.testing.assert_allclose(y, np.asarray(x) @ np.asarray(kernel).T, atol=1e-3)


def test_what_they_do_not_take(monkeypatch):
    assert not calls.takes(1, (64, 64), "float32"), "no mesh: nobody says that it is for a CPU"
    with jax.set_mesh(make_mesh(1)):
        assert native.lanes() and calls.takes(1, (64, 64), "float32")
        assert not calls.takes(1, (63, 64), "float32") and not calls.takes(1, (64, 65), "float32")
        assert not calls.takes(0, (64, 64), "float32") and not calls.takes(1, (64, 64), "float16")
        assert not calls.takes(calls.MOST_BYTES // (64 * 4) + 1, (64, 64), "float32")
        assert not calls.takes(calls.FEW_ROWS["float32"] + 1, (36, 64), "float32")
        monkeypatch.setenv(native.KERNELS_VARIABLE, "portable")
        assert not calls.takes(1, (64, 64), "float32")


@pytest.mark.parametrize("digits", [1, 2])
@pytest.mark.parametrize("tokens", [1, 2, 3, 4, 5, 64])
def test_tiles_fit_the_registers_and_tasks_are_whole_tiles(tokens, digits):
    for outputs in (4, 36, 576, 960, 1028, 3072, 49152):
        shape = Shape.of(tokens, outputs, digits)
        assert shape.rows * digits * shape.columns <= 16 and shape.columns % 4 == 0
        assert outputs % shape.columns == 0 and shape.block % shape.columns == 0 and shape.rows <= max(1, tokens)
