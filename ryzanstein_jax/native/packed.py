"""Products y = x W^T of many rows on a CPU: as `products`, but for arithmetic, not for memory.

A task takes a block of outputs, as many as fit two vectors, and first turns their weights about, so that outputs lie in
lanes and a step along the inputs reads two vectors. Then the sums of a dozen rows stay in registers: each number of the
rows is read once, spread over a vector, and multiplied with both. A number here is a word of four bytes: one float32,
two bfloat16 or four int8, whose products a lane adds up.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from llvmlite import ir

from ryzanstein_jax.native.emit import BF16, I32, Code
from ryzanstein_jax.native.products import scaled_digits
from ryzanstein_jax.native.xla import Buffers, add_handler

#: Most rows of a tile: with two vectors of outputs, sums for them fill three quarters of 32 registers.
MOST_ROWS = 12
_VECTORS = 2
_X, _W = 0, 1
_PER_WORD = {"float32": 1, "bfloat16": 2, "int8": 4}


@dataclass(frozen=True)
class PackedProduct:
    """Operands and result are those of `products.Product`, or with int8 of `products.IntegerProduct`.

    Attributes:
        dtype: of the kernel, "float32", "bfloat16" or "int8".
        result: dtype of the result.
        rows: of a tile; with two digits an even number.
        digits, finer: of int8, as `products.IntegerProduct` has them.
    """

    dtype: str
    result: str
    rows: int
    digits: int = 1
    finer: float = 1.0

    @classmethod
    def rows_of(cls, tokens: int, digits: int = 1) -> int:
        """Rows of a tile that leave the least over."""
        most = MOST_ROWS // digits
        tiles = -(-tokens // most)
        return -(-tokens // tiles) * digits

    def add_to(self, module: ir.Module, name: str, lanes: int) -> None:
        operands = 5 if self.dtype == "int8" else 2

        def count(code: Code, buffers: Buffers) -> Any:
            return code.calc(buffers.dim(_W, 0), "/", _VECTORS * lanes)

        add_handler(module, name, lanes, operands, 1, count, lambda *where: _Task(self, *where[:2]).write(where[2]))


class _Task:
    def __init__(self, kernel: PackedProduct, code: Code, buffers: Buffers):
        self.kernel, self.code, self.data = kernel, code, buffers.data
        self.tokens, self.outputs = buffers.dim(len(self.data) - 1, 0), buffers.dim(_W, 0)
        self.words = code.calc(buffers.dim(_W, 1), "/", _PER_WORD[kernel.dtype])
        self.columns = _VECTORS * code.lanes

    def write(self, task: Any) -> None:
        code, kernel = self.code, self.kernel
        first = code.calc(task, "*", self.columns)
        packed = self._pack(first)
        tokens = kernel.rows // kernel.digits
        with code.loop(0, self.tokens, tokens) as top:
            # What is left over at the end is computed several times, and comes out the same.
            real = [code.least(code.calc(top, "+", t), code.calc(self.tokens, "-", 1)) for t in range(tokens)]
            rows = [
                code.at(self.data[_X], code.calc(token, "+", code.calc(self.tokens, "*", digit), "*", self.words), I32)
                for token in real
                for digit in range(kernel.digits)
            ]
            sums = [[code.variable(self._zero()) for _ in range(_VECTORS)] for _ in rows]
            with code.loop(0, self.words) as word:
                place = code.at(packed, code.calc(word, "*", self.columns), I32)
                weights = [self._as_operand(self._vector(place, v * code.lanes)) for v in range(_VECTORS)]
                for row, places in zip(rows, sums, strict=True):
                    number = self._as_operand(code.splat(code.load(code.at(row, word, I32), typ=I32)))
                    for weight, place in zip(weights, places, strict=True):
                        code.store(self._added(code.load(place), number, weight), place)
            for t, token in enumerate(real):
                for v in range(_VECTORS):
                    output = code.calc(first, "+", v * code.lanes)
                    parts = [code.load(sums[t * kernel.digits + digit][v]) for digit in range(kernel.digits)]
                    place = code.calc(token, "*", self.outputs, "+", output)
                    code.write(self._result(token, output, parts), self.data[-1], place, kernel.result)

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
        return self.code.xor(words, ir.Constant(self.code.ints, [0x80808080 - (1 << 32)] * self.code.lanes))

    def _zero(self) -> Any:
        code = self.code
        return ir.Constant(code.ints, [0] * code.lanes) if self.kernel.dtype == "int8" else code.vec(0.0)

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

    def _result(self, token: Any, output: Any, parts: list[Any]) -> Any:
        if self.kernel.dtype != "int8":
            return parts[0]
        return scaled_digits(self.code, self.kernel.finer, self.data, self.tokens, token, output, parts)
