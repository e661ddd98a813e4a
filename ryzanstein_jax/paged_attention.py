"""Attention over pages as one kernel for NVIDIA GPUs, written in Pallas for Triton.

What the portable path of `attention` does with loops that the host has to watch, each turn several kernels, this
does inside one: a program takes a *tile*, queries of one sequence that follow each other, for one KV slot, and walks
the pages up to its last query with a running softmax. A decode token is a tile of one query; where there are too few
of them to fill a GPU, its pages are split among several programs, and a second small kernel joins their results
(Flash-Decoding). Nothing of the launch depends on data, so that a whole step is one CUDA graph.

`Schedule` has the sizes of its programs, which were chosen by what the compiler says of registers and shared memory:
there was no GPU to time them on. `docs/performance.md` has that account.

Array names end in their dims: T tokens, K KV slots, Q query heads per slot, H head_dim, N sequences, W page-table
width, M tiles, X rows of a program (queries of a tile times heads), L positions of a block, S splits.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as triton_pallas

from ryzanstein_jax.kv_cache import Pages, QuantizedPages, floats

_MASKED = -1e30
#: The maximum of no scores: so far above masked ones that their weights are zero beside it.
_NOTHING = -1e29
_LOG2_E = math.log2(math.e)

#: Rows of the smallest product that matrix units do.
_LEAST_ROWS = 16
#: Most rows of one program: more would not leave room for a tile's values in the registers.
_MOST_ROWS = 128
#: Bytes of a multiprocessor's shared memory that a program may take: what GPUs from Ampere on all have.
_SHARED_MEMORY = 96 << 10
#: Programs that fill a GPU twice over (an H100 has 132 multiprocessors), and splits that are worth joining.
_PROGRAMS = 264
_MOST_SPLITS = 32


class Tiles(NamedTuple):
    """Queries of one sequence each, that follow each other.

    Attributes:
        starts: int32 [M], first token of each, counted from the first of all tiles.
        seqs: int32 [M], row of `tables`.
        positions: int32 [M], position of its first token in its sequence.
        lens: int32 [M], tokens; 0 for padding.
        tables: int32 [N, W], pages of the sequences.
    """

    starts: jax.Array
    seqs: jax.Array
    positions: jax.Array
    lens: jax.Array
    tables: jax.Array


@dataclass(frozen=True)
class Schedule:
    """How the work is cut, which changes nothing but the order of sums.

    Attributes:
        heads: query heads of a program, a power of two; their number may be less.
        groups: programs that share the query heads of a slot.
        block: positions that a program reads at a time.
        splits: programs that share the pages of a tile, a power of two.
        warps, stages: of a program, and blocks on their way at a time.
    """

    heads: int
    groups: int
    block: int
    splits: int
    warps: int
    stages: int

    @classmethod
    def of(
        cls, tiles: int, tile: int, slots: int, queries: int, head_dim: int, positions: int, itemsize: int
    ) -> Schedule:
        """For that many tiles of `tile` queries, on one device.

        Args:
            slots, queries, head_dim: KV slots of the device, query heads of each, and the size of a head.
            positions: of the longest sequence.
            itemsize: bytes of a query's, key's or value's number.
        """
        # In one program as many heads as there are, but no more rows than registers hold.
        heads = max(min(pl.next_power_of_2(queries), _MOST_ROWS // tile), _LEAST_ROWS // tile, 1)
        block = 64
        # As the compiler lays it out: two blocks for the matrix units of Hopper. With three stages the first is for
        # the page table, and there is one block.
        blocks_held, stages = (2, 2) if tile > 1 else (1, 3)
        row = head_dim * itemsize
        while (tile * heads + 2 * blocks_held * block) * row > _SHARED_MEMORY:
            if tile * heads >= 2 * blocks_held * block and tile * heads >= 2 * _LEAST_ROWS and heads > 1:
                heads //= 2
            else:
                block //= 2
        splits = 1
        while tile == 1 and splits < min(_MOST_SPLITS, -(-positions // block), -(-_PROGRAMS // (tiles * slots))):
            splits *= 2
        return cls(heads, -(-queries // heads), block, splits, warps=8 if tile * heads >= 128 else 4, stages=stages)


def attend_tiles(
    q_TKQH: jax.Array,
    keys: Pages,
    values: Pages,
    tiles: Tiles,
    into: jax.Array | None = None,
    *,
    tile: int,
    first: int = 0,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    interpret: bool = False,
) -> jax.Array:
    """The attended values of all queries of the tiles.

    Args:
        q_TKQH: rotated queries of the step.
        keys, values: a layer's `kv_cache.Pages`, [P, K, page, H]; those of the step are in them.
        tiles: who attends to what.
        into: [T, K, Q, H], takes the results at their places and is used up; None where the tiles are one token each
            and all of the step: of padding the results are zero then.
        tile: most queries of a tile.
        first: of the step's tokens, that which `tiles.starts` counts from; 0 for tiles of one token.
        scale, window, softcap: as `attention.attend` takes them.
        interpret: compute it without a GPU, slowly: for tests.

    Returns:
        [T, K, Q, H] in q's dtype: `into` with the results, or these alone.
    """
    tokens, slots, queries, head_dim = q_TKQH.shape
    page_size, count = keys.shape[2], tiles.starts.shape[0]
    schedule = Schedule.of(
        count, tile, slots, queries, head_dim, tiles.tables.shape[1] * page_size, q_TKQH.dtype.itemsize
    )
    kernel = partial(
        paged_attention_kernel, schedule=schedule, tile=tile, first=first, shape=(slots, queries, page_size),
        quantized=isinstance(keys, QuantizedPages), scale=scale, window=window, softcap=softcap,
    )  # fmt: skip
    rows = tokens * slots * queries
    out: Any = jax.ShapeDtypeStruct((rows, head_dim), q_TKQH.dtype)
    operands = [q_TKQH.reshape(rows, head_dim), *_flat(keys), *_flat(values), *tiles]
    aliases: dict[int, int] = {}
    if schedule.splits > 1:
        # Of decode tokens, which come first.
        part_rows = count * slots * queries * schedule.splits
        parts = jax.ShapeDtypeStruct((part_rows,), jnp.float32)
        out = (jax.ShapeDtypeStruct((part_rows, head_dim), jnp.float32), parts, parts)
    elif into is not None:
        aliases = {len(operands): 0}
        operands.append(into.reshape(rows, head_dim))
    call = partial(pl.pallas_call, interpret=interpret)
    found = call(
        kernel,
        out_shape=out,
        grid=(count, slots, schedule.groups * schedule.splits),
        input_output_aliases=aliases,
        compiler_params=triton_pallas.CompilerParams(num_warps=schedule.warps, num_stages=schedule.stages),
    )(*operands)
    if schedule.splits > 1:
        joined = jax.ShapeDtypeStruct((rows, head_dim), q_TKQH.dtype)
        operands, aliases = list(found), {}
        if into is not None:
            operands.append(into.reshape(rows, head_dim))
            aliases = {3: 0}
        found = call(
            partial(join_splits_kernel, splits=schedule.splits),
            out_shape=joined,
            grid=(count * slots * queries,),
            input_output_aliases=aliases,
            compiler_params=triton_pallas.CompilerParams(num_warps=1, num_stages=1),
        )(*operands)
    return found.reshape(q_TKQH.shape)


def _flat(pages: Pages) -> list[jax.Array]:
    """A layer's pages as one row for each position and slot, which moves nothing, and the scale of each row."""
    if isinstance(pages, QuantizedPages):
        return [pages.numbers.reshape(-1, pages.shape[-1]), pages.scales.reshape(-1)]
    return [pages.reshape(-1, pages.shape[-1])]


def paged_attention_kernel(  # type: ignore[no-untyped-def]
    q_ref, *refs,
    schedule: Schedule, tile: int, first: int, shape: tuple[int, int, int], quantized: bool,
    scale: float, window: int | None, softcap: float | None,
):  # fmt: skip
    """One tile, one slot, one group of its query heads, one share of the pages.

    `refs` are keys and values, each with its scales where `quantized`, then the `Tiles` and the results.
    """
    parts = 2 if quantized else 1
    keys_refs, values_refs = refs[:parts], refs[parts : 2 * parts]
    starts_ref, seqs_ref, positions_ref, lens_ref, tables_ref, *rest = refs[2 * parts :]
    slots, queries, page_size = shape
    number, slot, part = pl.program_id(0), pl.program_id(1), pl.program_id(2)
    group, split = part // schedule.splits, part % schedule.splits
    begin, length = positions_ref[number], lens_ref[number]
    seq, start = seqs_ref[number], first + starts_ref[number]
    head_dim = q_ref.shape[-1]
    lane_H = jnp.arange(head_dim)

    row_X = jnp.arange(tile * schedule.heads)
    token_X, head_X = row_X // schedule.heads, row_X % schedule.heads
    real_X = head_X < queries - group * schedule.heads
    if tile > 1:  # a padding decode token gets zeros
        real_X &= token_X < length
    place_X = ((start + token_X) * slots + slot) * queries + group * schedule.heads + head_X
    q_XH = triton_pallas.load(q_ref.at[place_X[:, None], lane_H[None, :]], mask=real_X[:, None], other=0.0)
    position_X = begin + token_X

    # float32 is kept: matrix units would round it to tf32.
    precision = jax.lax.Precision.HIGHEST if q_ref.dtype == jnp.float32 else None
    product = partial(jax.lax.dot_general, preferred_element_type=jnp.float32, precision=precision)
    first_block = 0 if window is None else jnp.maximum(begin - window + 1, 0) // schedule.block
    end_block = pl.cdiv(jnp.where(length > 0, begin + length, 0), schedule.block)
    share = pl.cdiv(jnp.maximum(end_block - first_block, 0), schedule.splits)
    from_block = first_block + split * share

    def body(block, carry):  # type: ignore[no-untyped-def]
        maximum_X, total_X, values_XH = carry
        at_L = block * schedule.block + jnp.arange(schedule.block)
        inside_L = at_L < begin + length
        pages_L = triton_pallas.load(tables_ref.at[seq, at_L // page_size], mask=inside_L, other=0)
        rows_L = (pages_L * slots + slot) * page_size + at_L % page_size

        def read(ref):  # type: ignore[no-untyped-def]
            found_LH = triton_pallas.load(ref.at[rows_L[:, None], lane_H[None, :]], mask=inside_L[:, None], other=0)
            return floats(found_LH, q_ref.dtype) if quantized else found_LH

        def scaled(x_XL, ref):  # type: ignore[no-untyped-def]
            return x_XL * triton_pallas.load(ref.at[rows_L], mask=inside_L, other=0.0)[None, :]

        k_LH, v_LH = read(keys_refs[0]), read(values_refs[0])
        scores_XL = product(q_XH, k_LH, (((1,), (1,)), ((), ())))
        if quantized:
            scores_XL = scaled(scores_XL, keys_refs[1])
        if softcap is None:
            scores_XL *= scale * _LOG2_E
        else:
            scores_XL = jnp.tanh(scores_XL * (scale / softcap)) * (softcap * _LOG2_E)
        seen_XL = at_L[None, :] <= position_X[:, None]
        if window is not None:
            seen_XL &= at_L[None, :] > position_X[:, None] - window
        scores_XL = jnp.where(seen_XL, scores_XL, _MASKED)
        largest_X = jnp.maximum(maximum_X, jnp.max(scores_XL, axis=1))
        weights_XL = jnp.exp2(scores_XL - largest_X[:, None])
        decay_X = jnp.exp2(maximum_X - largest_X)
        total_X = total_X * decay_X + jnp.sum(weights_XL, axis=1)
        if quantized:
            weights_XL = scaled(weights_XL, values_refs[1])
        added_XH = product(weights_XL.astype(v_LH.dtype), v_LH, (((1,), (0,)), ((), ())))
        return largest_X, total_X, values_XH * decay_X[:, None] + added_XH

    rows = tile * schedule.heads
    nothing = jnp.full((rows,), _NOTHING, jnp.float32), jnp.zeros((rows,), jnp.float32)
    maximum_X, total_X, values_XH = jax.lax.fori_loop(
        from_block,
        jnp.minimum(from_block + share, end_block),
        body,
        (*nothing, jnp.zeros((rows, head_dim), jnp.float32)),
    )
    if schedule.splits > 1:
        values_out, maximum_out, total_out = rest
        place_X = place_X * schedule.splits + split
        triton_pallas.store(maximum_out.at[place_X], maximum_X, mask=real_X)
        triton_pallas.store(total_out.at[place_X], total_X, mask=real_X)
        triton_pallas.store(values_out.at[place_X[:, None], lane_H[None, :]], values_XH, mask=real_X[:, None])
    else:
        out = values_XH / jnp.maximum(total_X, 1e-30)[:, None]
        place = rest[-1].at[place_X[:, None], lane_H[None, :]]
        triton_pallas.store(place, out.astype(place.dtype), mask=real_X[:, None])


def join_splits_kernel(values_ref, maximum_ref, total_ref, *rest, splits: int):  # type: ignore[no-untyped-def]
    """The splits of one query of one head, each a softmax over its share of the positions."""
    row = pl.program_id(0)
    part_S = row * splits + jnp.arange(splits)
    maximum_S = maximum_ref[part_S]
    decay_S = jnp.exp2(maximum_S - jnp.max(maximum_S))
    total = jnp.sum(total_ref[part_S] * decay_S)
    values_H = jnp.sum(values_ref[part_S] * decay_S[:, None], axis=0)
    rest[-1][row, :] = (values_H / jnp.maximum(total, 1e-30)).astype(rest[-1].dtype)
