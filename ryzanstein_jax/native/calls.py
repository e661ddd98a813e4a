"""Which products and norms kernels take, and their calls.

Array names end in their dims: T tokens, I inputs, O outputs.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from ryzanstein_jax import native

#: Rows (of int8, digits of tokens) up to which a kernel that reads weights as they lie is faster than XLA's, by dtype,
#: and from which on one that turns weights about is faster still: chosen by measurement.
FEW_ROWS = {"float32": 32, "bfloat16": 64, "int8": 64}
MANY_ROWS = {"float32": 33, "bfloat16": 65, "int8": 25}
#: From which on a processor's instructions for tiles are.
TILED_ROWS = {"bfloat16": 5, "int8": 12}
#: Bytes of activations up to which kernels take them; of more, they would read too many too often.
MOST_BYTES = 16 << 20
#: What the outputs of both must be multiples of.
_COLUMNS, _PACKED_COLUMNS = 4, 32

#: How activations, kernel and result lie, by which dimension of the kernel is sharded.
_SPECS = {
    None: (PartitionSpec(), PartitionSpec(), PartitionSpec()),
    "outputs": (PartitionSpec(), PartitionSpec("tp"), PartitionSpec(None, "tp")),
    "inputs": (PartitionSpec(None, "tp"), PartitionSpec(None, "tp"), PartitionSpec()),
}


def takes(rows: int, shape: tuple[int, ...], dtype: Any) -> bool:
    """Whether a product of so many rows is one for these kernels; `shape` is what one device holds of a kernel."""
    name, lanes = str(dtype), native.lanes()
    if not lanes or not rows or name not in FEW_ROWS or (name == "int8" and not native.multiplies_bytes()):
        return False
    outputs, inputs = shape
    if inputs % (_per_lane(name) * lanes):
        return False
    return (rows <= FEW_ROWS[name] and outputs % _COLUMNS == 0) or _are_many(rows, shape, dtype)


def _are_many(rows: int, shape: tuple[int, ...], dtype: Any) -> bool:
    """Whether these rows are for `packed` or `tiles`, of those that kernels take."""
    outputs, inputs = shape
    name, size = str(dtype), jnp.dtype(dtype).itemsize
    # They take the registers of AVX-512, and of bfloat16 its products of pairs.
    able = native.lanes() == 16 and (name != "bfloat16" or native.multiplies_pairs())
    able = able and _PACKED_COLUMNS * inputs * size <= native.MOST_STACK_BYTES and outputs % _PACKED_COLUMNS == 0
    least = TILED_ROWS[name] if _by_tiles(name) else MANY_ROWS[name]
    return able and rows >= least and rows * inputs * size <= MOST_BYTES


def _by_tiles(name: str) -> bool:
    """Whether products of many rows of that dtype are for `tiles`."""
    return name in TILED_ROWS and native.multiplies_tiles()


def _gates(gate: str, rows: int, shape: tuple[int, ...], dtype: Any) -> bool:
    """Whether the kernel for these rows has the activation too."""
    from ryzanstein_jax.native.packed import GATES

    return gate in GATES and _are_many(rows, shape, dtype)


def _per_lane(dtype: str) -> int:
    """Numbers of a lane of 32 bits."""
    return {"float32": 1, "bfloat16": 2 if native.multiplies_pairs() else 1, "int8": 4}[dtype]


def sharded_product(
    x_TI: jax.Array, kernel_OI: jax.Array, dtype: Any, sharded: str | None, gate: str | None
) -> jax.Array | None:
    """x W^T, of operands as `model.layers.product` takes them; None where it is XLA's."""
    if x_TI.dtype != kernel_OI.dtype:
        return None
    return _by_parts(partial(product, dtype=dtype, gate=gate), x_TI.shape[0], sharded, gate, x_TI, kernel_OI)


def sharded_integer_product(
    x_TI: jax.Array, kernel_OI: jax.Array, scale_O: jax.Array, digits: int, mean_step: float, sharded: str | None,
    gate: str | None,
) -> jax.Array | None:  # fmt: skip
    """As `model.int8.product`, with its `MEAN_STEP`; None where it is XLA's."""
    if str(x_TI.dtype) not in ("float32", "bfloat16"):
        return None
    compute = partial(integer_product, digits=digits, mean_step=mean_step, gate=gate)
    return _by_parts(compute, digits * x_TI.shape[0], sharded, gate, x_TI, kernel_OI, scale_O)


def _by_parts(
    compute: Callable[..., jax.Array], rows: int, sharded: str | None, gate: str | None, x_TI: jax.Array,
    kernel_OI: jax.Array, *scales_O: jax.Array,
) -> jax.Array | None:  # fmt: skip
    """`compute` of these operands, on each device of what it holds of them; None where kernels do not take that."""
    mesh = jax.sharding.get_abstract_mesh()
    whole = mesh.size <= 1 or mesh.manual_axes
    x_spec, kernel_spec, result_spec = _SPECS[None if whole else sharded]
    held = _part(kernel_OI.shape, kernel_spec, mesh.size)
    if not takes(rows, held, kernel_OI.dtype):
        return None
    # Of a part of the inputs there are no activations yet.
    if gate and ((sharded == "inputs" and not whole) or not _gates(gate, rows, held, kernel_OI.dtype)):
        return None
    if whole:
        return compute(x_TI, kernel_OI, *scales_O)

    def part(*operands: jax.Array) -> jax.Array:
        found = compute(*operands)
        return jax.lax.psum(found, "tp") if sharded == "inputs" else found

    specs = x_spec, kernel_spec, *(PartitionSpec(*kernel_spec[:1]) for _ in scales_O)
    return jax.shard_map(part, in_specs=specs, out_specs=result_spec, check_vma=False)(x_TI, kernel_OI, *scales_O)


def _part(shape: tuple[int, ...], spec: PartitionSpec, size: int) -> tuple[int, ...]:
    """What one device holds."""
    return tuple(n if axis is None else n // size for n, axis in zip(shape, (*spec, None, None), strict=False))


def product(x_TI: jax.Array, kernel_OI: jax.Array, dtype: Any, gate: str | None = None) -> jax.Array:
    """x W^T, [T, O] of that dtype, or [T, O / 2] with a gate; both operands are float32 or both bfloat16, and `takes`
    said yes."""
    from ryzanstein_jax.native import tiles
    from ryzanstein_jax.native.packed import PackedProduct
    from ryzanstein_jax.native.products import Product, Shape

    (tokens, inputs), outputs, name = x_TI.shape, kernel_OI.shape[0], str(kernel_OI.dtype)
    wanted = str(jnp.dtype(dtype))
    kernel: native.Kernel
    if not _are_many(tokens, kernel_OI.shape, kernel_OI.dtype):
        paired = _per_lane(name) == 2
        kernel = Product(name, wanted, Shape.of(tokens, outputs), paired, not native.sees_what_is_next())
    elif _by_tiles(name):
        kernel = tiles.TileProduct.of(name, wanted, tokens, gate=gate)
        x_TI = _call(tiles.TileRows(), _words(tokens, inputs // 2, tiles.SIDE), x_TI)
    else:
        kernel = PackedProduct(name, wanted, PackedProduct.rows_of(tokens), gate=gate)
    return _call(kernel, jax.ShapeDtypeStruct((tokens, outputs // (2 if gate else 1)), dtype), x_TI, kernel_OI)


def integer_product(
    x_TI: jax.Array, kernel_OI: jax.Array, scale_O: jax.Array, digits: int, mean_step: float,
    gate: str | None = None,
) -> jax.Array:  # fmt: skip
    """As `model.int8.product`, float32 [T, O], or [T, O / 2] with a gate."""
    from ryzanstein_jax.native import tiles
    from ryzanstein_jax.native.packed import PackedProduct
    from ryzanstein_jax.native.products import IntegerProduct, Shape
    from ryzanstein_jax.native.quantize import Quantize

    (tokens, inputs), outputs = x_TI.shape, kernel_OI.shape[0]
    rows, listed = 0, False
    kernel: native.Kernel
    if not _are_many(digits * tokens, kernel_OI.shape, kernel_OI.dtype):
        kernel = IntegerProduct(digits, Shape.of(tokens, outputs, digits), not native.sees_what_is_next())
    elif _by_tiles("int8"):
        rows, kernel = tiles.SIDE, tiles.TileProduct.of("int8", "float32", tokens, digits, gate)
    else:
        rows, listed = PackedProduct.rows_of(tokens), digits == 2
        kernel = PackedProduct("int8", "float32", rows, digits, gate)
    parts = [jax.ShapeDtypeStruct((tokens,), dtype) for dtype in (jnp.float32, jnp.int32)]
    if rows:
        words = _words(tokens, inputs // 4, rows)
        lists = jax.ShapeDtypeStruct((words.shape[0], 1 + inputs // 4), jnp.int32)
        parts = [words, *parts, *([words] if digits == 2 else []), *([lists] if listed else [])]
    else:
        parts.insert(0, jax.ShapeDtypeStruct((digits * tokens, inputs), jnp.int8))
    q, steps, sums, *high = _call(Quantize(digits, str(x_TI.dtype), mean_step, rows, listed), parts, x_TI)
    result = jax.ShapeDtypeStruct((tokens, outputs // (2 if gate else 1)), jnp.float32)
    return _call(kernel, result, q, kernel_OI, steps, sums, scale_O, *high)


def _words(tokens: int, words: int, rows: int) -> jax.ShapeDtypeStruct:
    """Tokens as words by tiles of so many rows."""
    return jax.ShapeDtypeStruct((-(-tokens // rows), words, rows), jnp.int32)


def norm(x: jax.Array, scale_D: jax.Array, eps: float, offset: float) -> jax.Array | None:
    """As `model.layers.RMSNorm`, of the last dimension; None where it is XLA's: on several devices it always is."""
    lanes, mesh = native.lanes(), jax.sharding.get_abstract_mesh()
    known = x.dtype == scale_D.dtype and str(x.dtype) in ("float32", "bfloat16")
    if not lanes or mesh.size > 1 or not known or x.size == 0 or x.shape[-1] % lanes:
        return None
    from ryzanstein_jax.native.norm import Norm

    rows_ND = x.reshape(-1, x.shape[-1])
    result = jax.ShapeDtypeStruct(rows_ND.shape, x.dtype)
    y: jax.Array = _call(Norm(str(x.dtype), eps, offset), result, rows_ND, scale_D)
    return y.reshape(x.shape)


def _call(kernel: native.Kernel, results: Any, *operands: jax.Array) -> Any:
    return jax.ffi.ffi_call(native.register(kernel), results)(*operands)
