"""Products y = x W^T of many rows on processors that multiply tiles (AMX).

A tile is a register of sixteen rows of 64 bytes, and eight registers are all that there are. One instruction adds the
products of two tiles to a third, along sixteen words of four bytes: sixteen outputs, whose weights are read as they
lie, by sixteen tokens. These come as words in columns, so they are laid out before (`TileRows`, or for int8
`quantize.Quantize`), once for all outputs. Sums are turned about as they leave the registers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from llvmlite import ir

from ryzanstein_jax.native.emit import F32, I8, I16, I32, I64, Code
from ryzanstein_jax.native.packed import PER_WORD, gated
from ryzanstein_jax.native.products import raised
from ryzanstein_jax.native.xla import Buffers, add_handler

#: Rows of a tile, and words of a row.
SIDE = 16
_ROW_BYTES = 4 * SIDE
_TILE_WORDS = SIDE * SIDE
#: Tiles of outputs, and at most of tokens or their digits, that are multiplied with each other.
_OF_OUTPUTS, _OF_TOKENS = 2, 2
#: Outputs of a task.
COLUMNS = _OF_OUTPUTS * SIDE
#: The first register of weights and of tokens; the others hold sums, of a tile of tokens with each of outputs in turn.
_WEIGHTS, _TOKENS, _REGISTERS = 4, 6, 8
#: Where the description of the registers has its parts: a version, bytes of a row, rows.
_VERSION, _SIZES, _ROWS = 0, 16, 48
# Operands, as `products.IntegerProduct` has them, and high digits.
_X, _W, _STEPS, _CHANNELS, _HIGH = 0, 1, 2, 4, 5


@dataclass(frozen=True)
class TileRows:
    """Tokens laid out for tiles: bfloat16 [T, I] as words of two inputs, int32 [tiles, I / 2, SIDE].

    Where tokens do not fill the last tile, the last of them does.
    """

    def add_to(self, module: ir.Module, name: str, lanes: int) -> None:
        def count(code: Code, buffers: Buffers) -> Any:
            return buffers.dim(1, 0)

        def task(code: Code, buffers: Buffers, tile: Any) -> None:
            last = code.calc(buffers.dim(0, 0), "-", 1)
            words, (x, result) = buffers.dim(1, 1), buffers.data
            with code.loop(0, words, SIDE) as word:
                rows = []
                for row in range(SIDE):
                    token = code.least(code.calc(tile, "*", SIDE, "+", row), last)
                    place = code.at(x, code.calc(token, "*", words, "+", word), I32)
                    rows.append(code.load(place, typ=code.ints, align=4))
                for number, column in enumerate(code.transposed(rows)):
                    place = code.calc(tile, "*", words, "+", word, "+", number, "*", SIDE)
                    code.store(column, code.at(result, place, I32), align=4)

        add_handler(module, name, lanes, 1, 1, count, task)


@dataclass(frozen=True)
class TileProduct:
    """Results are those of `products.Product`, or with int8 of `products.IntegerProduct`.

    Operands are too, but that tokens are laid out for tiles; high digits of int8, if there are two, are the last.

    Attributes:
        dtype: of the kernel, "bfloat16" or "int8".
        result: dtype of the result.
        tiles: of tokens that are multiplied together; one where there are two digits of each.
        spread: among how many of these, at most, the weights of the next task are asked for: a power of two.
        digits: of int8, 1 or 2.
        gate: an activation of `packed.GATES`, as `packed.PackedProduct` has it.
    """

    dtype: str
    result: str
    tiles: int
    spread: int
    digits: int = 1
    gate: str | None = None

    @classmethod
    def of(cls, dtype: str, result: str, tokens: int, digits: int = 1, gate: str | None = None) -> TileProduct:
        """For that many tokens."""
        tiles = min(_OF_TOKENS // digits, -(-tokens // SIDE))
        passes = -(-tokens // (tiles * SIDE))
        return cls(dtype, result, tiles, 1 << (min(passes, SIDE).bit_length() - 1), digits, gate)

    def add_to(self, module: ir.Module, name: str, lanes: int) -> None:
        operands = 4 + self.digits if self.dtype == "int8" else 2

        def count(code: Code, buffers: Buffers) -> Any:
            return code.calc(buffers.dim(_W, 0), "/", COLUMNS)

        add_handler(module, name, lanes, operands, 1, count, lambda *where: _Task(self, *where[:2]).write(where[2]))


class _Task:
    """The products of a block of outputs with all tokens."""

    def __init__(self, kernel: TileProduct, code: Code, buffers: Buffers):
        self.kernel, self.code, self.buffers, self.data = kernel, code, buffers, buffers.data
        self.tokens, self.outputs = buffers.dim(len(self.data) - 1, 0), buffers.dim(_W, 0)
        self.words = code.calc(buffers.dim(_W, 1), "/", PER_WORD[kernel.dtype])

    def write(self, task: Any) -> None:
        code, kernel = self.code, self.kernel
        first = code.calc(task, "*", COLUMNS)
        self._describe_registers()
        sums = code.room(I32, _OF_TOKENS * _OF_OUTPUTS * _TILE_WORDS)
        channels = self._channels(first)
        # Memory is idle until then: the weights of the task that this thread may well take next.
        soon = code.calc(task, "+", self.buffers.threads(), "*", COLUMNS)
        soon = self._weights(code.least(soon, code.calc(self.outputs, "-", COLUMNS)))
        step = kernel.tiles * SIDE
        asked = code.least(self.tokens, kernel.spread * step)
        for begin, end, lines in ((0, asked, COLUMNS // kernel.spread), (asked, self.tokens, 0)):
            with code.loop(begin, end, step) as top:
                # There may be one tile less: then the one before is done twice, and comes out the same.
                last = code.calc(self.buffers.dim(_X, 0), "-", 1)
                tiles = [code.least(code.calc(top, "/", SIDE, "+", n), last) for n in range(kernel.tiles)]
                registers = range(kernel.tiles * kernel.digits * _OF_OUTPUTS)
                for register in registers:
                    code.tiles("tilezero", register)
                with code.loop(0, self.words, SIDE) as word:
                    done = code.calc(top, "/", step, "*", self.words, "+", word, "/", SIDE, "*", lines)
                    for line in range(lines):
                        code.prefetch(soon, code.calc(done, "+", line, "*", SIDE), I32, near=False)
                    self._add(first, tiles, word)
                for register in registers:
                    code.tiles(
                        "tilestored64", register, code.at(sums, register * _TILE_WORDS, I32), code.int(_ROW_BYTES)
                    )
                for number, tile in enumerate(tiles):
                    self._finish(first, code.calc(tile, "*", SIDE), sums, number, channels)
        code.tiles("tilerelease")

    def _describe_registers(self) -> None:
        """Says how large they are; until then there are none."""
        code = self.code
        described = code.room(I64, 8)
        for number in range(8):
            code.store(code.int(0), code.at(described, number, I64))
        code.store(ir.Constant(I8, 1), code.at(described, _VERSION, I8))
        for register in range(_REGISTERS):
            code.store(ir.Constant(I16, _ROW_BYTES), code.at(described, _SIZES // 2 + register, I16))
            code.store(ir.Constant(I8, SIDE), code.at(described, _ROWS + register, I8))
        code.tiles("ldtilecfg", described)

    def _weights(self, output: Any) -> Any:
        return self.code.at(self.data[_W], self.code.calc(output, "*", self.words), I32)

    def _add(self, first: Any, tiles: list[Any], word: Any) -> None:
        """Adds the products along sixteen words."""
        code, kernel = self.code, self.kernel
        operation = "tdpbf16ps" if kernel.dtype == "bfloat16" else "tdpbssd"
        for v in range(_OF_OUTPUTS):
            # Of pairs, the first ones are in one tile and the second ones in the other.
            begin, stride = (v, 2) if kernel.gate else (v * SIDE, 1)
            place = code.at(self._weights(code.calc(first, "+", begin)), word, I32)
            code.tiles("tileloadd64", _WEIGHTS + v, place, code.calc(self.words, "*", 4 * stride))
        operands = [(_X, tile) for tile in tiles] + [(_HIGH, tile) for tile in tiles[: kernel.digits - 1]]
        for number, (operand, tile) in enumerate(operands):
            place = code.calc(tile, "*", self.words, "+", word, "*", SIDE)
            code.tiles("tileloadd64", _TOKENS + number, code.at(self.data[operand], place, I32), code.int(_ROW_BYTES))
            for v in range(_OF_OUTPUTS):
                code.tiles(operation, number * _OF_OUTPUTS + v, _WEIGHTS + v, _TOKENS + number)

    def _channels(self, first: Any) -> list[Any]:
        """The scales of int8's outputs, a vector for each tile of them."""
        code = self.code
        if self.kernel.dtype != "int8":
            return []
        vectors = [code.read(self.data[_CHANNELS], code.calc(first, "+", v * SIDE)) for v in range(_OF_OUTPUTS)]
        return code.alternating(*vectors) if self.kernel.gate else vectors

    def _finish(self, first: Any, top: Any, sums: Any, number: int, channels: list[Any]) -> None:
        """Writes the results of a tile of tokens."""
        code, kernel = self.code, self.kernel
        columns = [code.transposed(self._sums(sums, number, v)) for v in range(_OF_OUTPUTS)]
        last = code.calc(self.tokens, "-", 1)
        for row, of_token in enumerate(zip(*columns, strict=True)):
            values, token = list(of_token), code.least(code.calc(top, "+", row), last)
            if kernel.dtype == "int8":
                step = code.splat(code.get(self.data[_STEPS], token))
                floats = [code.fmul(code.sitofp(value, code.vector), step) for value in values]
                values = [code.fmul(value, scale) for value, scale in zip(floats, channels, strict=True)]
            results = [gated(code, kernel.gate, *values)] if kernel.gate else values
            begin = code.calc(token, "*", self.outputs, "+", first, "/", _OF_OUTPUTS // len(results))
            for v, result in enumerate(results):
                code.write(result, self.data[-1], code.calc(begin, "+", v * SIDE), kernel.result)

    def _sums(self, sums: Any, number: int, v: int) -> list[Any]:
        """A tile of tokens with one of outputs: a vector for each output, tokens in lanes."""
        code, kernel = self.code, self.kernel
        typ = code.ints if kernel.dtype == "int8" else code.vector
        digits = [
            [
                code.load(code.at(sums, ((number + digit) * _OF_OUTPUTS + v) * _TILE_WORDS + row * SIDE, F32), typ=typ)
                for row in range(SIDE)
            ]
            for digit in range(kernel.digits)
        ]
        if kernel.digits == 1:
            return digits[0]
        return [code.add(low, raised(code, high)) for low, high in zip(*digits, strict=True)]
