"""RMSNorm on a CPU, in one pass."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from llvmlite import ir

from ryzanstein_jax.native.emit import F32, Code
from ryzanstein_jax.native.xla import Buffers, add_rows_handler

#: Rows of a task.
_ROWS = 8
_X, _SCALE, _Y = range(3)


@dataclass(frozen=True)
class Norm:
    """x / rms(x) * (scale + offset), computed in float32: operands x [N, D] and scale [D], result [N, D].

    Attributes:
        dtype: of all, "float32" or "bfloat16".
        eps, offset: as `model.layers.RMSNorm` has them.
    """

    dtype: str
    eps: float
    offset: float

    def add_to(self, module: ir.Module, name: str, lanes: int) -> None:
        add_rows_handler(module, name, lanes, 2, 1, _ROWS, self._write_row)

    def _write_row(self, code: Code, buffers: Buffers, row: Any) -> None:
        data, features = buffers.data, buffers.dim(_X, 1)
        begin = code.calc(row, "*", features)
        squares = code.variable(code.vec(0.0))
        with code.loop(0, features, code.lanes) as i:
            x = code.read(data[_X], code.calc(begin, "+", i), self.dtype)
            code.store(code.multiply_add(x, x, code.load(squares)), squares)
        mean = code.fdiv(code.sum_of(code.load(squares)), code.sitofp(features, F32))
        factor = code.splat(code.fdiv(code.num(1.0), code.root(code.fadd(mean, code.num(self.eps)))))
        with code.loop(0, features, code.lanes) as i:
            place = code.calc(begin, "+", i)
            scale = code.fadd(code.read(data[_SCALE], i, self.dtype), code.vec(self.offset))
            x = code.read(data[_X], place, self.dtype)
            code.write(code.fmul(code.fmul(x, factor), scale), data[_Y], place, self.dtype)
