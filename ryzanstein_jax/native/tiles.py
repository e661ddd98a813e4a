"""Products y = x W^T of many rows on processors that multiply tiles (AMX).

A tile is a register of sixteen rows of 64 bytes. One instruction adds the product of two tiles to a third: sixteen rows
of activations, which lie as they are, by sixteen outputs, whose weights are packed (`packing`), along sixteen words.
Four products share what two tiles of activations and two of weights hold, and eight registers are all that there are.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from llvmlite import ir

from ryzanstein_jax.native.emit import I8, I16, I32, I64
from ryzanstein_jax.native.packing import VECTORS, PackedTask
from ryzanstein_jax.native.products import raised

#: Rows of a tile, and bytes of a row; words of a row are as many as rows.
ROWS = 16
_ROW_BYTES = 64
#: Registers: sums of each tile of rows with each of outputs, then rows, then weights.
_REGISTERS, _OF_ROWS, _OF_WEIGHTS = 8, 4, 6
_TILE_WORDS = ROWS * _ROW_BYTES // 4
#: Where the description of the registers has its parts: its version, bytes of a row, rows.
_VERSION, _DESCRIBED_BYTES, _DESCRIBED_ROWS = 0, 16, 48
_X = 0


@dataclass(frozen=True)
class TileProduct:
    """Operands and result are those of `products.Product`, or with int8 of `products.IntegerProduct`.

    Attributes:
        dtype: of the kernel, "bfloat16" or "int8".
        result: dtype of the result.
        rows: of a tile.
        tiles: of rows that are multiplied together: both digits of some tokens, or some tokens and the next.
        spread: among how many of these, at most, the weights of the next task are asked for: a power of two.
        digits: of int8, 1 or 2.
        gate: as `packing.PackedTask` has it.
    """

    dtype: str
    result: str
    rows: int
    tiles: int
    spread: int
    digits: int = 1
    gate: str | None = None

    @classmethod
    def of(cls, dtype: str, result: str, tokens: int, digits: int = 1, gate: str | None = None) -> TileProduct:
        """For that many tokens."""
        tiles = 2 if digits == 2 or tokens > ROWS else 1
        passes = -(-tokens // (ROWS * tiles // digits))
        spread = 1 << (min(passes, ROWS).bit_length() - 1)
        return cls(dtype, result, min(tokens, ROWS), tiles, spread, digits, gate)

    def add_to(self, module: ir.Module, name: str, lanes: int) -> None:
        _Task.add_handler(self, module, name, lanes, 5 if self.dtype == "int8" else 2)


class _Task(PackedTask):
    def multiply(self, first: Any, packed: Any, soon: Any) -> None:
        code, kernel = self.code, self.kernel
        self._describe_tiles()
        sums = code.room(I32, VECTORS * kernel.tiles * _TILE_WORDS)
        step = ROWS * kernel.tiles // kernel.digits
        spread = code.least(self.tokens, kernel.spread * step)
        # What a pass asks for with each step along the inputs.
        lines = 2 * ROWS // kernel.spread
        for begin, end, ask in ((0, spread, True), (spread, self.tokens, False)):
            with code.loop(begin, end, step) as top:
                # What is left over at the end is computed several times, and comes out the same.
                last = code.calc(self.tokens, "-", kernel.rows)
                tokens = [code.least(code.calc(top, "+", t), last) for t in range(0, step, ROWS)]
                rows = [
                    code.at(self.data[_X], code.calc(self.tokens, "*", digit, "+", token, "*", self.words), I32)
                    for token in tokens
                    for digit in range(kernel.digits)
                ]
                for register in range(VECTORS * kernel.tiles):
                    code.tiles("tilezero", register)
                with code.loop(0, self.words, ROWS) as word:
                    done = code.calc(top, "/", step, "*", self.words, "+", word, "/", ROWS, "*", lines)
                    for line in range(lines if ask else 0):
                        self.ask_for(soon, code.calc(done, "+", line))
                    self._add(packed, rows, word)
                for register in range(VECTORS * kernel.tiles):
                    code.tiles(
                        "tilestored64", register, code.at(sums, register * _TILE_WORDS, I32), code.int(_ROW_BYTES)
                    )
                self._finish(first, tokens, sums)
        code.tiles("tilerelease")

    def _describe_tiles(self) -> None:
        """Says how large the registers are; until then there are none."""
        code = self.code
        described = code.room(I64, 8)
        for number in range(8):
            code.store(code.int(0), code.at(described, number, I64))
        code.store(ir.Constant(I8, 1), code.at(described, _VERSION, I8))
        for register in range(_REGISTERS):
            rows = self.kernel.rows if register < _OF_WEIGHTS else ROWS
            size = code.at(described, _DESCRIBED_BYTES // 2 + register, I16)
            code.store(ir.Constant(I16, _ROW_BYTES), size)
            code.store(ir.Constant(I8, rows), code.at(described, _DESCRIBED_ROWS + register, I8))
        code.tiles("ldtilecfg", described)

    def _add(self, packed: Any, rows: list[Any], word: Any) -> None:
        """Adds the products along sixteen words."""
        code = self.code
        operation = "tdpbf16ps" if self.kernel.dtype == "bfloat16" else "tdpbsud"
        for v in range(VECTORS):
            place = code.at(packed, code.calc(word, "*", self.columns, "+", v * ROWS), I32)
            code.tiles("tileloadd64", _OF_WEIGHTS + v, place, code.int(4 * VECTORS * ROWS))
        for number, row in enumerate(rows):
            code.tiles("tileloadd64", _OF_ROWS + number, code.at(row, word, I32), code.calc(self.words, "*", 4))
            for v in range(VECTORS):
                code.tiles(operation, VECTORS * number + v, _OF_ROWS + number, _OF_WEIGHTS + v)

    def _finish(self, first: Any, tokens: list[Any], sums: Any) -> None:
        code, kernel = self.code, self.kernel
        typ = code.ints if kernel.dtype == "int8" else code.vector
        with code.loop(0, kernel.rows) as row:
            for number, token in enumerate(tokens):
                totals = []
                for v in range(VECTORS):
                    places = [VECTORS * (kernel.digits * number + digit) + v for digit in range(kernel.digits)]
                    parts = [
                        code.load(code.at(sums, code.calc(row, "*", ROWS, "+", place * _TILE_WORDS), I32), typ=typ)
                        for place in places
                    ]
                    totals.append(parts[0] if kernel.digits == 1 else code.add(parts[0], raised(code, parts[1])))
                self.finish(code.calc(token, "+", row), first, totals)
