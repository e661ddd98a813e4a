"""What tasks of attention have in common: where their operands are, and small pieces of code.

Names in the code: H head_dim, Q query heads per slot, row one query head of one query of a tile.
"""

from __future__ import annotations

import math
from typing import Any

from ryzanstein_jax.native.emit import ELEMENTS, I32, Code
from ryzanstein_jax.native.xla import Buffers

MASKED = -1e30
#: The maximum of no scores: so far above masked ones that their weights are zero beside it.
NOTHING = -1e29
#: Bytes of transposed keys that a task works on at a time, half of a core's nearest cache.
BLOCK_BYTES = 32 << 10
#: Rows of a tile that are done at a time. With two vectors of each, or four where there are twice as many registers,
#: they take three quarters of the registers.
HEIGHT = 6
OPERANDS = 10
(Q, KEYS, VALUES, DECODE_TABLES, DECODE_LENS, TABLES, STARTS, SEQS, POSITIONS, LENS) = range(OPERANDS)
#: Further operands, of pages in 8 bits: what each key and each value counts.
KEY_SCALES, VALUE_SCALES = OPERANDS, OPERANDS + 1
#: The result comes after all operands.
OUT = -1


class Task:
    """The code of one task; `kernel` is an `attention.Attention`."""

    def __init__(self, kernel: Any, code: Code, buffers: Buffers):
        self.kernel, self.code, self.buffers = kernel, code, buffers
        self.data = buffers.data
        self.slots, self.decodes = buffers.dim(KEYS, 1), buffers.dim(DECODE_LENS, 0)
        self.parts = kernel.head_dim // code.lanes  # vectors of a head
        self.element = ELEMENTS[kernel.pages]
        # Positions of a block, and the rows and vectors of values that fit the registers of a processor.
        self.span = kernel.span(code.lanes)
        registers = 16 if code.lanes == 8 else 32
        self.chunk = math.gcd(self.parts, registers // 8)
        self.height = HEIGHT

    def query_row(self, token: Any, slot: Any, head: Any) -> Any:
        """Where a query, and its result, begins."""
        kernel = self.kernel
        return self.code.calc(token, "*", self.slots, "+", slot, "*", kernel.queries, "+", head, "*", kernel.head_dim)

    def page_row(self, table: Any, slot: Any, position: Any) -> Any:
        """Which row of a layer's keys or values a position has."""
        code, size = self.code, self.kernel.page_size
        page = code.get(table, code.calc(position, "/", size), I32)
        row = code.calc(page, "*", self.slots, "+", slot, "*", size)
        return code.calc(code.calc(position, "%", size), "+", row)

    def row(self, base: Any, row: Any) -> list[Any]:
        """The vectors of one head of the pages."""
        code, kernel = self.code, self.kernel
        first = code.at(base, code.calc(row, "*", kernel.head_dim), self.element)
        return [code.read(first, part * code.lanes, kernel.pages) for part in range(self.parts)]

    def query(self, row: Any) -> list[Any]:
        """The vectors of a query."""
        code, kernel = self.code, self.kernel
        first = code.calc(row, "*", kernel.head_dim)
        return [
            code.read(self.data[Q], code.calc(first, "+", part * code.lanes), kernel.dtype)
            for part in range(self.parts)
        ]

    def scaled(self, values: Any, scales: int, row: Any) -> Any:
        """A vector, a lane for each position from a row of the pages on, times what these count."""
        if not self.kernel.has_scales:
            return values
        return self.code.fmul(values, self.code.read(self.data[scales], row))

    def dot(self, a: list[Any], b: list[Any]) -> Any:
        """Products added up over the vectors of a head, not yet over lanes."""
        total = self.code.fmul(a[0], b[0])
        for x, y in zip(a[1:], b[1:], strict=True):
            total = self.code.multiply_add(x, y, total)
        return total

    def capped(self, scores: Any) -> Any:
        """softcap * tanh(score / softcap), by tanh(x) = sign(x) (1 - e^-2|x|) / (1 + e^-2|x|)."""
        code, cap = self.code, self.kernel.softcap
        if cap is None:
            return scores
        negative = code.fcmp_ordered("<", scores, code.vec(0.0))
        size = code.select(negative, code.fneg(scores), scores)
        power = code.exp(code.fmul(size, code.vec(-2.0 / cap)))
        capped = code.fmul(code.fdiv(code.fsub(code.vec(1.0), power), code.fadd(code.vec(1.0), power)), code.vec(cap))
        return code.select(negative, code.fneg(capped), capped)

    def between(self, position: Any, begin: Any, end: Any) -> Any:
        """Which lanes, `position` and those after it, lie from begin on and before end."""
        code = self.code
        before = code.splat(code.trunc(code.calc(end, "-", position), I32))
        seen = code.icmp_signed("<", code.lane_numbers(), before)
        if self.kernel.window is None:
            return seen
        from_ = code.splat(code.trunc(code.calc(begin, "-", position), I32))
        return code.and_(seen, code.icmp_signed(">=", code.lane_numbers(), from_))
