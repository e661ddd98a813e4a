"""Products y = x W^T of few rows on a CPU, with kernels as they are stored, [outputs, inputs].

Every output is a dot product along memory, so nothing is rearranged: a tile of a few outputs and rows is kept in
registers while both are read once, lane by lane, and lanes are added up at the end. A task is a block of outputs: each
weight comes from memory once, whatever the number of rows, and is asked for before it is needed.

int8 is multiplied as unsigned by signed, which is what processors have: weights are read as w + 128, and the 128 times
the sum of the activations that come of it are taken off at the end. All of it is exact.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

from llvmlite import ir

from ryzanstein_jax.native.emit import BF16, ELEMENTS, F32, I8, I16, I32, Code
from ryzanstein_jax.native.xla import Buffers, add_handler

#: Vectors of sums that a tile keeps in registers.
_SUMS_HELD = 16

_X, _W = 0, 1
# Of int8 besides: what a step of each token counts, the sum of its values in steps; scales of the outputs.
_STEPS, _SUMS, _CHANNELS = 2, 3, 4


@dataclass(frozen=True)
class Shape:
    """How a product is cut.

    Attributes:
        rows, columns: tokens and outputs of a tile. Tokens that are left over are done one by one; outputs never are.
        block: outputs of a task.
    """

    rows: int
    columns: int
    block: int

    @classmethod
    def of(cls, tokens: int, outputs: int, digits: int = 1) -> Shape:
        """For that many; outputs come by fours."""
        rows = 1 << (max(1, min(4, tokens) // digits).bit_length() - 1)
        columns = math.gcd(outputs, _SUMS_HELD // (rows * digits))
        # Long ones keep memory busy; short ones give every thread something to do.
        return cls(rows, columns, max(columns, math.gcd(outputs, 128 if outputs >= 1024 else 64)))


class _TiledProduct(ABC):
    """What the kernels of products have in common; operands 0 and 1 are the rows and the weights."""

    shape: Shape
    #: How many operands there are.
    operands: ClassVar[int]

    @abstractmethod
    def tile(self, code: Code, buffers: Buffers) -> _Tile:
        """Writes the code of a tile."""

    def add_to(self, module: ir.Module, name: str, lanes: int) -> None:
        add_handler(module, name, lanes, self.operands, 1, self._tasks, self._write)

    def _tasks(self, code: Code, buffers: Buffers) -> Any:
        return code.calc(buffers.dim(_W, 0), "+", self.shape.block - 1, "/", self.shape.block)

    def _write(self, code: Code, buffers: Buffers, task: Any) -> None:
        tile, shape = self.tile(code, buffers), self.shape
        first = code.calc(task, "*", shape.block)
        end = code.least(code.calc(first, "+", shape.block), tile.outputs)
        whole = code.calc(tile.tokens, "/", shape.rows, "*", shape.rows)
        with code.loop(first, end, shape.columns) as column:
            with code.loop(0, whole, shape.rows) as row:
                tile.write(row, shape.rows, column)
            with code.loop(whole, tile.tokens) as row:
                tile.write(row, 1, column)


@dataclass(frozen=True)
class Product(_TiledProduct):
    """x W^T of float32 or bfloat16: operands x [T, I] and W [O, I], result [T, O].

    Attributes:
        dtype: of the operands, "float32" or "bfloat16".
        result: dtype of the result, the same or "float32".
        shape: of tiles and tasks.
        paired: whether the processor multiplies pairs of bfloat16 and adds them up in float32.
        always_ask: whether to ask for the weights that come next also where one row does little with what it reads:
            some processors (`native.sees_what_is_next`) know by themselves then.
    """

    dtype: str
    result: str
    shape: Shape
    paired: bool
    always_ask: bool = False

    operands = 2

    @property
    def unit(self) -> int:
        """How many lanes of float32 a step along the inputs takes."""
        return 2 if self.paired else 1

    def tile(self, code: Code, buffers: Buffers) -> _Tile:
        return _FloatTile(self, code, buffers)


@dataclass(frozen=True)
class IntegerProduct(_TiledProduct):
    """The product of int8 of `model.int8`, with its scales.

    Operands: digits int8 [digits * T, I], kernel int8 [O, I], what `quantize.Quantize` says of the tokens besides,
    float32 [T] and int32 [T], and scales of the outputs, float32 [O]. The result is float32 [T, O].

    Attributes:
        digits: 1 or 2.
        shape: of tiles and tasks.
        always_ask: as `Product` has it.
    """

    digits: int
    shape: Shape
    always_ask: bool = False

    operands = 5
    result = "float32"
    #: A lane adds up four products of bytes at a time.
    unit = 4

    def tile(self, code: Code, buffers: Buffers) -> _Tile:
        return _IntegerTile(self, code, buffers)


class _Tile(ABC):
    """A few tokens by a few outputs."""

    element: ir.Type
    digits = 1

    def __init__(self, kernel: Any, code: Code, buffers: Buffers):
        self.kernel, self.code, self.data = kernel, code, buffers.data
        self.outputs, self.inputs = buffers.dim(_W, 0), buffers.dim(_W, 1)
        self.tokens = buffers.dim(len(self.data) - 1, 0)

    @abstractmethod
    def zero(self) -> Any:
        """A vector of sums without anything in it."""

    @abstractmethod
    def values(self, place: Any, i: Any) -> Any:
        """Activations from an input on."""

    @abstractmethod
    def weights(self, place: Any, i: Any) -> Any:
        """Weights from an input on."""

    @abstractmethod
    def added(self, total: Any, values: Any, weights: Any) -> Any:
        """Sums with the products of these added."""

    @abstractmethod
    def result(self, token: Any, output: Any, totals: list[Any]) -> Any:
        """What a token's sums for four outputs, one vector for each digit, come to."""

    def write(self, row: Any, rows: int, column: Any) -> None:
        code = self.code
        x_rows = [
            self._row(_X, code.calc(row, "+", r, "+", code.calc(self.tokens, "*", digit)))
            for r in range(rows)
            for digit in range(self.digits)
        ]
        columns = self.kernel.shape.columns
        w_rows = [self._row(_W, code.calc(column, "+", c)) for c in range(columns)]
        soon = range(columns, 2 * columns) if rows > 1 or self.kernel.always_ask else ()
        next_rows = [self._row(_W, code.calc(column, "+", c)) for c in soon]
        sums = [[code.variable(self.zero()) for _ in w_rows] for _ in x_rows]
        with code.loop(0, self.inputs, self.kernel.unit * code.lanes) as i:
            weights = [self.weights(place, i) for place in w_rows]
            for place in next_rows:
                code.prefetch(place, i, self.element)
            for x_row, places in zip(x_rows, sums, strict=True):
                values = self.values(x_row, i)
                for weight, place in zip(weights, places, strict=True):
                    code.store(self.added(code.load(place), values, weight), place)
        for four in range(0, columns, 4):
            totals = [code.quarters([code.load(place) for place in places[four : four + 4]]) for places in sums]
            output = code.calc(column, "+", four)
            for r in range(rows):
                token = code.calc(row, "+", r)
                result = self.result(token, output, totals[r * self.digits : (r + 1) * self.digits])
                place = code.calc(token, "*", self.outputs, "+", output)
                code.write(result, self.data[-1], place, self.kernel.result)

    def _row(self, operand: int, row: Any) -> Any:
        return self.code.at(self.data[operand], self.code.calc(row, "*", self.inputs), self.element)


class _FloatTile(_Tile):
    def __init__(self, kernel: Product, code: Code, buffers: Buffers):
        super().__init__(kernel, code, buffers)
        self.element = ELEMENTS[kernel.dtype]

    def zero(self) -> Any:
        return self.code.vec(0.0)

    def values(self, place: Any, i: Any) -> Any:
        code = self.code
        if self.kernel.paired:
            return code.load(code.at(place, i, I16), typ=ir.VectorType(BF16, 2 * code.lanes), align=2)
        return code.read(place, i, self.kernel.dtype)

    weights = values

    def added(self, total: Any, values: Any, weights: Any) -> Any:
        if self.kernel.paired:
            return self.code.pairs_added(total, values, weights)
        return self.code.multiply_add(values, weights, total)

    def result(self, token: Any, output: Any, totals: list[Any]) -> Any:
        return totals[0]


class _IntegerTile(_Tile):
    element = I8

    def __init__(self, kernel: IntegerProduct, code: Code, buffers: Buffers):
        super().__init__(kernel, code, buffers)
        self.digits = kernel.digits

    def zero(self) -> Any:
        return self.code.number(0)

    def values(self, place: Any, i: Any) -> Any:
        return self.code.load(self.code.at(place, i, I8), typ=self.code.ints, align=1)

    def weights(self, place: Any, i: Any) -> Any:
        return self.code.unsigned_bytes(self.values(place, i))

    def added(self, total: Any, values: Any, weights: Any) -> Any:
        return self.code.bytes_added(total, weights, values)

    def result(self, token: Any, output: Any, totals: list[Any]) -> Any:
        total = totals[0]
        if self.digits == 2:
            total = self.code.add(total, raised(self.code, totals[1]))
        return scaled(self.code, self.data, token, output, total)


def raised(code: Code, high: Any) -> Any:
    """Sums of high digits, int32, in steps of the low ones."""
    return code.shl(high, ir.Constant(high.type, [8] * high.type.count))


def scaled(code: Code, data: list[Any], token: Any, output: Any, total: Any) -> Any:
    """What `IntegerProduct` gives for a token and neighbouring outputs.

    Args:
        code: takes it.
        data: its operands.
        token, output: which, and the first of which.
        total: the token's sums, in steps, with w + 128: int32, one for each output. It may have overflowed, as
            `excess` may: their difference has not.
    """
    lanes = total.type.count
    floats = ir.VectorType(F32, lanes)
    excess = code.shl(code.load(code.at(data[_SUMS], token, I32), typ=I32), ir.Constant(I32, 7))
    exact = code.sub(total, code.splat(excess, lanes))
    value = code.fmul(code.sitofp(exact, floats), code.splat(code.get(data[_STEPS], token), lanes))
    return code.fmul(value, code.load(code.at(data[_CHANNELS], output), typ=floats, align=4))
