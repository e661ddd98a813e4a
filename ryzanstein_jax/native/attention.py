"""Attention over pages on a CPU: pages are read where they lie, each once for all the query heads of its slot.

A task is a tile, queries of one sequence that follow each other, for one KV slot. A decode token is a tile of one
query: its scores of a few positions fill one vector. Tiles of prompts are products of small matrices: keys are
transposed block by block, so that positions lie in lanes, and a few rows of queries are kept in registers.

Names in the code: H head_dim, Q query heads per slot, row one query head of one query of a tile.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from llvmlite import ir

from ryzanstein_jax.native import MOST_STACK_BYTES
from ryzanstein_jax.native.emit import F32, I16, I32, Code
from ryzanstein_jax.native.xla import Buffers, add_handler

_MASKED = -1e30
#: The maximum of no scores: so far above masked ones that their weights are zero beside it.
_NOTHING = -1e29
#: Bytes of transposed keys that a task works on at a time, half of a core's nearest cache.
_BLOCK_BYTES = 32 << 10
#: Rows of a tile that are done at a time. With two vectors of each, or four where there are twice as many registers,
#: they take three quarters of the registers.
_HEIGHT = 6
_OPERANDS = 10
(_Q, _KEYS, _VALUES, _DECODE_TABLES, _DECODE_LENS, _TABLES, _STARTS, _SEQS, _POSITIONS, _LENS, _OUT) = range(11)


@dataclass(frozen=True)
class Attention:
    """One layer's attention, as far as its code depends on it.

    Attributes:
        head_dim, queries, page_size: sizes; head_dim and page_size are multiples of the lanes.
        tile: most queries of a prompt's tile.
        dtype: of queries, pages and results: "float32" or "bfloat16".
        scale, window, softcap: as `attention.attend` takes them.
    """

    head_dim: int
    queries: int
    page_size: int
    tile: int
    dtype: str
    scale: float
    window: int | None
    softcap: float | None

    def runs_with(self, lanes: int) -> bool:
        """Whether vectors of so many numbers divide pages and heads, and a task fits the stack of a thread."""
        divided = self.page_size % lanes == 0 and self.head_dim % lanes == 0
        return divided and self.dtype in ("float32", "bfloat16") and self.stack_bytes(lanes) <= MOST_STACK_BYTES

    def span(self, lanes: int) -> int:
        """Positions of a block of transposed keys: whole pairs of vectors, and so never a part of a page's vector."""
        return max(1, min(128, _BLOCK_BYTES // (4 * self.head_dim)) // (2 * lanes)) * 2 * lanes

    def stack_bytes(self, lanes: int) -> int:
        """What a task takes of its thread's stack, but for a few variables."""
        rows, span = self.tile * self.queries + _HEIGHT, self.span(lanes)
        blocks = self.head_dim * span + _HEIGHT * (self.head_dim + span)
        return 4 * (rows * (self.head_dim + 2) + blocks + self.queries * lanes)

    def add_to(self, module: ir.Module, name: str, lanes: int) -> None:
        """Adds the function; operands are those of `attention.attend_by_native`."""

        def task(code: Code, buffers: Buffers, number: Any) -> None:
            _Task(self, code, buffers).write(number)

        add_handler(module, name, lanes, _OPERANDS, 1, _count, task)


def _count(code: Code, buffers: Buffers) -> Any:
    tiles = code.calc(buffers.dim(_STARTS, 0), "+", buffers.dim(_DECODE_LENS, 0))
    # One more clears what belongs to no tile.
    return code.calc(tiles, "*", buffers.dim(_KEYS, 1), "+", 1)


class _Task:
    def __init__(self, kernel: Attention, code: Code, buffers: Buffers):
        self.kernel, self.code, self.buffers = kernel, code, buffers
        self.data = buffers.data
        self.parts = kernel.head_dim // code.lanes  # vectors of a head
        self.element = F32 if kernel.dtype == "float32" else I16
        # Positions of a block, and the rows and vectors of values that fit the registers of a processor.
        self.span = kernel.span(code.lanes)
        registers = 16 if code.lanes == 8 else 32
        self.chunk = math.gcd(self.parts, registers // 8)
        self.height = _HEIGHT

    def write(self, task: Any) -> None:
        code, buffers = self.code, self.buffers
        self.slots = buffers.dim(_KEYS, 1)
        self.decodes = buffers.dim(_DECODE_LENS, 0)
        tiles = buffers.dim(_STARTS, 0)
        prompt_tasks = code.calc(tiles, "*", self.slots)
        tasks = code.calc(self.decodes, "*", self.slots, "+", prompt_tasks)
        # The longest tasks first. Neighbours have the slot in common, and with it pages that their sequences share.
        with code.if_then(code.icmp_signed("<", task, prompt_tasks)):
            tile = code.calc(task, "%", tiles)
            with code.if_then(code.icmp_signed(">", code.get(self.data[_LENS], tile, I32), code.int(0))):
                self._prompt(tile, code.calc(task, "/", tiles))
            code.ret_void()
        with code.if_then(code.icmp_signed("<", task, tasks)):
            number = code.calc(task, "-", prompt_tasks)
            self._decode(code.calc(number, "%", self.decodes), code.calc(number, "/", self.decodes))
            code.ret_void()
        self._clear(tiles)

    # --- one query

    def _decode(self, seq: Any, slot: Any) -> None:
        code, kernel, lanes = self.code, self.kernel, self.code.lanes
        length = code.get(self.data[_DECODE_LENS], seq, I32)
        begin = code.int(0) if kernel.window is None else code.most(code.calc(length, "-", kernel.window), 0)
        first_row = code.calc(seq, "*", self.slots, "+", slot, "*", kernel.queries)
        query = [
            [code.fmul(part, code.vec(kernel.scale)) for part in self._row(self.data[_Q], code.calc(first_row, "+", i))]
            for i in range(kernel.queries)
        ]
        table = code.at(self.data[_DECODE_TABLES], code.calc(seq, "*", self.buffers.dim(_DECODE_TABLES, 1)), I32)
        maximum = [code.variable(code.num(_NOTHING)) for _ in query]
        total = [code.variable(code.num(0.0)) for _ in query]
        values = [[code.variable(code.vec(0.0)) for _ in range(self.parts)] for _ in query]
        weights = code.room(F32, kernel.queries * lanes)
        with code.loop(code.calc(begin, "/", lanes), code.calc(length, "+", lanes - 1, "/", lanes)) as group:
            position = code.calc(group, "*", lanes)
            row = self._page_row(table, slot, position)
            # The pages lie anywhere, and no processor guesses which is next.
            soon = self._page_row(table, slot, code.least(code.calc(position, "+", lanes), code.calc(length, "-", 1)))
            products: list[list[Any]] = [[] for _ in query]
            for lane in range(lanes):
                key = self._row(self.data[_KEYS], code.calc(row, "+", lane))
                for part in range(self.parts):
                    index = code.calc(soon, "+", lane, "*", kernel.head_dim, "+", part * lanes)
                    for pages in (_KEYS, _VALUES):
                        code.prefetch(self.data[pages], index, self.element)
                for i, parts in enumerate(query):
                    products[i].append(self._dot(parts, key))
            seen = self._between(position, begin, length)
            for i in range(kernel.queries):
                scores = code.select(seen, self._capped(code.sums(products[i])), code.vec(_MASKED))
                self._soften(scores, maximum[i], total[i], values[i], code.at(weights, i * lanes))
            with code.loop(0, code.least(code.calc(length, "-", position), lanes)) as lane:
                value = self._row(self.data[_VALUES], code.calc(row, "+", lane))
                for i in range(kernel.queries):
                    weight = code.splat(code.get(weights, code.calc(lane, "+", i * lanes)))
                    for part, place in zip(value, values[i], strict=True):
                        code.store(code.multiply_add(weight, part, code.load(place)), place)
        for i in range(kernel.queries):
            factor = code.splat(code.fdiv(code.num(1.0), code.larger(code.load(total[i]), code.num(1e-30))))
            for part, place in enumerate(values[i]):
                index = code.calc(first_row, "+", i, "*", kernel.head_dim, "+", part * lanes)
                code.write(code.fmul(code.load(place), factor), self.data[_OUT], index, kernel.dtype)

    def _soften(self, scores: Any, maximum: Any, total: Any, values: list[Any], weights: Any) -> None:
        """Adds scores, a vector, to a running softmax."""
        code = self.code
        old = code.load(maximum)
        new = code.larger(old, code.largest_of(scores))
        weight = code.exp(code.fsub(scores, code.splat(new)))
        decay = code.exp_scalar(code.fsub(old, new))
        code.write(weight, weights, 0)
        code.store(new, maximum)
        code.store(code.fadd(code.fmul(code.load(total), decay), code.sum_of(weight)), total)
        for place in values:
            code.store(code.fmul(code.load(place), code.splat(decay)), place)

    # --- tiles of prompts

    def _prompt(self, tile: Any, slot: Any) -> None:
        code, kernel = self.code, self.kernel
        length, first = code.get(self.data[_LENS], tile, I32), code.get(self.data[_POSITIONS], tile, I32)
        start = code.calc(code.get(self.data[_STARTS], tile, I32), "+", self.decodes)
        seq = code.get(self.data[_SEQS], tile, I32)
        table = code.at(self.data[_TABLES], code.calc(seq, "*", self.buffers.dim(_TABLES, 1)), I32)
        rows, end = code.calc(length, "*", kernel.queries), code.calc(first, "+", length)
        # Rows are done `height` at a time, and what stands behind the last row is not used.
        most_rows = kernel.tile * kernel.queries + self.height
        maximum, total = (code.room(F32, most_rows) for _ in range(2))
        values = code.room(F32, most_rows * kernel.head_dim)
        with code.loop(0, code.calc(rows, "+", self.height)) as row:
            code.store(code.num(_NOTHING), code.at(maximum, row))
            code.store(code.num(0.0), code.at(total, row))
            for part in range(self.parts):
                code.write(code.vec(0.0), values, code.calc(row, "*", kernel.head_dim, "+", part * code.lanes))
        begin = code.int(0)
        if kernel.window is not None:
            begin = code.calc(code.most(code.calc(first, "-", kernel.window - 1), 0), "/", self.span, "*", self.span)
        keys = code.room(F32, kernel.head_dim * self.span)
        with code.loop(begin, end, self.span) as block:
            positions = code.least(code.calc(end, "-", block), self.span)
            self._transpose(keys, table, slot, block, positions)
            with code.loop(0, rows, self.height) as top:
                numbers = [code.calc(top, "+", j) for j in range(self.height)]
                real = [code.least(number, code.calc(rows, "-", 1)) for number in numbers]
                tokens = [code.calc(number, "/", kernel.queries) for number in real]
                # Positions in the block, of the queries themselves: the last that each may look at.
                last = [code.calc(first, "+", token, "-", block) for token in tokens]
                limit = code.least(code.calc(last[-1], "+", 1), positions)
                lower = code.int(0)
                if kernel.window is not None:
                    lower = code.most(code.calc(last[0], "-", kernel.window - 1), 0)
                    lower = code.calc(lower, "/", 2 * code.lanes, "*", 2 * code.lanes)
                with code.if_then(code.icmp_signed("<", lower, limit)):
                    places = [
                        self._query_row(code.calc(start, "+", token), slot, code.calc(number, "%", kernel.queries))
                        for token, number in zip(tokens, real, strict=True)
                    ]
                    scores = self._scores(places, keys, last, lower, limit)
                    decays = [
                        self._soften_row(scores, j, lower, limit, code.at(maximum, number), code.at(total, number))
                        for j, number in enumerate(numbers)
                    ]
                    self._weigh(scores, decays, numbers, values, table, slot, block, lower, limit)
        with code.loop(0, rows) as row:
            token, head = code.calc(row, "/", kernel.queries), code.calc(row, "%", kernel.queries)
            place = self._query_row(code.calc(start, "+", token), slot, head)
            factor = code.splat(code.fdiv(code.num(1.0), code.larger(code.get(total, row), code.num(1e-30))))
            for part in range(self.parts):
                value = code.read(values, code.calc(row, "*", kernel.head_dim, "+", part * code.lanes))
                index = code.calc(place, "+", part * code.lanes)
                code.write(code.fmul(value, factor), self.data[_OUT], index, kernel.dtype)

    def _query_row(self, token: Any, slot: Any, head: Any) -> Any:
        """Where a query, and its result, begins."""
        kernel = self.kernel
        return self.code.calc(token, "*", self.slots, "+", slot, "*", kernel.queries, "+", head, "*", kernel.head_dim)

    def _page_row(self, table: Any, slot: Any, position: Any) -> Any:
        """Which row of a layer's keys or values a position has."""
        code, size = self.code, self.kernel.page_size
        page = code.get(table, code.calc(position, "/", size), I32)
        row = code.calc(page, "*", self.slots, "+", slot, "*", size)
        return code.calc(code.calc(position, "%", size), "+", row)

    def _transpose(self, keys: Any, table: Any, slot: Any, block: Any, positions: Any) -> None:
        """The keys of a block of positions as [H, positions], times the scale."""
        code, kernel, lanes = self.code, self.kernel, self.code.lanes
        with code.loop(0, positions, lanes) as group:
            row = self._page_row(table, slot, code.calc(block, "+", group))
            for part in range(self.parts):
                columns = code.transposed(
                    [
                        code.read(
                            self.data[_KEYS],
                            code.calc(row, "+", lane, "*", kernel.head_dim, "+", part * lanes),
                            kernel.dtype,
                        )
                        for lane in range(lanes)
                    ]
                )
                for lane, column in enumerate(columns):
                    index = code.calc(group, "+", (part * lanes + lane) * self.span)
                    code.write(code.fmul(column, code.vec(kernel.scale)), keys, index)

    def _scores(self, places: list[Any], keys: Any, last: list[Any], lower: Any, limit: Any) -> Any:
        """Scores [rows, positions], masked."""
        code, kernel, lanes = self.code, self.kernel, self.code.lanes
        queries = code.room(F32, self.height * kernel.head_dim)
        for j, place in enumerate(places):
            for part in range(self.parts):
                query = code.read(self.data[_Q], code.calc(place, "+", part * lanes), kernel.dtype)
                code.write(query, queries, j * kernel.head_dim + part * lanes)
        scores = code.room(F32, self.height * self.span)
        with code.loop(lower, limit, 2 * lanes) as group:
            sums = [[code.variable(code.vec(0.0)) for _ in range(2)] for _ in places]
            with code.loop(0, kernel.head_dim) as h:
                index = code.calc(h, "*", self.span, "+", group)
                columns = [code.read(keys, code.calc(index, "+", half * lanes)) for half in range(2)]
                for j in range(self.height):
                    query = code.splat(code.get(queries, code.calc(h, "+", j * kernel.head_dim)))
                    for column, place in zip(columns, sums[j], strict=True):
                        code.store(code.multiply_add(query, column, code.load(place)), place)
            for half in range(2):
                position = code.calc(group, "+", half * lanes)
                for j in range(self.height):
                    begin = code.int(0) if kernel.window is None else code.calc(last[j], "-", kernel.window - 1)
                    seen = self._between(position, begin, code.calc(last[j], "+", 1))
                    masked = code.select(seen, self._capped(code.load(sums[j][half])), code.vec(_MASKED))
                    code.write(masked, scores, code.calc(position, "+", j * self.span))
        return scores

    def _soften_row(self, scores: Any, j: int, lower: Any, limit: Any, maximum: Any, total: Any) -> Any:
        """Turns a row's scores into weights of its running softmax; what its older values are to be scaled by."""
        code, lanes = self.code, self.code.lanes
        row = code.at(scores, j * self.span)
        largest = code.variable(code.vec(_NOTHING))
        with code.loop(lower, limit, lanes) as group:
            code.store(code.larger(code.load(largest), code.read(row, group)), largest)
        old = code.load(maximum, typ=F32)
        new = code.larger(old, code.largest_of(code.load(largest)))
        added = code.variable(code.vec(0.0))
        with code.loop(lower, limit, lanes) as group:
            weight = code.exp(code.fsub(code.read(row, group), code.splat(new)))
            code.write(weight, row, group)
            code.store(code.fadd(code.load(added), weight), added)
        decay = code.exp_scalar(code.fsub(old, new))
        code.store(new, maximum)
        grown = code.fadd(code.fmul(code.load(total, typ=F32), decay), code.sum_of(code.load(added)))
        code.store(grown, total)
        return decay

    def _weigh(
        self, scores: Any, decays: list[Any], numbers: list[Any], values: Any, table: Any, slot: Any, block: Any,
        lower: Any, limit: Any,
    ) -> None:  # fmt: skip
        """Adds the weighted values of a block to those of some rows."""
        code, kernel, lanes = self.code, self.kernel, self.code.lanes
        for part in range(0, self.parts, self.chunk):
            places = [
                [code.calc(number, "*", kernel.head_dim, "+", (part + c) * lanes) for c in range(self.chunk)]
                for number in numbers
            ]
            sums = [
                [code.variable(code.fmul(code.read(values, place), code.splat(decay))) for place in row]
                for row, decay in zip(places, decays, strict=True)
            ]
            with code.loop(lower, limit, lanes) as group:
                first = self._page_row(table, slot, code.calc(block, "+", group))
                with code.loop(0, code.least(code.calc(limit, "-", group), lanes)) as lane:
                    row = code.calc(first, "+", lane, "*", kernel.head_dim)
                    value = [
                        code.read(self.data[_VALUES], code.calc(row, "+", (part + c) * lanes), kernel.dtype)
                        for c in range(self.chunk)
                    ]
                    for j, sums_of_row in enumerate(sums):
                        weight = code.splat(code.get(scores, code.calc(group, "+", lane, "+", j * self.span)))
                        for x, place in zip(value, sums_of_row, strict=True):
                            code.store(code.multiply_add(weight, x, code.load(place)), place)
            for row_places, row_sums in zip(places, sums, strict=True):
                for place, value in zip(row_places, row_sums, strict=True):
                    code.write(code.load(value), values, place)

    def _clear(self, tiles: Any) -> None:
        """Zeros for the tokens behind those of the last tile."""
        code = self.code
        end = code.variable(code.int(0))
        with code.loop(0, tiles) as tile:
            last = code.calc(code.get(self.data[_STARTS], tile, I32), "+", code.get(self.data[_LENS], tile, I32))
            code.store(code.most(code.load(end), last), end)
        heads = code.calc(self.slots, "*", self.kernel.queries * self.kernel.head_dim)
        first = code.calc(code.calc(self.decodes, "+", code.load(end)), "*", heads)
        with code.loop(first, code.calc(self.buffers.dim(_Q, 0), "*", heads), code.lanes) as index:
            code.write(code.vec(0.0), self.data[_OUT], index, self.kernel.dtype)

    # --- parts of both

    def _row(self, base: Any, row: Any) -> list[Any]:
        """The vectors of one head."""
        code, kernel = self.code, self.kernel
        first = code.at(base, code.calc(row, "*", kernel.head_dim), self.element)
        return [code.read(first, part * code.lanes, kernel.dtype) for part in range(self.parts)]

    def _dot(self, a: list[Any], b: list[Any]) -> Any:
        """Products added up over the vectors of a head, not yet over lanes."""
        total = self.code.fmul(a[0], b[0])
        for x, y in zip(a[1:], b[1:], strict=True):
            total = self.code.multiply_add(x, y, total)
        return total

    def _capped(self, scores: Any) -> Any:
        """softcap * tanh(score / softcap), by tanh(x) = sign(x) (1 - e^-2|x|) / (1 + e^-2|x|)."""
        code, cap = self.code, self.kernel.softcap
        if cap is None:
            return scores
        negative = code.fcmp_ordered("<", scores, code.vec(0.0))
        size = code.select(negative, code.fneg(scores), scores)
        power = code.exp(code.fmul(size, code.vec(-2.0 / cap)))
        capped = code.fmul(code.fdiv(code.fsub(code.vec(1.0), power), code.fadd(code.vec(1.0), power)), code.vec(cap))
        return code.select(negative, code.fneg(capped), capped)

    def _between(self, position: Any, begin: Any, end: Any) -> Any:
        """Which lanes, `position` and those after it, lie from begin on and before end."""
        code = self.code
        before = code.splat(code.trunc(code.calc(end, "-", position), I32))
        seen = code.icmp_signed("<", code.lane_numbers(), before)
        if self.kernel.window is None:
            return seen
        from_ = code.splat(code.trunc(code.calc(begin, "-", position), I32))
        return code.and_(seen, code.icmp_signed(">=", code.lane_numbers(), from_))
