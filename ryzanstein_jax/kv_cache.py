"""The paged KV cache on the devices: shape, sharding, write.

One pair of arrays per layer, [pages, kv_slots, page, head_dim], sharded by KV slot. Page 0 is
scratch: padding writes there and nobody reads it. The ids of the tokens are kept in pages of the
same numbering, [pages, page], so that penalties can see a sequence's history without a second
account of it anywhere.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from ryzanstein_jax.model.spec import ModelSpec
from ryzanstein_jax.sharding import PaddedSizes, named_sharding

KV_AXES = ("pages", "kv_slots", "page", "head_dim")
TOKEN_AXES = ("pages", "page")


class KVCache(NamedTuple):
    """Pages of all layers: `keys[i]`, `values[i]` [pages, kv_slots, page, head_dim]; `tokens` int32 [pages, page].

    The leaves are arrays, or ShapeDtypeStructs of them while programs are lowered.
    """

    keys: tuple[Any, ...]
    values: tuple[Any, ...]
    tokens: Any

    @classmethod
    def shapes(
        cls, spec: ModelSpec, sizes: PaddedSizes, mesh: Mesh, *, num_pages: int, page_size: int, dtype: jnp.dtype
    ) -> KVCache:
        """The cache as ShapeDtypeStructs with their shardings."""
        shape = (num_pages, sizes.heads.num_slots, page_size, spec.head_dim)
        page = jax.ShapeDtypeStruct(shape, dtype, sharding=named_sharding(mesh, KV_AXES))
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


def write(pages: jax.Array, new_TKH: jax.Array, slots_T: jax.Array) -> jax.Array:
    """Stores one entry per token.

    Args:
        pages: [P, K, page, H].
        new_TKH: [T, K, H].
        slots_T: int32 [T], `page number * page size + offset` of each token.
    """
    page_size = pages.shape[2]
    return pages.at[slots_T // page_size, :, slots_T % page_size].set(new_TKH.astype(pages.dtype))
