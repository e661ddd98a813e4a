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

from ryzanstein_jax.native.emit import BF16, F32, I8, I16, I32, Code
from ryzanstein_jax.native.xla import Buffers, add_handler

#: Vectors of sums that a tile keeps in registers.
_SUMS_HELD = 16
_LARGEST = 127.0

_X, _W = 0, 1
# Of int8 besides: what each digit of a token counts, sums of its digits; scales of the outputs.
_SCALES, _DIGIT_SUMS, _CHANNELS = 2, 3, 4


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
    """

    dtype: str
    result: str
    shape: Shape
    paired: bool

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

    Operands: digits int8 [digits * T, I], kernel int8 [O, I], and float32: what each token's first digit counts [T],
    sums of all digits [digits * T] (`Quantize`), and scales of the outputs [O]. The result is float32 [T, O].

    Attributes:
        digits: 1 or 2.
        finer: how much less a second digit counts than the first.
        shape: of tiles and tasks.
    """

    digits: int
    finer: float
    shape: Shape

    operands = 5
    result = "float32"
    #: A lane adds up four products of bytes at a time.
    unit = 4

    def tile(self, code: Code, buffers: Buffers) -> _Tile:
        return _IntegerTile(self, code, buffers)


@dataclass(frozen=True)
class Quantize:
    """Activations as int8: `model.int8.quantize_tokens`, and the sums of the digits.

    Operand: x [T, I]. Results: int8 [digits * T, I], first digits first; float32 [T], what they count; float32
    [digits * T], sums of the digits.
    """

    digits: int
    finer: float
    dtype: str

    def add_to(self, module: ir.Module, name: str, lanes: int) -> None:
        add_handler(module, name, lanes, 1, 3, lambda code, buffers: buffers.dim(0, 0), self._write)

    def _write(self, code: Code, buffers: Buffers, token: Any) -> None:
        x, digits, scales, sums = buffers.data
        tokens, inputs = buffers.dim(0, 0), buffers.dim(0, 1)
        row = code.calc(token, "*", inputs)
        largest = code.variable(code.vec(0.0))
        with code.loop(0, inputs, code.lanes) as i:
            size = code.size_of(code.read(x, code.calc(row, "+", i), self.dtype))
            code.store(code.larger(size, code.load(largest)), largest)
        most = code.largest_of(code.load(largest))
        code.store(code.fmul(most, code.num(1 / _LARGEST)), code.at(scales, token))
        none = code.fcmp_ordered("==", most, code.num(0.0))
        factor = code.splat(code.select(none, code.num(0.0), code.fdiv(code.num(_LARGEST), most)))
        totals = [code.variable(code.vec(0.0)) for _ in range(self.digits)]
        with code.loop(0, inputs, code.lanes) as i:
            scaled = code.fmul(code.read(x, code.calc(row, "+", i), self.dtype), factor)
            first = code.rounded(scaled)
            found = [first]
            if self.digits == 2:
                found.append(code.rounded(code.fmul(code.fsub(scaled, first), code.vec(self.finer))))
            for number, (digit, total) in enumerate(zip(found, totals, strict=True)):
                place = code.calc(token, "+", code.calc(tokens, "*", number), "*", inputs, "+", i)
                code.write_bytes(digit, digits, place)
                code.store(code.fadd(code.load(total), digit), total)
        for number, total in enumerate(totals):
            place = code.calc(token, "+", code.calc(tokens, "*", number))
            code.store(code.sum_of(code.load(total)), code.at(sums, place))


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
        # Where one row does little with what it reads, the processor sees by itself what is read next.
        soon = range(columns, 2 * columns) if rows > 1 else ()
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
        self.element = F32 if kernel.dtype == "float32" else I16

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
        return ir.Constant(self.code.ints, [0] * self.code.lanes)

    def values(self, place: Any, i: Any) -> Any:
        return self.code.load(self.code.at(place, i, I8), typ=self.code.ints, align=1)

    def weights(self, place: Any, i: Any) -> Any:
        flip = ir.Constant(self.code.ints, [0x80808080 - (1 << 32)] * self.code.lanes)
        return self.code.xor(self.values(place, i), flip)

    def added(self, total: Any, values: Any, weights: Any) -> Any:
        return self.code.bytes_added(total, weights, values)

    def result(self, token: Any, output: Any, totals: list[Any]) -> Any:
        return scaled_digits(self.code, self.kernel.finer, self.data, self.tokens, token, output, totals)


def scaled_digits(
    code: Code, finer: float, data: list[Any], tokens: Any, token: Any, output: Any, totals: list[Any]
) -> Any:
    """What `IntegerProduct` gives for a token and neighbouring outputs.

    Args:
        code: takes it.
        finer: as `IntegerProduct` has it.
        data: its operands.
        tokens: in all.
        token, output: which, and the first of which.
        totals: the sums of each digit with w + 128: int32 vectors of outputs.
    """
    lanes = totals[0].type.count
    floats = ir.VectorType(F32, lanes)
    count, value = code.get(data[_SCALES], token), None
    for digit, total in enumerate(totals):
        place = code.calc(token, "+", code.calc(tokens, "*", digit))
        excess = code.fmul(code.get(data[_DIGIT_SUMS], place), code.num(128.0))
        exact = code.sub(total, code.splat(code.fptosi(excess, I32), lanes))
        part = code.fmul(code.sitofp(exact, floats), code.splat(count, lanes))
        value = part if value is None else code.fadd(value, part)
        count = code.fmul(count, code.num(1 / finer))
    channels = code.load(code.at(data[_CHANNELS], output), typ=floats, align=4)
    return code.fmul(value, channels)
