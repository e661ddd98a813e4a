"""Products by kernels of our own: the same numbers as numpy's, whatever the rows, and sharded as XLA's are."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from llvmlite import binding

from ryzanstein_jax import native
from ryzanstein_jax.model import int8
from ryzanstein_jax.model.activations import gated
from ryzanstein_jax.model.layers import product
from ryzanstein_jax.native import calls
from ryzanstein_jax.native.products import Shape
from ryzanstein_jax.native.quantize import Quantize
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


@pytest.fixture(params=[False, True] if native.processor().tiles else [False], ids=lambda on: "tiles" if on else "")
def tiles(request, monkeypatch):
    """Whether the processor multiplies tiles, where this one does."""
    processor = native.processor()._replace(tiles=request.param)
    monkeypatch.setattr(native, "processor", lambda: processor)
    jax.clear_caches()
    yield request.param
    jax.clear_caches()


@pytest.mark.parametrize("result", [jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("rows", ROWS)
def test_bfloat16(tiles, rows, size, result):
    x, kernel = operands(rows, size, jnp.bfloat16)
    with jax.set_mesh(make_mesh(1)):
        ours, y = calls_ours(lambda x, kernel: product(x, kernel, result), x, kernel)
    assert ours == calls_take(rows, size, "bfloat16")
    wanted = np.asarray(x, np.float64) @ np.asarray(kernel, np.float64).T
    assert y.dtype == result
    # A result in bfloat16 has eight bits; sums are in float32.
    np.testing.assert_allclose(np.asarray(y, np.float64), wanted, rtol=2**-8 if result != jnp.float32 else 0, atol=1e-3)


@pytest.mark.parametrize("digits", [1, 2])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("rows", ROWS)
def test_int8_is_xlas_exact_product_scaled(tiles, rows, size, digits):
    rng = np.random.default_rng(rows)
    x = jnp.asarray(rng.standard_normal((rows, size[1])) * 10.0 ** rng.integers(-3, 3, (rows, 1)), jnp.float32)
    x = x.at[0, ::9].multiply(40).at[rows // 2, 5].multiply(3000).at[-1].set(0)
    kernel = jnp.asarray(rng.integers(-128, 128, size), jnp.int8)
    scale = jnp.asarray(rng.uniform(0.5, 2, size[0]), jnp.float32)
    wanted = jax.jit(lambda *a: int8.product(*a, digits))(x, kernel, scale)  # without a mesh it is XLA's
    with jax.set_mesh(make_mesh(1)):
        ours, y = calls_ours(lambda *a: int8.product(*a, digits), x, kernel, scale)
    assert ours == calls_take(rows * digits, size, "int8")
    largest = np.max(np.abs(wanted), axis=1, keepdims=True)
    assert (np.abs(y - wanted) <= 1e-6 * largest).all()
    assert not np.asarray(y)[-1].any(), "a token that is all zero stays zero"


@pytest.mark.parametrize("rows", [1, 13, 40])
@pytest.mark.parametrize("digits", [1, 2])
def test_int8_lets_nan_through(tiles, digits, rows):
    x = jnp.ones((rows, 64), jnp.float32).at[0, 3].set(jnp.nan)
    with jax.set_mesh(make_mesh(1)):
        ours, y = calls_ours(lambda *a: int8.product(*a, digits), x, jnp.ones((64, 64), jnp.int8), jnp.ones(64))
    assert ours == calls_take(rows * digits, (64, 64), "int8")
    assert np.isnan(np.asarray(y)[0]).all() and np.isfinite(np.asarray(y)[1:]).all()


@pytest.mark.parametrize("rows", [1, 40])
def test_int8_of_other_floats_is_xlas(rows):
    x = jnp.asarray(np.random.default_rng(0).standard_normal((rows, 64)), jnp.float16)
    kernel, scale = jnp.ones((64, 64), jnp.int8), jnp.ones(64)
    with jax.set_mesh(make_mesh(1)):
        ours, y = calls_ours(lambda *a: int8.product(*a, 2), x, kernel, scale)
    assert not ours
    np.testing.assert_allclose(y[:, 0], np.asarray(x, np.float32).sum(axis=1), atol=0.3)


def quantized(x, digits, rows=0):
    """What the kernel makes of tokens."""
    (tokens, inputs), tiles = x.shape, -(-x.shape[0] // max(rows, 1))
    kernel = Quantize(digits, str(x.dtype), int8.MEAN_STEP, rows, listed=rows > 0 and digits == 2)
    words = jax.ShapeDtypeStruct((tiles, inputs // 4, rows), jnp.int32)
    lists = jax.ShapeDtypeStruct((tiles, 1 + inputs // 4), jnp.int32)
    shapes = (
        words if rows else jax.ShapeDtypeStruct((digits * tokens, inputs), jnp.int8),
        jax.ShapeDtypeStruct((tokens,), jnp.float32),
        jax.ShapeDtypeStruct((tokens,), jnp.int32),
        *([words, lists] if kernel.listed else []),
    )
    with jax.set_mesh(make_mesh(1)):
        found = jax.jit(lambda x: jax.ffi.ffi_call(native.register(kernel), shapes)(x))(x)
    return [np.asarray(part) for part in found]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("digits", [1, 2])
def test_tokens_are_quantized_as_xla_does_it(digits, dtype):
    rng = np.random.default_rng(digits)
    x = jnp.asarray(rng.standard_normal((5, 64)), dtype)
    # Halves between two steps go to the even one, by both alike.
    x = x.at[1, :4].set(jnp.asarray([127.0, 0.5, 1.5, -2.5], dtype)).at[1, 4:].set(0).at[2].set(0)
    x = x.at[3, 7].set(500).at[4, ::8].set(-90)
    q, steps, sums = quantized(x, digits)
    wanted, wanted_steps = (np.asarray(part) for part in jax.jit(lambda x: int8.quantize_tokens(x, digits))(x))
    np.testing.assert_array_equal(q, wanted)
    np.testing.assert_allclose(steps, wanted_steps[:, 0], rtol=1e-6)
    values = sum(256**digit * part.astype(np.int64) for digit, part in enumerate(np.split(q, digits)))
    np.testing.assert_array_equal(sums, values.sum(axis=1))


@pytest.mark.parametrize("digits", [1, 2])
def test_tiles_hold_the_digits_and_list_the_words_that_have_high_ones(digits):
    tokens, inputs, rows = 7, 128, 3
    x = jnp.asarray(np.random.default_rng(0).uniform(-1, 1, (tokens, inputs)), jnp.float32)
    x = x.at[1, 9].set(1e3).at[2, 127].set(-1e3).at[6, 0].set(40.0)  # in tiles 0 and 2, none in tile 1
    wanted = np.split(quantized(x, digits)[0].view(np.int32), digits)
    q, steps, sums, *listed = quantized(x, digits, rows)
    for token in range(tokens):
        np.testing.assert_array_equal(q[token // rows, :, token % rows], wanted[0][token])
    assert steps.shape == sums.shape == (tokens,)
    if digits == 2:
        high, lists = listed
        assert [list(line[1 : 1 + line[0]]) for line in lists] == [[9 // 4, 127 // 4], [], [0]]
        for tile, line in enumerate(lists):
            for number, word in enumerate(line[1 : 1 + line[0]]):
                last = [min(tile * rows + row, tokens - 1) for row in range(rows)]
                np.testing.assert_array_equal(high[tile, number], wanted[1][last, word])


@pytest.mark.parametrize("kind", ["float32", "bfloat16", "int8"])
@pytest.mark.parametrize(("gate", "rows"), [("silu", 2), ("silu", 70), ("gelu_tanh", 70), ("gelu", 70)])
def test_gated(tiles, gate, rows, kind):
    """activation(first) * second of each pair, also of values that an exponential does not reach."""
    dtype = "bfloat16" if kind == "bfloat16" else "float32"
    x, kernel = operands(rows, (128, 64), dtype)
    x = x.at[0].multiply(40).at[1].set(0)
    if kind == "int8":
        kernel, scale = jnp.clip(kernel * 40, -128, 127).astype(jnp.int8), jnp.full(128, 1 / 40, jnp.float32)

        def run(x, kernel, gate):
            return int8.product(x, kernel, scale, 2, gate=gate)
    else:

        def run(x, kernel, gate):
            return product(x, kernel, gate=gate)

    pairs = jax.jit(lambda x, kernel: run(x, kernel, None).astype(jnp.float32))(x, kernel)
    wanted = np.asarray(gated(pairs, gate), np.float64)
    digits = 2 if kind == "int8" else 1
    with jax.set_mesh(make_mesh(1)):
        ours, y = calls_ours(lambda x, kernel: run(x, kernel, gate), x, kernel)
        by_kernel = gate != "gelu" and calls._are_many(digits * rows, (128, 64), kernel.dtype)
        text = jax.jit(lambda x, kernel: run(x, kernel, gate)).lower(x, kernel).as_text()
    assert ours == calls_take(digits * rows, (128, 64), kernel.dtype)
    assert ("stablehlo.multiply" in text) != by_kernel, "one kernel does all of it where it can"
    assert y.shape == (rows, 64) and y.dtype == dtype and not np.asarray(y[1]).any()
    # Of a sigmoid, up to 1, times the pair; products in bfloat16 were rounded before the activation in what is wanted.
    size = np.abs(pairs[:, ::2] * pairs[:, 1::2])
    assert (np.abs(np.asarray(y, np.float64) - wanted) <= (3e-2 if kind == "bfloat16" else 1e-5) * (size + 0.01)).all()


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


@pytest.mark.parametrize("rows", [1, 40])
@pytest.mark.parametrize("gate", ["silu", None])
@pytest.mark.parametrize(("kind", "sharded"), [("float32", "outputs"), ("float32", "inputs"), ("int8", "outputs")])
def test_sharded_gates_and_int8(kind, sharded, gate, rows):
    """The same as on one device; a gate is for the whole sum."""
    x, kernel = operands(rows, (256, 256))
    if kind == "int8":
        kernel, scale = jnp.clip(kernel * 40, -128, 127).astype(jnp.int8), jnp.full(256, 1 / 40, jnp.float32)

    def run(x, kernel):
        if kind == "int8":
            return int8.product(x, kernel, scale, 2, sharded=sharded, gate=gate)
        return product(x, kernel, sharded=sharded, gate=gate)

    spec = (PartitionSpec(None, "tp"),) * 2 if sharded == "inputs" else (PartitionSpec(), PartitionSpec("tp"))
    mesh = make_mesh(2)
    placed = [jax.device_put(one, NamedSharding(mesh, s)) for one, s in zip((x, kernel), spec, strict=True)]
    wanted = jax.jit(lambda *a: run(*a))(x, kernel)
    with jax.set_mesh(mesh):
        ours, y = calls_ours(run, *placed)
    assert ours
    np.testing.assert_allclose(y, wanted, rtol=1e-4, atol=1e-2)


@pytest.mark.parametrize(
    ("missing", "system", "refusal", "found"),
    [("", "Linux", 0, True), ("amx-int8", "Linux", 0, False), ("", "Darwin", 0, False), ("", "Linux", -1, False)],
)
def test_who_multiplies_tiles(monkeypatch, missing, system, refusal, found):
    features = dict.fromkeys(("avx2", "fma", "avx512f", *native._TILE_FEATURES), True) | {missing: False}
    known = binding.FeatureMap(features)
    asked = []

    class Library:
        def syscall(self, *arguments):
            asked.append(arguments)
            return refusal

    monkeypatch.setattr(binding, "get_host_cpu_features", lambda: known)
    monkeypatch.setattr(native.platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(native.platform, "system", lambda: system)
    monkeypatch.setattr(native.ctypes, "CDLL", lambda name: Library())
    assert native.processor.__wrapped__().tiles == found
    assert asked == ([(158, 0x1023, 18)] if not missing and system == "Linux" else [])


@pytest.mark.parametrize(
    ("machine", "name", "found"),
    [("x86_64", "znver5", True), ("x86_64", "sapphirerapids", False), ("aarch64", "apple-m1", True)],
)
def test_who_sees_what_is_next(monkeypatch, machine, name, found):
    monkeypatch.setattr(native, "processor", lambda: native.Processor(name, "", 16))
    monkeypatch.setattr(native.platform, "machine", lambda: machine)
    assert native.sees_what_is_next() == found


@pytest.mark.parametrize("always", [False, True])
@pytest.mark.parametrize("kind", ["float32", "bfloat16", "int8"])
def test_asking_for_what_is_next_changes_no_number(monkeypatch, kind, always):
    monkeypatch.setattr(native, "sees_what_is_next", lambda: not always)
    jax.clear_caches()
    x, kernel = operands(1, (64, 192), "bfloat16" if kind == "bfloat16" else "float32")
    with jax.set_mesh(make_mesh(1)):
        if kind == "int8":
            kernel = jnp.clip(kernel * 40, -128, 127).astype(jnp.int8)
            ours, y = calls_ours(lambda x, k: int8.product(x, k, jnp.ones(64), 1), x, kernel)
            wanted = np.asarray(x, np.float64) @ np.asarray(kernel, np.float64).T
            np.testing.assert_allclose(y, wanted, atol=0.02 * np.abs(wanted).max())
        else:
            ours, y = calls_ours(product, x, kernel)
            wanted = np.asarray(x, np.float64) @ np.asarray(kernel, np.float64).T
            np.testing.assert_allclose(np.asarray(y, np.float64), wanted, rtol=2**-8, atol=1e-3)
    assert ours
    jax.clear_caches()


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
