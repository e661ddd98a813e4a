"""Attention over pages: one dispatch point, and the reference in plain XLA that runs everywhere.

NVIDIA GPUs have a kernel of their own, `paged_attention`, and CPUs another, `native.attention`; what follows is about
the reference.

The reference reads the pages in blocks with a running softmax, and only those in use: loop bounds are
data, so no program depends on how long the context is. A decode token attends to *items*, the blocks of its
own sequence, and many items of all sequences are read at a time, so that a short sequence costs little beside a
long one. Blocks that many sequences share are read once for all of them. Prompt chunks are cut into tiles of
queries of one sequence, and a few tiles that reach about as far walk the pages together, up to their last query.

Attention is sharded by KV slot and needs no communication, which `shard_map` states.

Array names end in their dims: T tokens, K KV slots, Q query heads per slot, H head_dim, D decode
tokens, C prompt tokens, N sequences, I items, J shared blocks, G tiles at a time, B queries of a tile, L positions of
a block, P pages of a block, W page-table width, X whatever stands for queries.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from ryzanstein_jax import kv_cache, native
from ryzanstein_jax.kv_cache import Pages, QuantizedPages

#: Queries in a tile of a prompt chunk, and positions of a block of pages; chosen by measurement on CPUs.
TILE = 32
BLOCK = 128

#: Tiles of prompt chunks that are computed at a time.
TILES = 4

#: Decode tokens that a block must have in common for reading it once to pay.
SHARERS = 8

#: Sizes of heads that `paged_attention` knows: Triton has powers of two only.
KERNEL_HEADS = (16, 32, 64, 128, 256)

_MASKED = -1e30
#: The maximum of no scores: so far above masked ones that their weights are zero beside it.
_NOTHING = -1e29


class AttentionPlan(NamedTuple):
    """Who attends to what in one step. Decode tokens come first, then C tokens of prompt chunks.

    Attributes:
        slots_T: int32 [T], where each token's key and value go (`kv_cache.write`).
        decode_tables: int32 [D, W], pages of each decode token's sequence.
        decode_lens: int32 [D], positions to attend to, its own included; 0 for padding.
        item_seqs, item_blocks: int32 [I], row of `decode_tables` and number of the block, the last block of
            each sequence first, then those before the last, and so on.
        private_blocks: int32 [D], how many items each decode token has.
        shared_seqs, shared_blocks: int32 [J], a row of `decode_tables` and the number of a block in it that all
            of `shared_members` begin with too; these blocks are no items.
        shared_members: int32 [J, D], 1 for the decode tokens that attend to the block.
        num_shared: int32 [], how many shared blocks are real.
        prefill_tables: int32 [N, W], pages of each prompt chunk's sequence.
        tile_starts: int32 [M], first token of each tile, counted from the first prompt token; those that reach
            furthest come first. M is a multiple of TILES, and copies of the last tile fill up.
        tile_seqs: int32 [M], row of `prefill_tables`.
        tile_positions: int32 [M], position of each tile's first token in its sequence.
        tile_lens: int32 [M], how many tokens each tile has, at most TILE; 0 for padding.
        num_tiles: int32 [], how many tiles are real.
    """

    slots_T: jax.Array
    decode_tables: jax.Array
    decode_lens: jax.Array
    item_seqs: jax.Array
    item_blocks: jax.Array
    private_blocks: jax.Array
    shared_seqs: jax.Array
    shared_blocks: jax.Array
    shared_members: jax.Array
    num_shared: jax.Array
    prefill_tables: jax.Array
    tile_starts: jax.Array
    tile_seqs: jax.Array
    tile_positions: jax.Array
    tile_lens: jax.Array
    num_tiles: jax.Array


def max_tiles(prefill_tokens: int, max_prefills: int) -> int:
    """Most tiles that chunks of that many tokens together can need, up to a multiple of TILES."""
    return -(-(prefill_tokens // TILE + max_prefills) // TILES) * TILES if prefill_tokens else 0


def pages_per_block(page_size: int) -> int:
    return max(1, BLOCK // page_size)


def max_items(decodes: int, table_width: int, page_size: int) -> int:
    """Most items of that many decode tokens."""
    return decodes * -(-table_width // pages_per_block(page_size))


def max_shared(decodes: int, table_width: int, page_size: int) -> int:
    """Most shared blocks of that many decode tokens."""
    return max_items(decodes, table_width, page_size) // SHARERS if decodes >= SHARERS else 0


def attend(
    q_TKQH: jax.Array,
    k_TKH: jax.Array | None,
    v_TKH: jax.Array | None,
    keys: Pages,
    values: Pages,
    plan: AttentionPlan,
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
) -> tuple[jax.Array, Pages, Pages]:
    """Stores the new keys and values, then attends.

    Args:
        q_TKQH, k_TKH, v_TKH: of this step's tokens, rotated; no keys and values where the pages have them.
        keys, values: the layer's `kv_cache.Pages`, [P, K, page, H].
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
    if k_TKH is not None:
        keys = kv_cache.write(keys, k_TKH, plan.slots_T)
        values = kv_cache.write(values, v_TKH, plan.slots_T)
    settings = {"scale": scale, "window": window, "softcap": softcap}
    if has_kernel(keys.shape[-1]):
        out_TKQH = attend_by_kernel(q_TKQH, keys, values, plan, **settings)
    elif kernel := native_kernel(q_TKQH, keys, **settings):
        out_TKQH = attend_by_native(kernel, q_TKQH, keys, values, plan)
    else:
        out_TKQH = attend_by_loops(q_TKQH, keys, values, plan, **settings)
    return out_TKQH, keys, values


def attend_by_loops(q_TKQH, keys, values, plan, *, scale, window, softcap):  # type: ignore[no-untyped-def]
    """What a step's tokens attend to, whose keys and values are in the pages: the reference."""
    decodes = plan.decode_lens.shape[0]
    update = partial(_update, scale=scale, softcap=softcap)
    out_TKQH = jnp.zeros_like(q_TKQH)
    if decodes:
        decoded_DKQH = _decode(q_TKQH[:decodes], keys, values, plan, window, update)
        out_TKQH = jnp.concatenate([decoded_DKQH, out_TKQH[decodes:]])
    if q_TKQH.shape[0] > decodes:
        out_TKQH = _prefill(q_TKQH, out_TKQH, keys, values, plan, window, update)
    return out_TKQH


def has_kernel(head_dim: int) -> bool:
    """Whether `paged_attention` computes it: the mesh in use is of NVIDIA GPUs, and heads have a size that it knows."""
    on_nvidia = getattr(native.mesh_device(), "device_kind", "").startswith("NVIDIA")
    return on_nvidia and head_dim in KERNEL_HEADS and native.wanted()


def native_kernel(q_TKQH, keys, *, scale, window, softcap):  # type: ignore[no-untyped-def]
    """The `native.attention.Attention` that computes it: where the mesh in use is of CPUs, and sizes fit; else None."""
    lanes = native.lanes()
    if not lanes:
        return None
    from ryzanstein_jax.native.attention import Attention

    kernel = Attention(
        head_dim=q_TKQH.shape[3],
        queries=q_TKQH.shape[2],
        page_size=keys.shape[2],
        tile=TILE,
        dtype=str(q_TKQH.dtype),
        pages=str(keys.dtype),
        scale=scale,
        window=window,
        softcap=softcap,
    )
    return kernel if kernel.runs_with(lanes) else None


def attend_by_native(kernel, q_TKQH, keys, values, plan):  # type: ignore[no-untyped-def]
    """As `attend_by_loops`, by a kernel from `native_kernel`."""
    scales = ()
    if isinstance(keys, QuantizedPages):
        (keys, *key_scales), (values, *value_scales) = keys, values
        scales = (*key_scales, *value_scales)
    return jax.ffi.ffi_call(native.register(kernel), jax.ShapeDtypeStruct(q_TKQH.shape, q_TKQH.dtype))(
        q_TKQH, keys, values, plan.decode_tables, plan.decode_lens, plan.prefill_tables,
        plan.tile_starts, plan.tile_seqs, plan.tile_positions, plan.tile_lens, *scales,
    )  # fmt: skip


def attend_by_kernel(q_TKQH, keys, values, plan, **settings):  # type: ignore[no-untyped-def]
    """As `attend_by_loops`, by `paged_attention`: each decode token is a tile of its own."""
    # Imported here because Pallas is of no use elsewhere, and takes its time.
    from ryzanstein_jax.paged_attention import Tiles, attend_tiles

    decodes = plan.decode_lens.shape[0]
    # Of padding among the prompt tokens the results have to be finite.
    out = jnp.zeros_like(q_TKQH) if q_TKQH.shape[0] > decodes else None
    if decodes:
        each, lens_D = jnp.arange(decodes), plan.decode_lens
        tiles = Tiles(each, each, jnp.maximum(lens_D - 1, 0), jnp.minimum(lens_D, 1), plan.decode_tables)
        out = attend_tiles(q_TKQH, keys, values, tiles, out, tile=1, **settings)
    if q_TKQH.shape[0] > decodes:
        tiles = Tiles(plan.tile_starts, plan.tile_seqs, plan.tile_positions, plan.tile_lens, plan.prefill_tables)
        out = attend_tiles(q_TKQH, keys, values, tiles, out, tile=TILE, first=decodes, **settings)
    return out


def _decode(q_DKQH, keys, values, plan, window, update):  # type: ignore[no-untyped-def]
    """One query per sequence: the blocks that many share first, then items, as many at a time as there are queries."""
    decodes, num_slots, queries, head_dim = q_DKQH.shape
    lens_D = plan.decode_lens
    span = pages_per_block(keys.shape[2]) * keys.shape[2]
    tables_NWP = _block_tables(plan.decode_tables, keys.shape[2])
    begin_D = jnp.zeros_like(lens_D) if window is None else lens_D - window
    carry = _start(q_DKQH)
    if plan.shared_seqs.shape[0]:
        q_KXH = q_DKQH.transpose(1, 0, 2, 3).reshape(1, num_slots, decodes * queries, head_dim)
        rows_JX = _rows(tables_NWP[plan.shared_seqs, plan.shared_blocks], num_slots)

        def shared_body(index, carry):  # type: ignore[no-untyped-def]
            k_NKLH, v_NKLH = kv_cache.read_blocks(keys, values, rows_JX[index])
            positions_L = plan.shared_blocks[index] * span + jnp.arange(span)
            seen_DL = (plan.shared_members[index] > 0)[:, None] & (positions_L >= begin_D[:, None])
            seen_XL = jnp.repeat(seen_DL, queries, axis=0)
            return update(carry, q_KXH, k_NKLH, v_NKLH, seen_XL[None, None])

        shared = jax.lax.fori_loop(0, plan.num_shared, shared_body, _start(q_KXH))
        carry = tuple(x.reshape(num_slots, decodes, queries, -1).transpose(1, 0, 2, 3) for x in shared)

    # A window leaves out all but the last blocks, which come first.
    last_blocks = jnp.max(-(-lens_D // span) - jnp.maximum(begin_D, 0) // span)
    num_items = jnp.sum(jnp.minimum(plan.private_blocks, last_blocks))
    padding = -plan.item_seqs.shape[0] % decodes
    seqs_I, blocks_I = (jnp.pad(x, (0, padding)) for x in (plan.item_seqs, plan.item_blocks))
    rows_IX = _rows(tables_NWP[seqs_I, blocks_I], num_slots)

    def body(step, carry):  # type: ignore[no-untyped-def]
        first = step * decodes
        seqs_D, blocks_D, rows_DX = (
            jax.lax.dynamic_slice_in_dim(x, first, decodes) for x in (seqs_I, blocks_I, rows_IX)
        )
        k_DKLH, v_DKLH = kv_cache.read_blocks(keys, values, rows_DX)
        positions_DL = blocks_D[:, None] * span + jnp.arange(span)
        ends_D = jnp.where(first + jnp.arange(decodes) < num_items, lens_D[seqs_D], 0)
        seen_DL = positions_DL < ends_D[:, None]
        if window is not None:
            seen_DL &= positions_DL >= begin_D[seqs_D][:, None]
        q_items = q_DKQH[seqs_D]
        item_carry = update(None, q_items, k_DKLH, v_DKLH, seen_DL[:, None, None])
        return _join(carry, item_carry, jnp.arange(decodes)[:, None] == seqs_D)

    carry = jax.lax.fori_loop(0, -(-num_items // decodes), body, carry)
    return _finish(carry, q_DKQH.dtype)


def _join(carry, item_carry, owns_DI):  # type: ignore[no-untyped-def]
    """Running softmaxes [D, K, Q, .] and those of items [I, K, Q, .], each added to that of its owner."""
    maximum, total, values = carry
    item_maximum, item_total, item_values = item_carry
    largest = jnp.max(jnp.where(owns_DI[:, :, None, None, None], item_maximum, _MASKED), axis=1)
    new_maximum = jnp.maximum(maximum, largest)
    decay = jnp.exp(maximum - new_maximum)
    # Padding adds nothing: the sums of an item that has seen nothing are zero.
    owner_maximum = jnp.max(jnp.where(owns_DI[:, :, None, None, None], new_maximum[:, None], _MASKED), axis=0)
    item_decay = jnp.exp(item_maximum - owner_maximum)

    def added(x):  # type: ignore[no-untyped-def]
        flat_IX = (x * item_decay).reshape(x.shape[0], -1)
        return (owns_DI.astype(jnp.float32) @ flat_IX).reshape(-1, *x.shape[1:])

    return new_maximum, total * decay + added(item_total), values * decay + added(item_values)


def _prefill(q_TKQH, out_TKQH, keys, values, plan, window, update):  # type: ignore[no-untyped-def]
    """A few tiles of queries at a time, against the pages up to the last query of any of them.

    Returns `out_TKQH` with the rows of the prompt tokens set.
    """
    decodes = plan.decode_lens.shape[0]
    page_size = keys.shape[2]
    span = pages_per_block(page_size) * page_size
    tables_NWP = _block_tables(plan.prefill_tables, page_size)
    num_tokens, num_slots, queries, head_dim = q_TKQH.shape

    def group_body(group, out_TKQH):  # type: ignore[no-untyped-def]
        starts_G, seqs_G, first_G, lens_G = (
            jax.lax.dynamic_slice_in_dim(x, group * TILES, TILES)
            for x in (plan.tile_starts, plan.tile_seqs, plan.tile_positions, plan.tile_lens)
        )
        tokens_GB = decodes + starts_G[:, None] + jnp.arange(TILE)
        q_GBKQH = jnp.take(q_TKQH, tokens_GB, axis=0, mode="clip")
        q_GKXH = q_GBKQH.transpose(0, 2, 3, 1, 4).reshape(TILES, num_slots, queries * TILE, head_dim)
        positions_GB = first_G[:, None] + jnp.arange(TILE)
        begin = 0 if window is None else jnp.maximum(jnp.min(first_G) - window + 1, 0) // span
        end = jnp.minimum(-(-(jnp.max(first_G) + TILE) // span), tables_NWP.shape[1])

        def block_body(block, carry):  # type: ignore[no-untyped-def]
            k_GKLH, v_GKLH = kv_cache.read_blocks(keys, values, _rows(tables_NWP[seqs_G, block], num_slots))
            positions_L = block * span + jnp.arange(span)
            seen_GBL = positions_L <= positions_GB[:, :, None]
            if window is not None:
                seen_GBL &= positions_L > positions_GB[:, :, None] - window
            return update(carry, q_GKXH, k_GKLH, v_GKLH, jnp.tile(seen_GBL, (1, queries, 1))[:, None])

        # The first block by itself: most groups have no more, and its running softmax needs no beginning.
        carry = jax.lax.fori_loop(begin + 1, end, block_body, block_body(begin, None))
        out_GKXH = _finish(carry, q_TKQH.dtype)
        out_GBKQH = out_GKXH.reshape(TILES, num_slots, queries, TILE, head_dim).transpose(0, 3, 1, 2, 4)
        # What runs over the end of a tile goes nowhere.
        places_GB = jnp.where(jnp.arange(TILE) < lens_G[:, None], tokens_GB, num_tokens)
        return out_TKQH.at[places_GB].set(out_GBKQH, mode="drop")

    return jax.lax.fori_loop(0, -(-plan.num_tiles // TILES), group_body, out_TKQH)


def _block_tables(tables_NW: jax.Array, page_size: int) -> jax.Array:
    """Page tables as whole blocks [N, blocks, P]; the scratch page fills up."""
    pages = pages_per_block(page_size)
    padded = jnp.pad(tables_NW, ((0, 0), (0, -tables_NW.shape[1] % pages)))
    return padded.reshape(tables_NW.shape[0], -1, pages)


def _rows(pages_NP: jax.Array, num_slots: int) -> jax.Array:
    """Where blocks lie if the cache is rows of one page and one slot: int32 [N, K * P]."""
    rows_NKP = pages_NP[:, None, :] * num_slots + jnp.arange(num_slots)[:, None]
    return rows_NKP.reshape(pages_NP.shape[0], -1)


def _start(q_NKXH: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Running maximum, sum and weighted values of a softmax that has seen nothing."""
    rows = (*q_NKXH.shape[:-1], 1)
    return (
        jnp.full(rows, _NOTHING, jnp.float32),
        jnp.zeros(rows, jnp.float32),
        jnp.zeros(q_NKXH.shape, jnp.float32),
    )


def _update(carry, q_NKXH, k_NKLH, v_NKLH, seen, *, scale, softcap):  # type: ignore[no-untyped-def]
    """One block into the running softmax; None is one that has seen nothing.

    Scales of keys and values go into scores and weights: those are fewer than the numbers.
    """
    k_NKLH, k_scales = kv_cache.factors(k_NKLH, q_NKXH.dtype)
    v_NKLH, v_scales = kv_cache.factors(v_NKLH, q_NKXH.dtype)
    scores = jnp.einsum("nkxh,nklh->nkxl", q_NKXH, k_NKLH, preferred_element_type=jnp.float32) * (scale * k_scales)
    if softcap is not None:
        scores = softcap * jnp.tanh(scores / softcap)
    scores = jnp.where(seen, scores, _MASKED)
    maximum = _NOTHING if carry is None else carry[0]
    new_maximum = jnp.maximum(maximum, jnp.max(scores, axis=-1, keepdims=True))
    weights = jnp.exp(scores - new_maximum)
    total = jnp.sum(weights, axis=-1, keepdims=True)
    weights = (weights * v_scales).astype(v_NKLH.dtype)
    values = jnp.einsum("nkxl,nklh->nkxh", weights, v_NKLH, preferred_element_type=jnp.float32)
    if carry is None:
        return new_maximum, total, values
    decay = jnp.exp(maximum - new_maximum)
    return new_maximum, carry[1] * decay + total, carry[2] * decay + values


def _finish(carry: tuple[jax.Array, jax.Array, jax.Array], dtype: jnp.dtype) -> jax.Array:
    _, total, values = carry
    return (values / jnp.maximum(total, 1e-30)).astype(dtype)
