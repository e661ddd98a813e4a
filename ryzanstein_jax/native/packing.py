"""What the products of many rows on a CPU have in common.

A task takes a block of outputs, as many as fit two vectors, and first turns their weights about, so that outputs lie in
lanes and a step along the inputs reads two vectors. A number here is a word of four bytes: one float32, two bfloat16 or
four int8, whose products a lane adds up.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

from llvmlite import ir

from ryzanstein_jax.native.emit import I32, Code, indices
from ryzanstein_jax.native.products import scaled
from ryzanstein_jax.native.xla import Buffers, add_handler

#: Vectors of outputs of a task.
VECTORS = 2
#: Numbers of a word, by dtype.
PER_WORD = {"float32": 1, "bfloat16": 2, "int8": 4}
_WORDS_PER_LINE = 16
_W = 1
#: Activations x * sigmoid(f(x)), and their f.
GATES: dict[str, Callable[[Code, Any], Any]] = {
    "silu": lambda code, x: x,
    # 0.5 x (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))), for tanh(u) = 2 sigmoid(2 u) - 1
    "gelu_tanh": lambda code, x: code.fmul(
        code.fmul(x, code.vec(math.sqrt(8 / math.pi))),
        code.multiply_add(code.fmul(x, x), code.vec(0.044715), code.vec(1.0)),
    ),
}


class PackedTask(ABC):
    """The products of a block of outputs with all rows.

    Args:
        kernel: a product: its `dtype` and `result` are those of kernel and result, and its `gate` is an activation of
            `GATES`: then outputs lie in pairs, and of each the result has activation(first) * second.
        code, buffers: of the call; operand 1 is the kernel.
    """

    def __init__(self, kernel: Any, code: Code, buffers: Buffers):
        self.kernel, self.code, self.data = kernel, code, buffers.data
        self.tokens, self.outputs = buffers.dim(len(self.data) - 1, 0), buffers.dim(_W, 0)
        self.words = code.calc(buffers.dim(_W, 1), "/", PER_WORD[kernel.dtype])
        self.columns = VECTORS * code.lanes
        self.threads = buffers.threads()

    @classmethod
    def add_handler(cls, kernel: Any, module: ir.Module, name: str, lanes: int, operands: int) -> None:
        """Adds a handler that does such tasks, as `xla.add_handler`."""

        def count(code: Code, buffers: Buffers) -> Any:
            return code.calc(buffers.dim(_W, 0), "/", VECTORS * lanes)

        def task(code: Code, buffers: Buffers, number: Any) -> None:
            cls(kernel, code, buffers)._write(number)

        add_handler(module, name, lanes, operands, 1, count, task)

    @abstractmethod
    def multiply(self, first: Any, packed: Any, soon: Any) -> None:
        """Writes the code for all rows.

        Args:
            first: of the outputs.
            packed: where their weights lie, [words, outputs].
            soon: where the weights lie that `ask_for` takes, 2 * words cache lines of them: memory is idle until then.
        """

    def ask_for(self, soon: Any, line: Any) -> None:
        """Asks for a cache line of weights that this thread may well take next."""
        self.code.prefetch(soon, self.code.calc(line, "*", _WORDS_PER_LINE), I32)

    def finish(self, token: Any, first: Any, totals: list[Any]) -> None:
        """Writes a token's results, of its sums for each vector of outputs from `first` on."""
        code, gate = self.code, self.kernel.gate
        results = [self._result(token, code.calc(first, "+", v * code.lanes), total) for v, total in enumerate(totals)]
        if gate:
            results = [self._gated(gate, *results)]
        begin = code.calc(token, "*", self.outputs, "+", first, "/", VECTORS // len(results))
        for v, result in enumerate(results):
            code.write(result, self.data[-1], code.calc(begin, "+", v * code.lanes), self.kernel.result)

    def vector(self, base: Any, index: Any) -> Any:
        """A vector of words."""
        return self.code.load(self.code.at(base, index, I32), typ=self.code.ints, align=4)

    def _write(self, task: Any) -> None:
        code = self.code
        first = code.calc(task, "*", self.columns)
        last = code.calc(self.outputs, "/", self.columns, "-", 1)
        soon = code.least(code.calc(task, "+", self.threads), last)
        soon = code.at(self.data[_W], code.calc(soon, "*", self.columns, "*", self.words), I32)
        self.multiply(first, self._pack(first), soon)

    def _result(self, token: Any, output: Any, total: Any) -> Any:
        return scaled(self.code, self.data, token, output, total) if self.kernel.dtype == "int8" else total

    def _gated(self, gate: str, a: Any, b: Any) -> Any:
        """Of pairs that lie one behind the other in a and b."""
        code = self.code
        x, y = (code.shuffle_vector(a, b, indices(range(k, 2 * code.lanes, 2))) for k in range(2))
        return code.fmul(code.fmul(x, code.sigmoid(GATES[gate](code, x))), y)

    def _pack(self, first: Any) -> Any:
        """The weights of a task as [words, outputs]."""
        code, lanes = self.code, self.code.lanes
        packed = code.scratch(code.calc(self.words, "*", 4 * self.columns))
        with code.loop(0, self.words, lanes) as word:
            for v in range(VECTORS):
                rows = []
                for lane in range(lanes):
                    row = code.calc(first, "+", v * lanes + lane, "*", self.words, "+", word)
                    rows.append(self._flipped(self.vector(self.data[_W], row)))
                for lane, column in enumerate(code.transposed(rows)):
                    index = code.calc(word, "+", lane, "*", self.columns, "+", v * lanes)
                    code.store(column, code.at(packed, index, I32), align=4)
        return packed

    def _flipped(self, words: Any) -> Any:
        """int8 weights w as w + 128, unsigned."""
        if self.kernel.dtype != "int8":
            return words
        return self.code.unsigned_bytes(words)
