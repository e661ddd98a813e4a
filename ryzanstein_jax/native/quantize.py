"""Activations as int8 on a CPU, as `model.int8.quantize_tokens` has them, and what products want to know besides."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from llvmlite import ir

from ryzanstein_jax.native.emit import I32, Code
from ryzanstein_jax.native.xla import Buffers, add_handler

#: Tokens of a task where products do not take them by tiles.
_TOKENS = 4
#: `model.int8.LARGEST`.
_LARGEST = 127.0
_X, _DIGITS, _STEPS, _SUMS, _HIGH, _LISTS = range(6)


@dataclass(frozen=True)
class Quantize:
    """Tokens in one or two digits.

    Operand: x [T, I]. Results: the digits; float32 [T], what a step counts; int32 [T], the sum of a token's values in
    steps.

    Digits are int8 [digits * T, I], low ones first. By tiles they are words of four inputs, int32 [tiles, I / 4, rows];
    high ones, in the same form, are another result. For `packed.PackedProduct` these are only the words that are not
    zero in some row, one behind the other, and one more result, int32 [tiles, 1 + I / 4], says how many, and which.

    Attributes:
        dtype: of x.
        mean_step: `model.int8.MEAN_STEP`.
        rows: tokens of a tile; 0 where there are none.
        listed: whether words of high digits are listed.
    """

    digits: int
    dtype: str
    mean_step: float
    rows: int = 0
    listed: bool = False

    def add_to(self, module: ir.Module, name: str, lanes: int) -> None:
        tokens = self.rows or _TOKENS

        def count(code: Code, buffers: Buffers) -> Any:
            return code.calc(buffers.dim(_X, 0), "+", tokens - 1, "/", tokens)

        def task(code: Code, buffers: Buffers, number: Any) -> None:
            _Task(self, code, buffers).write(number, tokens)

        add_handler(module, name, lanes, 1, 3 + (self.rows > 0 and self.digits == 2) + self.listed, count, task)


class _Task:
    def __init__(self, kernel: Quantize, code: Code, buffers: Buffers):
        self.kernel, self.code, self.data = kernel, code, buffers.data
        self.tokens, self.inputs = buffers.dim(_X, 0), buffers.dim(_X, 1)
        self.words = code.calc(self.inputs, "/", 4)

    def write(self, task: Any, tokens: int) -> None:
        code = self.code
        left = code.calc(self.tokens, "-", code.calc(task, "*", tokens))
        with code.loop(0, tokens if self.kernel.rows else code.least(left, tokens)) as row:
            # The last one again where a tile has more rows: what comes of them is thrown away.
            token = code.least(code.calc(task, "*", tokens, "+", row), code.calc(self.tokens, "-", 1))
            self._token(token, code.calc(task, "*", self.words, "*", tokens, "+", row))
        if self.kernel.listed:
            self._list(task)

    def _token(self, token: Any, place: Any) -> None:
        """Quantizes one; `place` is that of its first word in tiles."""
        code, kernel = self.code, self.kernel
        row = code.calc(token, "*", self.inputs)
        largest, total = (code.variable(code.vec(0.0)) for _ in range(2))
        with code.loop(0, self.inputs, code.lanes) as i:
            size = code.size_of(code.read(self.data[_X], code.calc(row, "+", i), kernel.dtype))
            code.store(code.larger(size, code.load(largest)), largest)
            code.store(code.fadd(code.load(total), size), total)
        step = self._step(code.largest_of(code.load(largest)), code.sum_of(code.load(total)))
        code.store(step, code.at(self.data[_STEPS], token))
        some = code.fcmp_ordered(">", step, code.num(0.0))
        factor = code.splat(code.select(some, code.fdiv(code.num(1.0), step), code.num(0.0)))
        added = code.variable(code.number(0))
        with code.loop(0, self.inputs, code.lanes) as i:
            scaled = code.fmul(code.read(self.data[_X], code.calc(row, "+", i), kernel.dtype), factor)
            q = code.fptosi(code.rounded(scaled), code.ints)
            code.store(code.add(code.load(added), q), added)
            parts = [q]
            if kernel.digits == 2:
                parts.append(code.ashr(code.add(q, code.number(128)), code.number(8)))
            for digit, part in enumerate(parts):
                if kernel.rows:
                    self._write_words(part, self.data[(_DIGITS, _HIGH)[digit]], place, i)
                else:
                    start = code.calc(self.tokens, "*", digit, "+", token, "*", self.inputs, "+", i)
                    code.write_bytes(part, self.data[_DIGITS], start)
        code.store(code.sum_of(code.load(added)), code.at(self.data[_SUMS], token, I32))

    def _step(self, largest: Any, total: Any) -> Any:
        """What a step counts. Of NaN it is NaN, which the largest may have missed, but not the sum."""
        code, kernel = self.code, self.kernel
        step = code.fmul(largest, code.num(1 / _LARGEST))
        if kernel.digits == 2:
            mean = code.fdiv(total, code.sitofp(self.inputs, total.type))
            suited = code.fmul(mean, code.num(kernel.mean_step))
            suited = code.select(code.fcmp_ordered("<", step, suited), step, suited)
            step = code.larger(code.fmul(largest, code.num(1 / (256 * _LARGEST))), suited)
        return code.select(code.fcmp_unordered("uno", total, total), total, step)

    def _write_words(self, digits: Any, words: Any, place: Any, i: Any) -> None:
        """Stores the lowest bytes of a vector of int32 as words of a tile, for inputs from `i` on."""
        code = self.code
        packed = code.bitcast(code.lowest_bytes(digits), ir.VectorType(I32, code.lanes // 4))
        for lane in range(code.lanes // 4):
            index = code.calc(i, "/", 4, "+", lane, "*", self.kernel.rows, "+", place)
            code.store(code.extract_element(packed, ir.Constant(I32, lane)), code.at(words, index, I32))

    def _list(self, task: Any) -> None:
        """Moves words of high digits up to where those before are all zero, and says which they are."""
        code, rows = self.code, self.kernel.rows
        first, begin = code.calc(task, "*", self.words), code.calc(self.words, "+", 1, "*", task)
        vector = ir.VectorType(I32, rows)
        found = code.variable(code.int(0))
        with code.loop(0, self.words) as word:
            count = code.load(found)
            place = code.at(self.data[_HIGH], code.calc(first, "+", word, "*", rows), I32)
            high = code.load(place, typ=vector, align=4)
            # Written in any case, and counted if it is not zero.
            code.store(high, code.at(self.data[_HIGH], code.calc(first, "+", count, "*", rows), I32), align=4)
            code.store(code.trunc(word, I32), code.at(self.data[_LISTS], code.calc(begin, "+", 1, "+", count), I32))
            code.store(code.calc(count, "+", code.zext(code.is_any(high), count.type)), found)
        code.store(code.trunc(code.load(found), I32), code.at(self.data[_LISTS], begin, I32))
