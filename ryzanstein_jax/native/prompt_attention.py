"""Attention of prompts on a CPU: tiles of queries of one sequence, as products of small matrices.

Keys are transposed block by block, so that positions lie in lanes, and a few rows of queries are kept in registers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ryzanstein_jax.native.attention_parts import (
    KEY_SCALES,
    KEYS,
    LENS,
    MASKED,
    NOTHING,
    OUT,
    POSITIONS,
    SEQS,
    STARTS,
    TABLES,
    VALUE_SCALES,
    VALUES,
    Q,
    Task,
)  # fmt: skip
from ryzanstein_jax.native.emit import F32, I32


class PromptTask(Task):
    """One tile for one KV slot."""

    def write(self, tile: Any, slot: Any) -> None:
        code, kernel = self.code, self.kernel
        length, first = code.get(self.data[LENS], tile, I32), code.get(self.data[POSITIONS], tile, I32)
        start = code.calc(code.get(self.data[STARTS], tile, I32), "+", self.decodes)
        seq = code.get(self.data[SEQS], tile, I32)
        table = code.at(self.data[TABLES], code.calc(seq, "*", self.buffers.dim(TABLES, 1)), I32)
        rows, end = code.calc(length, "*", kernel.queries), code.calc(first, "+", length)
        # Rows are done `height` at a time, and what stands behind the last row is not used.
        most_rows = kernel.tile * kernel.queries + self.height
        maximum, total = (code.room(F32, most_rows) for _ in range(2))
        values = code.room(F32, most_rows * kernel.head_dim)
        with code.loop(0, code.calc(rows, "+", self.height)) as row:
            code.store(code.num(NOTHING), code.at(maximum, row))
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
                        self.query_row(code.calc(start, "+", token), slot, code.calc(number, "%", kernel.queries))
                        for token, number in zip(tokens, real, strict=True)
                    ]
                    scores = self._scores(places, keys, last, lower, limit)

                    def scaled(weights: Any, group: Any) -> Any:
                        row = self.page_row(table, slot, code.calc(block, "+", group))
                        return self.scaled(weights, VALUE_SCALES, row)

                    decays = [
                        self._soften_row(
                            code.at(scores, j * self.span), lower, limit, code.at(maximum, number),
                            code.at(total, number), scaled,
                        )
                        for j, number in enumerate(numbers)
                    ]  # fmt: skip
                    self._weigh(scores, decays, numbers, values, table, slot, block, lower, limit)
        with code.loop(0, rows) as row:
            token, head = code.calc(row, "/", kernel.queries), code.calc(row, "%", kernel.queries)
            place = self.query_row(code.calc(start, "+", token), slot, head)
            factor = code.splat(code.fdiv(code.num(1.0), code.larger(code.get(total, row), code.num(1e-30))))
            for part in range(self.parts):
                value = code.read(values, code.calc(row, "*", kernel.head_dim, "+", part * code.lanes))
                index = code.calc(place, "+", part * code.lanes)
                code.write(code.fmul(value, factor), self.data[OUT], index, kernel.dtype)

    def _transpose(self, keys: Any, table: Any, slot: Any, block: Any, positions: Any) -> None:
        """The keys of a block of positions as [H, positions], times the scale."""
        code, kernel, lanes = self.code, self.kernel, self.code.lanes
        with code.loop(0, positions, lanes) as group:
            row = self.page_row(table, slot, code.calc(block, "+", group))
            counts = self.scaled(code.vec(kernel.scale), KEY_SCALES, row)
            for part in range(self.parts):
                columns = code.transposed(
                    [
                        code.read(
                            self.data[KEYS],
                            code.calc(row, "+", lane, "*", kernel.head_dim, "+", part * lanes),
                            kernel.pages,
                        )
                        for lane in range(lanes)
                    ]
                )
                for lane, column in enumerate(columns):
                    index = code.calc(group, "+", (part * lanes + lane) * self.span)
                    code.write(code.fmul(column, counts), keys, index)

    def _scores(self, places: list[Any], keys: Any, last: list[Any], lower: Any, limit: Any) -> Any:
        """Scores [rows, positions], masked."""
        code, kernel, lanes = self.code, self.kernel, self.code.lanes
        queries = code.room(F32, self.height * kernel.head_dim)
        for j, place in enumerate(places):
            for part in range(self.parts):
                query = code.read(self.data[Q], code.calc(place, "+", part * lanes), kernel.dtype)
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
                    seen = self.between(position, begin, code.calc(last[j], "+", 1))
                    masked = code.select(seen, self.capped(code.load(sums[j][half])), code.vec(MASKED))
                    code.write(masked, scores, code.calc(position, "+", j * self.span))
        return scores

    def _soften_row(
        self, row: Any, lower: Any, limit: Any, maximum: Any, total: Any, scaled: Callable[[Any, Any], Any]
    ) -> Any:
        """Turns a row's scores into weights of its running softmax; what its older values are to be scaled by.

        `scaled` gives the weights of a group of positions as its values take them.
        """
        code, lanes = self.code, self.code.lanes
        largest = code.variable(code.vec(NOTHING))
        with code.loop(lower, limit, lanes) as group:
            code.store(code.larger(code.load(largest), code.read(row, group)), largest)
        old = code.load(maximum, typ=F32)
        new = code.larger(old, code.largest_of(code.load(largest)))
        added = code.variable(code.vec(0.0))
        with code.loop(lower, limit, lanes) as group:
            weight = code.exp(code.fsub(code.read(row, group), code.splat(new)))
            code.write(scaled(weight, group), row, group)
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
                first = self.page_row(table, slot, code.calc(block, "+", group))
                with code.loop(0, code.least(code.calc(limit, "-", group), lanes)) as lane:
                    row = code.calc(first, "+", lane, "*", kernel.head_dim)
                    value = [
                        code.read(self.data[VALUES], code.calc(row, "+", (part + c) * lanes), kernel.pages)
                        for c in range(self.chunk)
                    ]
                    for j, sums_of_row in enumerate(sums):
                        weight = code.splat(code.get(scores, code.calc(group, "+", lane, "+", j * self.span)))
                        for x, place in zip(value, sums_of_row, strict=True):
                            code.store(code.multiply_add(weight, x, code.load(place)), place)
            for row_places, row_sums in zip(places, sums, strict=True):
                for place, value in zip(row_places, row_sums, strict=True):
                    code.write(code.load(value), values, place)
