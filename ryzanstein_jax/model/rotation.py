"""What a layer does between its first product and its attention, by one kernel where there is one."""

from __future__ import annotations

import jax
from jax.sharding import PartitionSpec

from ryzanstein_jax import native
from ryzanstein_jax.kv_cache import Pages, QuantizedPages


def rotate_and_store(
    qkv_TKGH: jax.Array, cos: jax.Array, sin: jax.Array, slots_T: jax.Array, keys: Pages, values: Pages
) -> tuple[jax.Array, Pages, Pages] | None:
    """By one kernel, where there is one: the new keys and values into their pages, as `attention.attend` does it.

    Args:
        qkv_TKGH: queries, key and value of each slot, of this step's tokens.
        cos, sin: `layers.rope_tables`.
        slots_T: as `kv_cache.write` takes it.
        keys, values: as `attention.attend` takes them.

    Returns:
        The rotated queries and the layer's pages; None where keys and queries are to be rotated first.
    """
    lanes = native.lanes()
    if not lanes or isinstance(keys, QuantizedPages) or qkv_TKGH.dtype != keys.dtype:
        return None
    from ryzanstein_jax.native.rotate import RotateAndStore

    head_dim = qkv_TKGH.shape[3]
    kernel = RotateAndStore(head_dim, qkv_TKGH.shape[2] - 2, keys.shape[2], str(keys.dtype))
    if 2 * cos.shape[1] != head_dim or not kernel.runs_with(lanes):
        return None

    def run(qkv, cos, sin, slots, keys, values):  # type: ignore[no-untyped-def]
        q = jax.ShapeDtypeStruct((*qkv.shape[:2], qkv.shape[2] - 2, head_dim), qkv.dtype)
        pages = jax.ShapeDtypeStruct(keys.shape, keys.dtype)
        call = jax.ffi.ffi_call(native.register(kernel), (q, pages, pages), input_output_aliases=kernel.aliases)
        return tuple(call(qkv, cos, sin, slots, keys, values))

    heads, whole = PartitionSpec(None, "tp"), PartitionSpec()
    sharded = jax.shard_map(
        run, in_specs=(heads, whole, whole, whole, heads, heads), out_specs=(heads, heads, heads), check_vma=False
    )
    found: tuple[jax.Array, Pages, Pages] = sharded(qkv_TKGH, cos, sin, slots_T, keys, values)
    return found
