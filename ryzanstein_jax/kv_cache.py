"""The paged KV cache on the devices: shape, sharding, write, read.

Keys and values of each layer lie in pages, [pages, kv_slots, page, head_dim], sharded by KV slot. Page 0 is scratch:
padding writes there and nobody reads it. In fewer bits (`kv_cache_dtype`) the key or value of a token in a slot has one
scale, beside the pages. The ids of the tokens are kept in pages of the same numbering, [pages, page], so that penalties
can see a sequence's history without a second account of it anywhere.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from ryzanstein_jax.model import fp8, int8
from ryzanstein_jax.model.spec import ModelSpec
from ryzanstein_jax.sharding import PaddedSizes, named_sharding

KV_AXES = ("pages", "kv_slots", "page", "head_dim")
SCALE_AXES = ("pages", "kv_slots", "page")
TOKEN_AXES = ("pages", "page")


class QuantizedPages(NamedTuple):
    """A layer's keys or values in 8 bits: a vector of the last dimension is `numbers` times its scale.

    Attributes:
        numbers: [pages, kv_slots, page, head_dim], int8, or the bits of float8_e4m3fn as uint8: of float8 itself XLA
            widens all pages on a CPU to store a few entries, and Triton knows it from Ada on only.
        scales: float32 [pages, kv_slots, page]: the largest magnitude / 127 (int8) or / 448 (float8), 0 of zeros.
    """

    numbers: Any
    scales: Any

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.numbers.shape)

    @property
    def dtype(self) -> Any:
        return self.numbers.dtype


#: Keys or values of a layer.
Pages = jax.Array | QuantizedPages


class KVCache(NamedTuple):
    """Pages of all layers: `keys[i]`, `values[i]` are `Pages`; `tokens` int32 [pages, page].

    The leaves are arrays, or ShapeDtypeStructs of them while programs are lowered.
    """

    keys: tuple[Any, ...]
    values: tuple[Any, ...]
    tokens: Any

    @classmethod
    def shapes(
        cls, spec: ModelSpec, sizes: PaddedSizes, mesh: Mesh, *, num_pages: int, page_size: int, dtype: jnp.dtype
    ) -> KVCache:
        """The cache as ShapeDtypeStructs with their shardings; with a scale for each vector of an 8-bit dtype."""
        shape = (num_pages, sizes.heads.num_slots, page_size, spec.head_dim)
        page: Any = jax.ShapeDtypeStruct(shape, dtype, sharding=named_sharding(mesh, KV_AXES))
        if jnp.dtype(dtype).itemsize == 1:
            scales = jax.ShapeDtypeStruct(shape[:-1], jnp.float32, sharding=named_sharding(mesh, SCALE_AXES))
            page = QuantizedPages(page, scales)
        tokens = jax.ShapeDtypeStruct((num_pages, page_size), jnp.int32, sharding=named_sharding(mesh, TOKEN_AXES))
        return cls((page,) * spec.num_layers, (page,) * spec.num_layers, tokens)

    @classmethod
    def zeros(cls, shapes: KVCache) -> KVCache:
        """Allocates the cache on its devices."""
        return cls.zeros_of(shapes)()

    @classmethod
    def zeros_of(cls, shapes: KVCache) -> Any:
        """The jitted program that allocates the cache."""
        return jax.jit(
            lambda: jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes),
            out_shardings=jax.tree.map(lambda s: s.sharding, shapes),
        )


def bytes_per_page(spec: ModelSpec, sizes: PaddedSizes, page_size: int, dtype: jnp.dtype) -> int:
    """Bytes that one page of all layers takes on one device."""
    return sizes.page_bytes(spec, page_size, jnp.dtype(dtype).itemsize)


def write(pages: Pages, new_TKH: jax.Array, slots_T: jax.Array) -> Pages:
    """Stores one entry per token.

    Args:
        pages: [P, K, page, H].
        new_TKH: floats [T, K, H].
        slots_T: int32 [T], `page number * page size + offset` of each token.
    """
    page_size = pages.shape[2]

    def store(into: jax.Array, new: jax.Array) -> jax.Array:
        return into.at[slots_T // page_size, :, slots_T % page_size].set(new.astype(into.dtype))

    if not isinstance(pages, QuantizedPages):
        return store(pages, new_TKH)
    numbers_TKH, scales_TK1 = quantize(new_TKH, pages.numbers.dtype)
    return QuantizedPages(store(pages.numbers, numbers_TKH), store(pages.scales, scales_TK1[..., 0]))


def quantize(new_TKH: jax.Array, dtype: jnp.dtype) -> tuple[jax.Array, jax.Array]:
    """Numbers [T, K, H], int8 or float8's bits as uint8, and the float32 [T, K, 1] that they count."""
    if dtype == jnp.uint8:
        numbers_TKH, scales_TK1 = fp8.quantize_tokens(new_TKH)
        return jax.lax.bitcast_convert_type(numbers_TKH, jnp.uint8), scales_TK1
    return int8.quantize_tokens(new_TKH)


def floats(numbers: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """8-bit numbers in a wider dtype, exactly.

    Args:
        numbers: int8, or the bits of float8_e4m3fn as uint8.
        dtype: float32, bfloat16 or float16.
    """
    if numbers.dtype == jnp.int8:
        return numbers.astype(dtype)
    # The bits of a float8 are those of a float16 but for the bias of the exponent, 7 instead of 15. XLA's own
    # conversion is slower on CPUs, and Triton has none for GPUs before Ada.
    bits = numbers.astype(jnp.uint16)
    half = ((bits & 0x80) << 8) | ((bits & 0x7F) << 7)
    return jax.lax.bitcast_convert_type(half, jnp.float16).astype(dtype) * jnp.asarray(256, dtype)


def factors(block_NKLH: Pages, dtype: jnp.dtype) -> tuple[jax.Array, jax.Array | float]:
    """What products take of a block, in their dtype, and what is left to multiply: [N, K, 1, L], or 1."""
    if isinstance(block_NKLH, QuantizedPages):
        return floats(block_NKLH.numbers, dtype), block_NKLH.scales[:, :, None]
    return block_NKLH, 1.0


def read_blocks(keys: Pages, values: Pages, rows_NX: jax.Array) -> tuple[Pages, Pages]:
    """Keys and values [N, K, L, H] of the blocks that lie in these rows, as their pages are: with scales [N, K, L]."""
    _, num_slots, page_size, head_dim = keys.shape
    # The barriers keep other arithmetic out of the gather, and wide rows make it a plain copy: with either left
    # out XLA's CPU code for it is up to twice as slow.
    rows_X = jax.lax.optimization_barrier(rows_NX.reshape(-1))
    width = math.gcd(page_size * head_dim, 128)

    def gather(cache: jax.Array, width: int) -> jax.Array:
        size = math.prod(cache.shape[2:])
        wide = (
            cache.reshape(-1, size // width, width)
            .at[rows_X]
            .get(mode="promise_in_bounds", wrap_negative_indices=False)
        )
        return jax.lax.optimization_barrier(wide).reshape(
            -1, num_slots, rows_NX.shape[-1] // num_slots * page_size, *cache.shape[3:]
        )

    def read(pages: Pages) -> Pages:
        if isinstance(pages, QuantizedPages):
            return QuantizedPages(gather(pages.numbers, width), gather(pages.scales, page_size))
        return gather(pages, width)

    return read(keys), read(values)
