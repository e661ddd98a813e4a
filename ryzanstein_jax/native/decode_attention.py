"""Attention of a decode token: keys and values are read where they lie, once for all query heads of a slot.

Scores of a block of positions come first, a vector for as many positions as it has lanes; then their weights, and the
values. Where pages lie nobody guesses, so each stretch asks for the next one's rows while it computes with its own, one
by one: a processor can wait for a few dozen lines of memory at a time, and drops or delays what is asked for beyond.

Names in the code: H head_dim, Q query heads per slot.
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp

from ryzanstein_jax.native.attention_parts import (
    DECODE_LENS,
    DECODE_TABLES,
    KEY_SCALES,
    KEYS,
    MASKED,
    NOTHING,
    OUT,
    VALUE_SCALES,
    VALUES,
    Task,
)  # fmt: skip
from ryzanstein_jax.native.emit import F32, I8, I32

#: Positions of a block.
DECODE_SPAN = 256
#: Keys that are multiplied at a time: few enough for registers.
_KEYS = 4
#: Vectors of positions that rows are asked for ahead.
_AHEAD = 2
_CACHE_LINE = 64


class DecodeTask(Task):
    """One query for one slot."""

    def write(self, seq: Any, slot: Any) -> None:
        code, kernel, lanes = self.code, self.kernel, self.code.lanes
        self.slot = slot
        self.length = code.get(self.data[DECODE_LENS], seq, I32)
        self.begin = code.int(0) if kernel.window is None else code.most(code.calc(self.length, "-", kernel.window), 0)
        self.table = code.at(self.data[DECODE_TABLES], code.calc(seq, "*", self.buffers.dim(DECODE_TABLES, 1)), I32)
        first_row = code.calc(seq, "*", self.slots, "+", slot, "*", kernel.queries)
        self.query_parts = [
            [code.fmul(part, code.vec(kernel.scale)) for part in self.query(code.calc(first_row, "+", i))]
            for i in range(kernel.queries)
        ]
        self.scores = code.room(F32, kernel.queries * DECODE_SPAN)
        maximum = [code.variable(code.num(NOTHING)) for _ in self.query_parts]
        # Each lane adds up weights of its own positions.
        self.totals = [code.variable(code.vec(0.0)) for _ in self.query_parts]
        self.values = [[code.variable(code.vec(0.0)) for _ in range(self.parts)] for _ in self.query_parts]
        begin = code.calc(self.begin, "/", lanes, "*", lanes)
        with code.loop(begin, self.length, DECODE_SPAN) as first:
            end = code.least(code.calc(first, "+", DECODE_SPAN), self.length)
            for group in range(_AHEAD):
                self._ask_for_rows(VALUES, self._row(code.calc(first, "+", group * lanes)))
            tops = self._score(first, end)
            for i, top in enumerate(tops):
                self._lower(maximum[i], i, code.largest_of(top))
            self._add_values(first, end, maximum)
        for i, parts in enumerate(self.values):
            total = code.larger(code.sum_of(code.load(self.totals[i])), code.num(1e-30))
            factor = code.splat(code.fdiv(code.num(1.0), total))
            for part, place in enumerate(parts):
                index = code.calc(first_row, "+", i, "*", kernel.head_dim, "+", part * lanes)
                code.write(code.fmul(code.load(place), factor), self.data[OUT], index, kernel.dtype)

    def _score(self, first: Any, end: Any) -> list[Any]:
        """Computes the scores of a block; the largest of each query head, lane by lane."""
        code, lanes = self.code, self.code.lanes
        tops = [code.variable(code.vec(NOTHING)) for _ in self.query_parts]
        with code.loop(first, end, lanes) as position:
            row, soon = self._row(position), self._row(code.calc(position, "+", _AHEAD * lanes))
            offset = code.calc(position, "-", first)
            with code.loop(0, lanes, _KEYS) as lane:
                self._multiply(code.calc(row, "+", lane), code.calc(soon, "+", lane), code.calc(offset, "+", lane))
            seen = self.between(position, self.begin, self.length)
            for i, top in enumerate(tops):
                place = self._score_at(i, offset)
                counted = self.scaled(code.load(place, typ=code.vector), KEY_SCALES, row)
                scores = code.select(seen, self.capped(counted), code.vec(MASKED))
                code.store(scores, place)
                code.store(code.larger(scores, code.load(top)), top)
        return [code.load(top) for top in tops]

    def _multiply(self, row: Any, soon: Any, offset: Any) -> None:
        """Products of the queries with a few keys, from a row of the pages on, as a block's scores from an offset."""
        code = self.code
        products: list[list[Any]] = [[] for _ in self.query_parts]
        for lane in range(_KEYS):
            key = self.row(self.data[KEYS], code.calc(row, "+", lane))
            self._ask_for(KEYS, code.calc(soon, "+", lane))
            for i, parts in enumerate(self.query_parts):
                products[i].append(self.dot(parts, key))
        for i, vectors in enumerate(products):
            code.store(code.quarters(vectors), self._score_at(i, offset), align=4)

    def _lower(self, maximum: Any, i: int, largest: Any) -> None:
        """What was added up so far, as far as it counts beside a new maximum."""
        code = self.code
        old = code.load(maximum)
        new = code.larger(old, largest)
        decay = code.splat(code.exp_scalar(code.fsub(old, new)))
        code.store(new, maximum)
        for place in (self.totals[i], *self.values[i]):
            code.store(code.fmul(code.load(place), decay), place)

    def _add_values(self, first: Any, end: Any, maximum: list[Any]) -> None:
        """Makes weights of a block's scores, and adds up the values with them."""
        code, lanes = self.code, self.code.lanes
        with code.loop(first, end, lanes) as position:
            row, soon = self._row(position), self._row(code.calc(position, "+", _AHEAD * lanes))
            offset = code.calc(position, "-", first)
            for i, largest in enumerate(maximum):
                place = self._score_at(i, offset)
                weight = code.exp(code.fsub(code.load(place, typ=code.vector), code.splat(code.load(largest))))
                code.store(code.fadd(code.load(self.totals[i]), weight), self.totals[i])
                code.store(self.scaled(weight, VALUE_SCALES, row), place)
            with code.loop(0, code.least(code.calc(self.length, "-", position), lanes)) as lane:
                value = self.row(self.data[VALUES], code.calc(row, "+", lane))
                self._ask_for(VALUES, code.calc(soon, "+", lane))
                for i, places in enumerate(self.values):
                    weight = code.splat(code.load(self._score_at(i, code.calc(offset, "+", lane)), typ=F32))
                    for part, total in zip(value, places, strict=True):
                        code.store(code.multiply_add(weight, part, code.load(total)), total)

    def _score_at(self, i: int, offset: Any) -> Any:
        return self.code.at(self.scores, self.code.calc(offset, "+", i * DECODE_SPAN))

    def _row(self, position: Any) -> Any:
        """Which row of the pages a position has; the last one's if there is none."""
        last = self.code.calc(self.length, "-", 1)
        return self.page_row(self.table, self.slot, self.code.least(position, last))

    def _ask_for_rows(self, pages: int, row: Any) -> None:
        for lane in range(self.code.lanes):
            self._ask_for(pages, self.code.calc(row, "+", lane))

    def _ask_for(self, pages: int, row: Any) -> None:
        """Asks for the key or value of a position that is read soon."""
        size = self.kernel.head_dim * jnp.dtype(self.kernel.pages).itemsize
        first = self.code.at(self.data[pages], self.code.calc(row, "*", size), I8)
        for line in range(0, size, _CACHE_LINE):
            self.code.prefetch(first, line, I8)
