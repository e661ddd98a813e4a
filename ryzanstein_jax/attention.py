"""Attention over pages: one dispatch point, and the reference in plain XLA that runs everywhere.

The reference reads the pages in blocks with a running softmax, and only those in use: loop bounds are
data, so no program depends on how long the context is. Decode tokens are attended all together, each
to its own pages. Prompt chunks are cut into tiles of queries of one sequence, and each tile walks
the pages up to its last query.

Attention is sharded by KV slot and needs no communication, which `shard_map` states.

Array names end in their dims: T tokens, K KV slots, Q query heads per slot, H head_dim, D decode
tokens, C prompt tokens, N sequences, B queries of a tile, L positions of a block, W page-table width.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from ryzanstein_jax import kv_cache

#: Queries in a tile of a prompt chunk, and positions of a block of pages; chosen by measurement on CPUs.
TILE = 64
BLOCK = 128

_MASKED = -1e30


class AttentionPlan(NamedTuple):
    """Who attends to what in one step. Decode tokens come first, then C tokens of prompt chunks.

    Attributes:
        slots_T: int32 [T], where each token's key and value go (`kv_cache.write`).
        decode_tables: int32 [D, W], pages of each decode token's sequence.
        decode_lens: int32 [D], positions to attend to, its own included; 0 for padding.
        prefill_tables: int32 [N, W], pages of each prompt chunk's sequence.
        tile_starts: int32 [M], first token of each tile, counted from the first prompt token. Tiles
            are in order; one may run over the end of its chunk, where the next tile overwrites it.
        tile_seqs: int32 [M], row of `prefill_tables`.
        tile_positions: int32 [M], position of each tile's first token in its sequence.
        num_tiles: int32 [], how many tiles are real.
    """

    slots_T: jax.Array
    decode_tables: jax.Array
    decode_lens: jax.Array
    prefill_tables: jax.Array
    tile_starts: jax.Array
    tile_seqs: jax.Array
    tile_positions: jax.Array
    num_tiles: jax.Array


def max_tiles(prefill_tokens: int, max_prefills: int) -> int:
    """Most tiles that chunks of that many tokens together can need."""
    return prefill_tokens // TILE + max_prefills if prefill_tokens else 0


def pages_per_block(page_size: int) -> int:
    return max(1, BLOCK // page_size)


def attend(
    q_TKQH: jax.Array,
    k_TKH: jax.Array,
    v_TKH: jax.Array,
    keys: jax.Array,
    values: jax.Array,
    plan: AttentionPlan,
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Stores the new keys and values, then attends.

    Args:
        q_TKQH, k_TKH, v_TKH: of this step's tokens, rotated.
        keys, values: the layer's pages, [P, K, page, H].
        scale: multiplies the scores.
        window: attend to that many last positions only, the token's own included.
        softcap: scores become softcap * tanh(score / softcap).

    Returns:
        The attended values [T, K, Q, H] in q's dtype, and the layer's pages with the new entries.
    """
    run = partial(_attend_shard, scale=scale, window=window, softcap=softcap)
    if jax.sharding.get_abstract_mesh().empty:
        return run(q_TKQH, k_TKH, v_TKH, keys, values, plan)
    heads, pages = PartitionSpec(None, "tp"), PartitionSpec(None, "tp")
    sharded = jax.shard_map(
        run,
        in_specs=(heads, heads, heads, pages, pages, PartitionSpec()),
        out_specs=(heads, pages, pages),
        check_vma=False,
    )
    return sharded(q_TKQH, k_TKH, v_TKH, keys, values, plan)


def _attend_shard(q_TKQH, k_TKH, v_TKH, keys, values, plan, *, scale, window, softcap):  # type: ignore[no-untyped-def]
    keys = kv_cache.write(keys, k_TKH, plan.slots_T)
    values = kv_cache.write(values, v_TKH, plan.slots_T)
    decodes = plan.decode_lens.shape[0]
    update = partial(_update, scale=scale, softcap=softcap)
    parts = []
    if decodes:
        parts.append(_decode(q_TKQH[:decodes], keys, values, plan, window, update))
    if q_TKQH.shape[0] > decodes:
        parts.append(_prefill(q_TKQH[decodes:], keys, values, plan, window, update))
    out = parts[0] if len(parts) == 1 else jnp.concatenate(parts)
    return out, keys, values


def _decode(q_DKQH, keys, values, plan, window, update):  # type: ignore[no-untyped-def]
    """One query per sequence, against the pages of its own sequence."""
    lens_D = plan.decode_lens
    longest = jnp.max(lens_D)
    shortest = jnp.min(jnp.where(lens_D > 0, lens_D, longest))
    span = pages_per_block(keys.shape[2]) * keys.shape[2]
    first = 0 if window is None else jnp.maximum(shortest - window, 0) // span
    tables = _pad_tables(plan.decode_tables, keys.shape[2])

    def body(block, carry):  # type: ignore[no-untyped-def]
        k_DKLH, v_DKLH, positions_L = _read_block(keys, values, tables, block)
        seen = positions_L[None, :] < lens_D[:, None]
        if window is not None:
            seen &= positions_L[None, :] >= lens_D[:, None] - window
        return update(carry, q_DKQH, k_DKLH, v_DKLH, seen[:, None, None, :])

    carry = jax.lax.fori_loop(first, -(-longest // span), body, _start(q_DKQH))
    return _finish(carry, q_DKQH.dtype)


def _prefill(q_CKQH, keys, values, plan, window, update):  # type: ignore[no-untyped-def]
    """Tiles of queries of one sequence each, every tile against the pages up to its last query."""
    page_size = keys.shape[2]
    span = pages_per_block(page_size) * page_size
    tables = _pad_tables(plan.prefill_tables, page_size)
    # Room for a tile that begins at the last token: a slice that does not fit would be moved back.
    q_CKQH = jnp.pad(q_CKQH, ((0, TILE), (0, 0), (0, 0), (0, 0)))
    num_slots, queries, head_dim = q_CKQH.shape[1:]

    def tile_body(tile, out_CKQH):  # type: ignore[no-untyped-def]
        start, position = plan.tile_starts[tile], plan.tile_positions[tile]
        q_BKQH = jax.lax.dynamic_slice_in_dim(q_CKQH, start, TILE)
        q_KXH = q_BKQH.transpose(1, 2, 0, 3).reshape(1, num_slots, queries * TILE, head_dim)
        table = jax.lax.dynamic_slice_in_dim(tables, plan.tile_seqs[tile], 1)
        positions_B = position + jnp.arange(TILE)
        first = 0 if window is None else jnp.maximum(position - window + 1, 0) // span
        last = jnp.minimum(-(-(position + TILE) // span), table.shape[1] // pages_per_block(page_size))

        def block_body(block, carry):  # type: ignore[no-untyped-def]
            k_NKLH, v_NKLH, positions_L = _read_block(keys, values, table, block)
            seen_BL = positions_L[None, :] <= positions_B[:, None]
            if window is not None:
                seen_BL &= positions_L[None, :] > positions_B[:, None] - window
            seen_XL = jnp.tile(seen_BL, (queries, 1))
            return update(carry, q_KXH, k_NKLH, v_NKLH, seen_XL[None, None])

        tile_out = _finish(jax.lax.fori_loop(first, last, block_body, _start(q_KXH)), q_CKQH.dtype)
        tile_BKQH = tile_out.reshape(num_slots, queries, TILE, head_dim).transpose(2, 0, 1, 3)
        return jax.lax.dynamic_update_slice_in_dim(out_CKQH, tile_BKQH, start, 0)

    out = jax.lax.fori_loop(0, plan.num_tiles, tile_body, jnp.zeros_like(q_CKQH))
    return out[:-TILE]


def _pad_tables(tables_NW: jax.Array, page_size: int) -> jax.Array:
    """Page tables of a whole number of blocks; the scratch page fills up."""
    return jnp.pad(tables_NW, ((0, 0), (0, -tables_NW.shape[1] % pages_per_block(page_size))))


def _read_block(keys, values, tables_NW, block):  # type: ignore[no-untyped-def]
    """Keys and values [N, K, L, H] of one block of each sequence, and the block's positions [L]."""
    _, num_slots, page_size, head_dim = keys.shape
    pages = pages_per_block(page_size)
    length = pages * page_size
    sequences = tables_NW.shape[0]
    table_X = jax.lax.dynamic_slice_in_dim(tables_NW, block * pages, pages, axis=1).reshape(-1)

    def read(cache: jax.Array) -> jax.Array:
        # Whole pages as flat rows: XLA's CPU gather is several times faster on those.
        flat = cache.reshape(cache.shape[0], -1).at[table_X].get(mode="promise_in_bounds")
        pages_NPKSH = flat.reshape(sequences, pages, num_slots, page_size, head_dim)
        return pages_NPKSH.transpose(0, 2, 1, 3, 4).reshape(sequences, num_slots, length, head_dim)

    return read(keys), read(values), block * length + jnp.arange(length)


def _start(q_NKXH: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Running maximum, sum and weighted values of a softmax that has seen nothing."""
    rows = (*q_NKXH.shape[:-1], 1)
    return (
        jnp.full(rows, _MASKED, jnp.float32),
        jnp.zeros(rows, jnp.float32),
        jnp.zeros(q_NKXH.shape, jnp.float32),
    )


def _update(carry, q_NKXH, k_NKLH, v_NKLH, seen, *, scale, softcap):  # type: ignore[no-untyped-def]
    """One block into the running softmax."""
    maximum, total, values = carry
    scores = jnp.einsum("nkxh,nklh->nkxl", q_NKXH, k_NKLH, preferred_element_type=jnp.float32) * scale
    if softcap is not None:
        scores = softcap * jnp.tanh(scores / softcap)
    scores = jnp.where(seen, scores, _MASKED)
    new_maximum = jnp.maximum(maximum, jnp.max(scores, axis=-1, keepdims=True))
    # Masked scores are zeroed too: in a row that has seen nothing yet they equal the maximum.
    weights = jnp.where(seen, jnp.exp(scores - new_maximum), 0.0)
    decay = jnp.exp(maximum - new_maximum)
    added = jnp.einsum("nkxl,nklh->nkxh", weights.astype(v_NKLH.dtype), v_NKLH, preferred_element_type=jnp.float32)
    return new_maximum, total * decay + jnp.sum(weights, axis=-1, keepdims=True), values * decay + added


def _finish(carry: tuple[jax.Array, jax.Array, jax.Array], dtype: jnp.dtype) -> jax.Array:
    _, total, values = carry
    return (values / jnp.maximum(total, 1e-30)).astype(dtype)
