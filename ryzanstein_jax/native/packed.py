"""Products y = x W^T of many rows on a CPU: as `products`, but for arithmetic, not for memory.

Weights are packed (`packing`), and the sums of a dozen rows stay in registers: each number of the rows is read once,
spread over a vector, and multiplied with both vectors of outputs.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

from llvmlite import ir

from ryzanstein_jax.native.emit import BF16, I32
from ryzanstein_jax.native.packing import VECTORS, PackedTask
from ryzanstein_jax.native.products import raised

#: Most rows of a tile: with two vectors of outputs, sums for them fill three quarters of 32 registers.
MOST_ROWS = 12
_X, _HIGH, _LISTS = 0, 5, 6


@dataclass(frozen=True)
class PackedProduct:
    """Operands and result are those of `products.Product`, or with int8 of `products.IntegerProduct`, but that digits
    are what `quantize.Quantize` makes of tiles of as many rows; of two, its high ones and lists are the last operands.

    Attributes:
        dtype: of the kernel, "float32", "bfloat16" or "int8".
        result: dtype of the result.
        rows: of a tile.
        digits: of int8, 1 or 2.
        gate: as `packing.PackedTask` has it.
    """

    dtype: str
    result: str
    rows: int
    digits: int = 1
    gate: str | None = None

    @classmethod
    def rows_of(cls, tokens: int) -> int:
        """Rows of a tile that leave the least over."""
        tiles = -(-tokens // MOST_ROWS)
        return -(-tokens // tiles)

    def add_to(self, module: ir.Module, name: str, lanes: int) -> None:
        _Task.add_handler(self, module, name, lanes, 3 + 2 * self.digits if self.dtype == "int8" else 2)


class _Task(PackedTask):
    def multiply(self, first: Any, packed: Any, soon: Any) -> None:
        code, kernel = self.code, self.kernel
        with code.loop(0, self.tokens, kernel.rows) as top:
            # A cache line with each word: the first tile asks for half of them, the others for the other half.
            line = code.calc(code.least(code.calc(top, "/", kernel.rows), 1), "*", self.words)
            # What is left over at the end is computed several times, and comes out the same.
            tokens = [code.least(code.calc(top, "+", t), code.calc(self.tokens, "-", 1)) for t in range(kernel.rows)]
            sums = [[code.variable(self._zero()) for _ in range(VECTORS)] for _ in tokens]
            tile = code.calc(top, "/", kernel.rows)
            if kernel.dtype == "int8" and kernel.digits == 2:
                self._add_high(packed, tile, sums)
            begins = [code.calc(token, "*", self.words) for token in tokens]
            with code.loop(0, self.words) as word:
                self.ask_for(soon, code.calc(line, "+", word))
                if kernel.dtype == "int8":
                    places = self._places(_X, code.calc(tile, "*", self.words, "+", word))
                else:
                    places = [code.at(self.data[_X], code.calc(begin, "+", word), I32) for begin in begins]
                self._add_word(packed, word, places, sums)
            for token, of_token in zip(tokens, sums, strict=True):
                self.finish(token, first, [code.load(place) for place in of_token])

    def _add_high(self, packed: Any, tile: Any, sums: list[list[Any]]) -> None:
        """Adds the products of a tile's high digits."""
        code = self.code
        begin = code.calc(self.words, "+", 1, "*", tile)
        with code.loop(0, code.get(self.data[_LISTS], begin, I32)) as number:
            word = code.get(self.data[_LISTS], code.calc(begin, "+", 1, "+", number), I32)
            self._add_word(packed, word, self._places(_HIGH, code.calc(tile, "*", self.words, "+", number)), sums)
        for place in itertools.chain(*sums):
            code.store(raised(code, code.load(place)), place)

    def _places(self, operand: int, number: Any) -> list[Any]:
        """Where the rows of a word in tiles are."""
        begin = self.code.at(self.data[operand], self.code.calc(number, "*", self.kernel.rows), I32)
        return [self.code.at(begin, row, I32) for row in range(self.kernel.rows)]

    def _add_word(self, packed: Any, word: Any, rows: list[Any], sums: list[list[Any]]) -> None:
        """Adds the products of one word of each row and of the weights."""
        code = self.code
        place = code.at(packed, code.calc(word, "*", self.columns), I32)
        weights = [self._as_operand(self.vector(place, v * code.lanes)) for v in range(VECTORS)]
        for row, places in zip(rows, sums, strict=True):
            number = self._as_operand(code.splat(code.load(row, typ=I32)))
            for weight, total in zip(weights, places, strict=True):
                code.store(self._added(code.load(total), number, weight), total)

    def _zero(self) -> Any:
        code = self.code
        return code.number(0) if self.kernel.dtype == "int8" else code.vec(0.0)

    def _as_operand(self, words: Any) -> Any:
        code, dtype = self.code, self.kernel.dtype
        if dtype == "int8":
            return words
        return code.bitcast(words, code.vector if dtype == "float32" else ir.VectorType(BF16, 2 * code.lanes))

    def _added(self, total: Any, number: Any, weight: Any) -> Any:
        code, dtype = self.code, self.kernel.dtype
        if dtype == "float32":
            return code.multiply_add(number, weight, total)
        return code.bytes_added(total, weight, number) if dtype == "int8" else code.pairs_added(total, number, weight)
