"""Step shapes: the ladder of buckets, and a `StepPlan` as flat arrays of a bucket's layout.

Programs are compiled for a few shapes; a plan is padded to the smallest bucket that holds it. All
that a program reads of it travels in one int32 array, because each further array costs a transfer.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from ryzanstein_jax.attention import SHARERS, TILE, AttentionPlan, max_items, max_shared, max_tiles, pages_per_block
from ryzanstein_jax.plan import BIAS, MAX_PREFILLS, ROW, StepPlan


@dataclass(frozen=True, order=True)
class Bucket:
    """The padded sizes of a step.

    Attributes:
        decodes, prefill_tokens, prefills: decode tokens, prompt tokens, prompt chunks.
        rows: rows whose logits are computed.
        sampled_rows: rows of the sampler, which is made for fewer sizes; the logits are padded to it.
    """

    decodes: int
    prefill_tokens: int
    prefills: int
    rows: int
    sampled_rows: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "sampled_rows", max(self.rows, self.sampled_rows))

    @property
    def tokens(self) -> int:
        return self.decodes + self.prefill_tokens

    def holds(self, plan: StepPlan) -> bool:
        return (
            plan.num_decodes <= self.decodes
            and plan.num_prefill_tokens <= self.prefill_tokens
            and plan.num_prefills <= self.prefills
            and len(plan.rows) <= self.rows
        )

    def __str__(self) -> str:
        return f"{self.decodes} decode + {self.prefill_tokens} prompt tokens"


def bucket_ladder(max_num_seqs: int, max_prefill_tokens: int, *, smallest_decode: int = 1) -> list[Bucket]:
    """All shapes of an engine, each cheaper one before those that could stand in for it.

    Decode alone doubles from `smallest_decode` up; prompt tokens go up by four, each together with a full
    set of decodes, and alone too where that is much cheaper.
    """
    decodes = [smallest_decode]
    while decodes[-1] < max_num_seqs:
        decodes.append(min(2 * decodes[-1], max_num_seqs))
    decodes = [min(d, max_num_seqs) for d in decodes]
    chunks = [max_prefill_tokens]
    while chunks[0] > TILE:
        chunks.insert(0, max(chunks[0] // 4, TILE // 2))
    prefills = min(MAX_PREFILLS, max_prefill_tokens)
    # A sampler costs little beside a forward, and much beside it to compile: four sizes do.
    sizes = sorted({1, max(prefills, min(8, max_num_seqs)), max_num_seqs, max_num_seqs + prefills})

    def bucket(decodes: int, chunk: int, rows: int) -> Bucket:
        return Bucket(decodes, chunk, prefills if chunk else 0, rows, next(size for size in sizes if size >= rows))

    ladder = [bucket(d, 0, d) for d in decodes]
    for chunk in chunks:
        if max_num_seqs >= chunk // 16:  # else the unused decode tokens cost next to nothing
            ladder.append(bucket(0, chunk, prefills))
        ladder.append(bucket(max_num_seqs, chunk, max_num_seqs + prefills))
    return sorted(set(ladder), key=lambda b: (b.tokens, b.rows))


class Layout:
    """Named arrays laid end to end in one flat int32 array."""

    def __init__(self, shapes: dict[str, tuple[tuple[int, ...], type]]):
        self.fields: dict[str, tuple[int, int, tuple[int, ...], type]] = {}
        self.size = 0
        for name, (shape, dtype) in shapes.items():
            end = self.size + math.prod(shape)
            self.fields[name] = (self.size, end, shape, dtype)
            self.size = end

    def empty(self) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """A flat array of zeros, int32 [size], and views of its fields."""
        flat = np.zeros(self.size, np.int32)
        return flat, {n: flat[a:b].view(dtype).reshape(shape) for n, (a, b, shape, dtype) in self.fields.items()}

    def unpack(self, flat: jax.Array) -> dict[str, jax.Array]:
        """The fields of a flat array, inside a traced function."""
        out = {}
        for name, (begin, end, shape, dtype) in self.fields.items():
            part = flat[begin:end].reshape(shape)
            out[name] = part if dtype is np.int32 else jax.lax.bitcast_convert_type(part, jnp.dtype(dtype))
        return out


class StepLayout(Layout):
    """What *forward* reads of a step in one bucket.

    Args:
        bucket: the padded sizes.
        page_size: tokens per page.
        table_width: pages of the longest sequence.
    """

    def __init__(self, bucket: Bucket, page_size: int, table_width: int):
        b, tiles = bucket, max_tiles(bucket.prefill_tokens, bucket.prefills)
        items = max_items(b.decodes, table_width, page_size)
        shared = max_shared(b.decodes, table_width, page_size)
        self.bucket, self.page_size, self.table_width = bucket, page_size, table_width
        super().__init__(
            {
                "tokens": ((b.tokens,), np.int32),
                "positions": ((b.tokens,), np.int32),
                "slots": ((b.tokens,), np.int32),
                "decode_tables": ((b.decodes, table_width), np.int32),
                "decode_lens": ((b.decodes,), np.int32),
                "item_seqs": ((items,), np.int32),
                "item_blocks": ((items,), np.int32),
                "private_blocks": ((b.decodes,), np.int32),
                "shared_seqs": ((shared,), np.int32),
                "shared_blocks": ((shared,), np.int32),
                "shared_members": ((shared, b.decodes), np.int32),
                "num_shared": ((), np.int32),
                "prefill_tables": ((b.prefills, table_width), np.int32),
                "tile_starts": ((tiles,), np.int32),
                "tile_seqs": ((tiles,), np.int32),
                "tile_positions": ((tiles,), np.int32),
                "tile_lens": ((tiles,), np.int32),
                "num_tiles": ((), np.int32),
                "row_tokens": ((b.rows,), np.int32),
                "pools": ((b.prefills, 2), np.int32),
            }
        )

    def pack(self, plan: StepPlan) -> np.ndarray:
        """The plan, padded, as int32 [size]."""
        flat, view = self.empty()
        d, c, b = plan.num_decodes, plan.num_prefill_tokens, self.bucket
        sequence_of_token = np.repeat(np.arange(len(plan.query_lens)), plan.query_lens)
        pages = plan.page_tables[sequence_of_token, plan.positions // self.page_size]
        slots = pages * self.page_size + plan.positions % self.page_size
        for name, values in (("tokens", plan.token_ids), ("positions", plan.positions), ("slots", slots)):
            view[name][:d] = values[:d]
            view[name][b.decodes : b.decodes + c] = values[d:]
        width = min(plan.page_tables.shape[1], self.table_width)
        view["decode_tables"][:d, :width] = plan.page_tables[:d, :width]
        view["decode_lens"][:d] = plan.positions[:d] + 1
        if d:
            self._pack_blocks(plan.page_tables[:d], plan.positions[:d], view)
        view["prefill_tables"][: plan.num_prefills, :width] = plan.page_tables[d:, :width]
        if c:
            self._pack_tiles(plan.query_lens[d:], plan.positions[d:], view)
        tokens = plan.rows["token"]
        view["row_tokens"][: len(tokens)] = np.where(tokens < d, tokens, tokens + b.decodes - d)
        view["pools"][: len(plan.pools)] = plan.pools - d  # places among the prompt tokens
        return flat

    def _pack_tiles(self, lens: np.ndarray, positions: np.ndarray, view: dict[str, np.ndarray]) -> None:
        """The prompt chunks cut into tiles, those that reach furthest first."""
        tiles_of = -(-lens // TILE)
        seqs = np.repeat(np.arange(len(lens)), tiles_of)
        numbers = np.arange(len(seqs)) - np.repeat(np.cumsum(tiles_of) - tiles_of, tiles_of)
        starts = (np.cumsum(lens) - lens)[seqs] + numbers * TILE
        order = np.argsort(-positions[starts], kind="stable")
        for name, values in (("starts", starts), ("seqs", seqs), ("positions", positions[starts])):
            view[f"tile_{name}"][: len(order)] = values[order]
            view[f"tile_{name}"][len(order) :] = values[order[-1]]
        view["tile_lens"][: len(order)] = np.minimum(lens[seqs] - numbers * TILE, TILE)[order]
        view["num_tiles"][...] = len(order)

    def _pack_blocks(self, tables: np.ndarray, positions: np.ndarray, view: dict[str, np.ndarray]) -> None:
        """Which blocks of its pages each decode token reads: alone, or with others that share them."""
        pages = pages_per_block(self.page_size)
        span = pages * self.page_size
        private = positions // span + 1
        if len(private) >= SHARERS:
            # Pages that a token is being written to are never shared.
            full, members, count = positions // span, np.ones(len(private), bool), 0
            for block in range(int(full.max())):
                members &= full > block
                candidates = np.flatnonzero(members)
                columns = tables[candidates, block * pages : (block + 1) * pages]
                _, group, sizes = np.unique(columns, axis=0, return_inverse=True, return_counts=True)
                group = group.reshape(-1)
                members[candidates[sizes[group] < SHARERS]] = False
                if not members.any():
                    break
                for number in np.flatnonzero(sizes >= SHARERS).tolist():
                    sharing = candidates[group == number]
                    view["shared_seqs"][count], view["shared_blocks"][count] = sharing[0], block
                    view["shared_members"][count, sharing] = 1
                    private[sharing] -= 1
                    count += 1
            view["num_shared"][...] = count
        view["private_blocks"][: len(private)] = private
        seqs = np.repeat(np.arange(len(private)), private)
        ranks = np.arange(len(seqs)) - np.repeat(np.cumsum(private) - private, private)  # 0 is the last block
        order = np.argsort(ranks, kind="stable")
        view["item_seqs"][: len(seqs)] = seqs[order]
        view["item_blocks"][: len(seqs)] = (positions[seqs] // span - ranks)[order]


class RowLayout(Layout):
    """What *sample* reads of a step with that many rows; all names are ROW's.

    Args:
        rows: the padded number of rows.
    """

    def __init__(self, rows: int):
        self.rows = rows
        super().__init__({name: ((rows, *ROW[name].shape), ROW[name].base.type) for name in self.names})

    names: tuple[str, ...] = ("position", "key", "temperature", "top_k", "top_p", "min_p")

    def pack(self, plan: StepPlan) -> np.ndarray:
        """The plan's rows, padded with greedy ones, as int32 [size]."""
        flat, view = self.empty()
        self._fill(plan, view)
        return flat

    def _fill(self, plan: StepPlan, view: dict[str, np.ndarray]) -> None:
        view["top_p"][...] = 1.0
        for name in self.names:
            view[name][: len(plan.rows)] = plan.rows[name]


class FullRowLayout(RowLayout):
    """What *full sample* reads besides: penalties, targets, each row's pages and the biased tokens.

    Args:
        rows: the padded number of rows.
        table_width: pages of the longest sequence.
        max_bias: most biased tokens of a step.
    """

    names = (
        *RowLayout.names, "repetition_penalty", "presence_penalty", "frequency_penalty", "prompt_len", "target",
    )  # fmt: skip

    def __init__(self, rows: int, table_width: int, max_bias: int):
        super().__init__(rows)
        self.table_width, self.max_bias = table_width, max_bias
        shapes = {name: (shape, dtype) for name, (_, _, shape, dtype) in self.fields.items()}
        shapes["tables"] = ((rows, table_width), np.int32)
        shapes["num_bias"] = ((), np.int32)
        for name in ("row", "token", "value"):
            shapes[f"bias_{name}"] = ((max_bias,), BIAS[name].type)
        Layout.__init__(self, shapes)

    def _fill(self, plan: StepPlan, view: dict[str, np.ndarray]) -> None:
        view["repetition_penalty"][...] = 1.0
        view["target"][...] = -1
        super()._fill(plan, view)
        width = min(plan.page_tables.shape[1], self.table_width)
        view["tables"][: len(plan.rows), :width] = plan.page_tables[plan.rows["seq"], :width]
        view["num_bias"][...] = len(plan.bias)
        view["bias_row"][...] = self.rows
        for name in ("row", "token", "value"):
            view[f"bias_{name}"][: len(plan.bias)] = plan.bias[name]


def attention_plan(fields: dict[str, jax.Array]) -> AttentionPlan:
    """What attention needs of an unpacked step."""
    return AttentionPlan(
        slots_T=fields["slots"],
        decode_tables=fields["decode_tables"],
        decode_lens=fields["decode_lens"],
        item_seqs=fields["item_seqs"],
        item_blocks=fields["item_blocks"],
        private_blocks=fields["private_blocks"],
        shared_seqs=fields["shared_seqs"],
        shared_blocks=fields["shared_blocks"],
        shared_members=fields["shared_members"],
        num_shared=fields["num_shared"],
        prefill_tables=fields["prefill_tables"],
        tile_starts=fields["tile_starts"],
        tile_seqs=fields["tile_seqs"],
        tile_positions=fields["tile_positions"],
        tile_lens=fields["tile_lens"],
        num_tiles=fields["num_tiles"],
    )
