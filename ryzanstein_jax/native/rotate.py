"""Rotation of queries and keys by their positions, and keys and values into their pages, in one pass on a CPU."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from llvmlite import ir

from ryzanstein_jax.native.emit import ELEMENTS, I32, Code
from ryzanstein_jax.native.xla import Buffers, add_rows_handler

#: Tokens of a task.
_TOKENS = 8
_QKV, _COS, _SIN, _SLOTS, _KEYS, _VALUES, _ROTATED, _NEW_KEYS, _NEW_VALUES = range(9)


@dataclass(frozen=True)
class RotateAndStore:
    """Before one layer's attention.

    Operands: queries, key and value of each slot, [T, K, Q + 2, H]; cos and sin, float32 [T, H / 2]; int32 [T], where
    in the pages each token's key and value go (`kv_cache.write`); pages of keys and values [P, K, page, H]. Results:
    rotated queries [T, K, Q, H], and the pages, which are the operands.

    Attributes:
        head_dim, queries, page_size: sizes; half a head_dim is a multiple of the lanes.
        dtype: of all, "float32" or "bfloat16".
    """

    head_dim: int
    queries: int
    page_size: int
    dtype: str

    #: Which results are which operands.
    aliases: ClassVar[dict[int, int]] = {_KEYS: _NEW_KEYS - _ROTATED, _VALUES: _NEW_VALUES - _ROTATED}

    def runs_with(self, lanes: int) -> bool:
        """Whether vectors of so many numbers divide half a head."""
        return self.head_dim % (2 * lanes) == 0 and self.dtype in ("float32", "bfloat16")

    def add_to(self, module: ir.Module, name: str, lanes: int) -> None:
        add_rows_handler(module, name, lanes, _VALUES + 1, 3, _TOKENS, self._write_token)

    def _write_token(self, code: Code, buffers: Buffers, token: Any) -> None:
        data, slots, half = buffers.data, buffers.dim(_QKV, 1), self.head_dim // 2
        place = code.get(data[_SLOTS], token, I32)
        page, offset = code.calc(place, "/", self.page_size), code.calc(place, "%", self.page_size)
        tables = [
            [code.read(data[table], code.calc(token, "*", half, "+", part)) for part in range(0, half, code.lanes)]
            for table in (_COS, _SIN)
        ]
        with code.loop(0, slots) as slot:
            head = code.calc(token, "*", slots, "+", slot)
            source = code.calc(head, "*", (self.queries + 2) * self.head_dim)
            target = code.calc(head, "*", self.queries * self.head_dim)
            row = code.calc(page, "*", slots, "+", slot, "*", self.page_size, "+", offset, "*", self.head_dim)
            with code.loop(0, self.queries * self.head_dim, self.head_dim) as query:
                self._rotate(code, data, code.calc(source, "+", query), tables, _ROTATED, code.calc(target, "+", query))
            key = code.calc(source, "+", self.queries * self.head_dim)
            self._rotate(code, data, key, tables, _NEW_KEYS, row)
            element = ELEMENTS[self.dtype]
            for part in range(0, self.head_dim, code.lanes):
                vector = ir.VectorType(element, code.lanes)
                value = code.at(data[_QKV], code.calc(key, "+", self.head_dim + part), element)
                into = code.at(data[_NEW_VALUES], code.calc(row, "+", part), element)
                code.store(code.load(value, typ=vector, align=2), into, align=2)

    def _rotate(self, code: Code, data: list[Any], head: Any, tables: list[list[Any]], into: int, target: Any) -> None:
        """Rotates one head by halves, and stores it."""
        half = self.head_dim // 2
        for number, (cos, sin) in enumerate(zip(*tables, strict=True)):
            place = code.calc(head, "+", number * code.lanes)
            low = code.read(data[_QKV], place, self.dtype)
            high = code.read(data[_QKV], code.calc(place, "+", half), self.dtype)
            at = code.calc(target, "+", number * code.lanes)
            code.write(code.fsub(code.fmul(low, cos), code.fmul(high, sin)), data[into], at, self.dtype)
            turned = code.fadd(code.fmul(high, cos), code.fmul(low, sin))
            code.write(turned, data[into], code.calc(at, "+", half), self.dtype)
