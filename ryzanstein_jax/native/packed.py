"""Products y = x W^T of many rows on a CPU: as `products`, but for arithmetic, not for memory.

A task takes a block of outputs, as many as fit two vectors, and first turns their weights about, so that outputs lie in
lanes and a step along the inputs reads two vectors. Then the sums of a dozen rows stay in registers: each number of the
rows is read once, spread over a vector, and multiplied with both. A number here is a word of four bytes: one float32,
two bfloat16 or four int8, whose products a lane adds up.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from llvmlite import ir

from ryzanstein_jax.native.emit import BF16, I32, Code
from ryzanstein_jax.native.products import raised, scaled
from ryzanstein_jax.native.xla import Buffers, add_handler

#: Most rows of a tile: with two vectors of outputs, sums for them fill three quarters of 32 registers.
MOST_ROWS = 12
_VECTORS = 2
_WORDS_PER_LINE = 16
_X, _W = 0, 1
_HIGH, _LISTS = 5, 6
#: Activations x * sigmoid(f(x)), and their f.
GATES: dict[str, Callable[[Code, Any], Any]] = {
    "silu": lambda code, x: x,
    # 0.5 x (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))), for tanh(u) = 2 sigmoid(2 u) - 1
    "gelu_tanh": lambda code, x: code.fmul(
        code.fmul(x, code.vec(math.sqrt(8 / math.pi))),
        code.multiply_add(code.fmul(x, x), code.vec(0.044715), code.vec(1.0)),
    ),
}
#: Numbers of a word, by dtype.
PER_WORD = {"float32": 1, "bfloat16": 2, "int8": 4}


def gated(code: Code, gate: str, x: Any, y: Any) -> Any:
    """activation(x) * y."""
    return code.fmul(code.fmul(x, code.sigmoid(GATES[gate](code, x))), y)


@dataclass(frozen=True)
class PackedProduct:
    """Operands and result are those of `products.Product`, or with int8 of `products.IntegerProduct`, but that digits
    are what `quantize.Quantize` makes of tiles of as many rows; of two, its high ones and lists are the last operands.

    Attributes:
        dtype: of the kernel, "float32", "bfloat16" or "int8".
        result: dtype of the result.
        rows: of a tile.
        digits: of int8, 1 or 2.
        gate: an activation of `GATES`: outputs lie in pairs, and of each the result has activation(first) * second.
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
        operands = 3 + 2 * self.digits if self.dtype == "int8" else 2

        def count(code: Code, buffers: Buffers) -> Any:
            return code.calc(buffers.dim(_W, 0), "/", _VECTORS * lanes)

        add_handler(module, name, lanes, operands, 1, count, lambda *where: _Task(self, *where[:2]).write(where[2]))


class _Task:
    def __init__(self, kernel: PackedProduct, code: Code, buffers: Buffers):
        self.kernel, self.code, self.data = kernel, code, buffers.data
        self.tokens, self.outputs = buffers.dim(len(self.data) - 1, 0), buffers.dim(_W, 0)
        self.words = code.calc(buffers.dim(_W, 1), "/", PER_WORD[kernel.dtype])
        self.columns = _VECTORS * code.lanes
        self.threads = buffers.threads()

    def write(self, task: Any) -> None:
        code, kernel = self.code, self.kernel
        first = code.calc(task, "*", self.columns)
        packed = self._pack(first)
        self.soon = self._next_weights(task)
        with code.loop(0, self.tokens, kernel.rows) as top:
            # A cache line with each word: the first tile asks for half of them, the others for the other half.
            self.lines = code.calc(code.least(code.calc(top, "/", kernel.rows), 1), "*", self.words)
            # What is left over at the end is computed several times, and comes out the same.
            tokens = [code.least(code.calc(top, "+", t), code.calc(self.tokens, "-", 1)) for t in range(kernel.rows)]
            sums = [[code.variable(self._zero()) for _ in range(_VECTORS)] for _ in tokens]
            if kernel.dtype == "int8":
                self._add_tile(packed, code.calc(top, "/", kernel.rows), sums)
            else:
                rows = [code.at(self.data[_X], code.calc(token, "*", self.words), I32) for token in tokens]
                with code.loop(0, self.words) as word:
                    self._ask_for_weights(word)
                    self._add_word(packed, word, [code.at(row, word, I32) for row in rows], sums)
            for token, places in zip(tokens, sums, strict=True):
                outputs = [code.calc(first, "+", v * code.lanes) for v in range(_VECTORS)]
                results = [self._result(token, output, code.load(p)) for output, p in zip(outputs, places, strict=True)]
                if kernel.gate:
                    results = [self._gated(kernel.gate, *results)]
                begin = code.calc(token, "*", self.outputs, "+", first, "/", _VECTORS // len(results))
                for v, result in enumerate(results):
                    code.write(result, self.data[-1], code.calc(begin, "+", v * code.lanes), kernel.result)

    def _gated(self, gate: str, a: Any, b: Any) -> Any:
        """Of pairs that lie one behind the other in a and b."""
        return gated(self.code, gate, *self.code.alternating(a, b))

    def _add_tile(self, packed: Any, tile: Any, sums: list[list[Any]]) -> None:
        """Adds the products of a tile of int8, high digits first."""
        code = self.code
        first = code.calc(tile, "*", self.words)
        if self.kernel.digits == 2:
            begin = code.calc(self.words, "+", 1, "*", tile)
            with code.loop(0, code.get(self.data[_LISTS], begin, I32)) as number:
                word = code.get(self.data[_LISTS], code.calc(begin, "+", 1, "+", number), I32)
                self._add_word(packed, word, self._rows(_HIGH, code.calc(first, "+", number)), sums)
            for place in itertools.chain(*sums):
                code.store(raised(code, code.load(place)), place)
        with code.loop(0, self.words) as word:
            self._ask_for_weights(word)
            self._add_word(packed, word, self._rows(_X, code.calc(first, "+", word)), sums)

    def _next_weights(self, task: Any) -> Any:
        """Where the weights lie of the task that this thread may well take next: memory is idle until then."""
        code = self.code
        last = code.calc(self.outputs, "/", self.columns, "-", 1)
        number = code.least(code.calc(task, "+", self.threads), last)
        return code.at(self.data[_W], code.calc(number, "*", self.columns, "*", self.words), I32)

    def _ask_for_weights(self, word: Any) -> None:
        self.code.prefetch(self.soon, self.code.calc(self.lines, "+", word, "*", _WORDS_PER_LINE), I32)

    def _rows(self, operand: int, number: Any) -> list[Any]:
        """Where the rows of a word in tiles are."""
        begin = self.code.at(self.data[operand], self.code.calc(number, "*", self.kernel.rows), I32)
        return [self.code.at(begin, row, I32) for row in range(self.kernel.rows)]

    def _add_word(self, packed: Any, word: Any, rows: list[Any], sums: list[list[Any]]) -> None:
        """Adds the products of one word of each row and of the weights."""
        code = self.code
        place = code.at(packed, code.calc(word, "*", self.columns), I32)
        weights = [self._as_operand(self._vector(place, v * code.lanes)) for v in range(_VECTORS)]
        for row, places in zip(rows, sums, strict=True):
            number = self._as_operand(code.splat(code.load(row, typ=I32)))
            for weight, total in zip(weights, places, strict=True):
                code.store(self._added(code.load(total), number, weight), total)

    def _pack(self, first: Any) -> Any:
        """The weights of a task as [words, outputs]."""
        code, lanes = self.code, self.code.lanes
        packed = code.scratch(code.calc(self.words, "*", 4 * self.columns))
        with code.loop(0, self.words, lanes) as word:
            for v in range(_VECTORS):
                rows = []
                for lane in range(lanes):
                    row = code.calc(first, "+", v * lanes + lane, "*", self.words, "+", word)
                    rows.append(self._flipped(self._vector(self.data[_W], row)))
                for lane, column in enumerate(code.transposed(rows)):
                    index = code.calc(word, "+", lane, "*", self.columns, "+", v * lanes)
                    code.store(column, code.at(packed, index, I32), align=4)
        return packed

    def _vector(self, base: Any, index: Any) -> Any:
        return self.code.load(self.code.at(base, index, I32), typ=self.code.ints, align=4)

    def _flipped(self, words: Any) -> Any:
        """int8 weights w as w + 128, unsigned."""
        if self.kernel.dtype != "int8":
            return words
        return self.code.unsigned_bytes(words)

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

    def _result(self, token: Any, output: Any, total: Any) -> Any:
        return scaled(self.code, self.data, token, output, total) if self.kernel.dtype == "int8" else total
