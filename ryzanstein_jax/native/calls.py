"""Which products the kernels of `products` take, and their calls.

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

#: Rows (of int8, digits of tokens) up to which a kernel that reads weights as they lie is the fastest, by their dtype:
#: chosen by measurement.
FEW_ROWS = {"float32": 32, "bfloat16": 64, "int8": 64}
#: Bytes of activations up to which one that turns weights about first is; of more, it would read too many too often.
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
    if rows <= FEW_ROWS[name]:
        return outputs % _COLUMNS == 0
    # It takes the registers of AVX-512, and of bfloat16 its products of pairs.
    able = lanes == 16 and (name != "bfloat16" or native.multiplies_pairs())
    able = able and _PACKED_COLUMNS * inputs * jnp.dtype(dtype).itemsize <= native.MOST_STACK_BYTES
    return able and outputs % _PACKED_COLUMNS == 0 and rows * inputs * jnp.dtype(dtype).itemsize <= MOST_BYTES


def _per_lane(dtype: str) -> int:
    """Numbers of a lane of 32 bits."""
    return {"float32": 1, "bfloat16": 2 if native.multiplies_pairs() else 1, "int8": 4}[dtype]


def sharded_product(x_TI: jax.Array, kernel_OI: jax.Array, dtype: Any, sharded: str | None) -> jax.Array | None:
    """x W^T, of operands that lie as `model.layers.product` says; None where it is XLA's."""
    if x_TI.dtype != kernel_OI.dtype:
        return None
    return _by_parts(partial(product, dtype=dtype), x_TI.shape[0], sharded, x_TI, kernel_OI)


def sharded_integer_product(
    x_TI: jax.Array, kernel_OI: jax.Array, scale_O: jax.Array, digits: int, finer: float, sharded: str | None
) -> jax.Array | None:
    """As `model.int8.product`; None where it is XLA's."""
    compute = partial(integer_product, digits=digits, finer=finer)
    return _by_parts(compute, digits * x_TI.shape[0], sharded, x_TI, kernel_OI, scale_O)


def _by_parts(
    compute: Callable[..., jax.Array], rows: int, sharded: str | None, x_TI: jax.Array, kernel_OI: jax.Array,
    *scales_O: jax.Array,
) -> jax.Array | None:  # fmt: skip
    """`compute` of these operands, on each device of what it holds of them; None where kernels do not take that."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.size <= 1 or mesh.manual_axes:
        return compute(x_TI, kernel_OI, *scales_O) if takes(rows, kernel_OI.shape, kernel_OI.dtype) else None
    x_spec, kernel_spec, result_spec = _SPECS[sharded]
    if not takes(rows, _part(kernel_OI.shape, kernel_spec, mesh.size), kernel_OI.dtype):
        return None

    def part(*operands: jax.Array) -> jax.Array:
        found = compute(*operands)
        return jax.lax.psum(found, "tp") if sharded == "inputs" else found

    specs = x_spec, kernel_spec, *(PartitionSpec(*kernel_spec[:1]) for _ in scales_O)
    return jax.shard_map(part, in_specs=specs, out_specs=result_spec, check_vma=False)(x_TI, kernel_OI, *scales_O)


def _part(shape: tuple[int, ...], spec: PartitionSpec, size: int) -> tuple[int, ...]:
    """What one device holds."""
    return tuple(n if axis is None else n // size for n, axis in zip(shape, (*spec, None, None), strict=False))


def product(x_TI: jax.Array, kernel_OI: jax.Array, dtype: Any) -> jax.Array:
    """x W^T, [T, O] of that dtype; both operands are float32 or both bfloat16, and `takes` said yes."""
    from ryzanstein_jax.native.packed import PackedProduct
    from ryzanstein_jax.native.products import Product, Shape

    tokens, outputs, name = x_TI.shape[0], kernel_OI.shape[0], str(kernel_OI.dtype)
    kernel: native.Kernel
    if tokens <= FEW_ROWS[name]:
        kernel = Product(name, str(jnp.dtype(dtype)), Shape.of(tokens, outputs), _per_lane(name) == 2)
    else:
        kernel = PackedProduct(name, str(jnp.dtype(dtype)), PackedProduct.rows_of(tokens))
    return _call(kernel, jax.ShapeDtypeStruct((tokens, outputs), dtype), x_TI, kernel_OI)


def integer_product(x_TI: jax.Array, kernel_OI: jax.Array, scale_O: jax.Array, digits: int, finer: float) -> jax.Array:
    """As `model.int8.product`, float32 [T, O]."""
    from ryzanstein_jax.native.packed import PackedProduct
    from ryzanstein_jax.native.products import IntegerProduct, Quantize, Shape

    (tokens, inputs), outputs = x_TI.shape, kernel_OI.shape[0]
    parts = (
        jax.ShapeDtypeStruct((digits * tokens, inputs), jnp.int8),
        jax.ShapeDtypeStruct((tokens,), jnp.float32),
        jax.ShapeDtypeStruct((digits * tokens,), jnp.float32),
    )
    q, counts, sums = _call(Quantize(digits, finer, str(x_TI.dtype)), parts, x_TI)
    kernel: native.Kernel
    if digits * tokens <= FEW_ROWS["int8"]:
        kernel = IntegerProduct(digits, finer, Shape.of(tokens, outputs, digits))
    else:
        kernel = PackedProduct("int8", "float32", PackedProduct.rows_of(tokens, digits), digits, finer)
    result = jax.ShapeDtypeStruct((tokens, outputs), jnp.float32)
    return _call(kernel, result, q, kernel_OI, counts, sums, scale_O)


def _call(kernel: native.Kernel, results: Any, *operands: jax.Array) -> Any:
    return jax.ffi.ffi_call(native.register(kernel), results)(*operands)
