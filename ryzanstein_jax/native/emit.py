"""Code for one CPU, written with `llvmlite`: an `ir.IRBuilder` that knows vectors, loops and a few functions.

A kernel is a Python function that writes straight-line vector code; whatever is known when it is written (the size
of a head, how many rows) is unrolled by Python's own loops. All arithmetic is in float32; narrower numbers are widened
as they are read. `Code.lanes` is how many float32 numbers the widest vectors of this processor have.
"""

from __future__ import annotations

import builtins
import math
import struct
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from llvmlite import ir

I8, I16, I32, I64 = (ir.IntType(bits) for bits in (8, 16, 32, 64))
F32 = ir.FloatType()
PTR = ir.PointerType()


class _BFloat(ir.Type):
    """LLVM's bfloat, which llvmlite does not name: for the few instructions that take it."""

    def _to_string(self) -> str:
        return "bfloat"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _BFloat)

    def __hash__(self) -> int:
        return hash(_BFloat)


BF16 = _BFloat()
#: How numbers lie in memory, by their dtype.
ELEMENTS = {"float32": F32, "bfloat16": I16, "int8": I8, "uint8": I8}
#: What the compiler may do with sums: reorder and contract them. Infinities and NaN keep their meaning.
FAST = ("reassoc", "contract", "nsz")

#: 2^x on [-0.5, 0.5], the lowest power first: what is left of the polynomial of least error, 2e-8 relative.
_EXP2 = (1.0, 0.69314718, 0.24022651, 0.05550411, 0.00961812, 0.00133336, 0.00015404)
#: float32 numbers of this size are whole, and these are the bits of this one.
_WHOLE, _WHOLE_BITS = 1.5 * 2.0**23, 0x4B400000


class Code(ir.IRBuilder):
    """Writes the body of one function.

    Args:
        block: where it begins.
        lanes: float32 numbers of a vector.
    """

    def __init__(self, block: ir.Block, lanes: builtins.int):
        super().__init__(block)
        self.lanes = lanes
        self.vector = ir.VectorType(F32, lanes)
        self.ints = ir.VectorType(I32, lanes)

    # --- numbers

    def int(self, value: builtins.int) -> ir.Constant:
        return ir.Constant(I64, value)

    def num(self, value: float) -> ir.Constant:
        """A float32, exactly as numpy would round it."""
        return ir.Constant(F32, struct.unpack("f", struct.pack("f", value))[0])

    def vec(self, value: float) -> ir.Constant:
        return ir.Constant(self.vector, [self.num(value)] * self.lanes)

    def number(self, value: builtins.int) -> ir.Constant:
        """An int32 in all lanes."""
        return ir.Constant(self.ints, [ir.Constant(I32, value)] * self.lanes)

    def lane_numbers(self) -> ir.Constant:
        """0, 1, 2 ... as int32."""
        return ir.Constant(self.ints, [ir.Constant(I32, lane) for lane in range(self.lanes)])

    def calc(self, first: Any, *rest: Any) -> Any:
        """An int64 from left to right: calc(a, "*", b, "+", 3)."""
        value = self._int(first)
        operations = {"+": self.add, "-": self.sub, "*": self.mul, "/": self.udiv, "%": self.urem}
        for sign, operand in zip(rest[::2], rest[1::2], strict=True):
            value = operations[sign](value, self._int(operand))
        return value

    def _int(self, value: Any) -> Any:
        return self.int(value) if isinstance(value, int) else value

    def least(self, a: Any, b: Any) -> Any:
        a, b = self._int(a), self._int(b)
        return self.select(self.icmp_signed("<", a, b), a, b)

    def most(self, a: Any, b: Any) -> Any:
        a, b = self._int(a), self._int(b)
        return self.select(self.icmp_signed(">", a, b), a, b)

    # --- control

    @contextmanager
    def loop(self, begin: Any, end: Any, step: Any = 1) -> Iterator[Any]:
        """`for index in range(begin, end, step)`, of int64."""
        begin, end, step = self._int(begin), self._int(end), self._int(step)
        before = self.block
        test, body, after = (self.append_basic_block(name) for name in ("test", "body", "after"))
        self.branch(test)
        self.position_at_end(test)
        index = self.phi(I64)
        index.add_incoming(begin, before)
        self.cbranch(self.icmp_signed("<", index, end), body, after)
        self.position_at_end(body)
        yield index
        index.add_incoming(self.add(index, step), self.block)
        self.branch(test)
        self.position_at_end(after)

    # --- memory

    def room(self, type_: ir.Type, count: builtins.int = 1) -> Any:
        """Memory of the stack, for the whole function, aligned for vectors."""
        with self.goto_entry_block():
            place = self.alloca(type_, count)
            place.align = 64
        return place

    def scratch(self, size: Any) -> Any:
        """That many bytes of the stack, aligned for vectors."""
        place = self.alloca(I8, size)
        place.align = 64
        place.type = PTR
        return place

    def at(self, base: Any, index: Any, type_: ir.Type = F32) -> Any:
        """The address of element `index` of an array."""
        place = self.gep(base, [self._int(index)], source_etype=type_)
        place.type = PTR  # and no longer of one type: vectors are read from arrays of numbers
        return place

    def get(self, base: Any, index: Any, type_: ir.Type = F32) -> Any:
        """One element; an int32 as int64."""
        value = self.load(self.at(base, index, type_), typ=type_)
        return self.sext(value, I64) if type_ is I32 else value

    def read(self, base: Any, index: Any, dtype: str = "float32") -> Any:
        """A vector of `lanes` numbers from an array of that dtype on, as float32.

        uint8 is read as the bits of float8_e4m3fn, of which NaN is no number of its own: it is read as 480.
        """
        element = ELEMENTS[dtype]
        place = self.at(base, index, element)
        value = self.load(place, typ=ir.VectorType(element, self.lanes), align=1 if element is I8 else 2)
        if dtype == "float32":
            return value
        if dtype == "int8":
            return self.sitofp(self.sext(value, self.ints), self.vector)
        if dtype == "uint8":
            return self._of_float8(value)
        # bfloat16 is the upper half of a float32.
        wide = self.shl(self.zext(value, self.ints), self.number(16))
        return self.bitcast(wide, self.vector)

    def _of_float8(self, value: Any) -> Any:
        """As `kv_cache.floats`: its bits are those of a float16 but for the bias of the exponent, 7 instead of 15."""
        wide = ir.VectorType(I16, self.lanes)
        shift, known = (ir.Constant(wide, [bits] * self.lanes) for bits in (7, 0xBF80 - (1 << 16)))
        bits = self.and_(self.shl(self.sext(value, wide), shift), known)
        half = self.bitcast(bits, ir.VectorType(ir.HalfType(), self.lanes))
        return self.fmul(self.fpext(half, self.vector), self.vec(256.0))

    def write(self, value: Any, base: Any, index: Any, dtype: str = "float32") -> None:
        """Stores a vector; to bfloat16 rounded to nearest, ties to even."""
        if dtype == "float32":
            self.store(value, self.at(base, index), align=2)
            return
        ints = ir.VectorType(I32, value.type.count)
        bits = self.bitcast(value, ints)
        half, one, most = (ir.Constant(ints, [number] * ints.count) for number in (16, 1, 0x7FFF))
        odd = self.and_(self.lshr(bits, half), one)
        rounded = self.lshr(self.add(self.add(bits, most), odd), half)
        # Of some bits that are no number the sum would be one.
        rounded = self.select(
            self.fcmp_unordered("uno", value, value), ir.Constant(ints, [0x7FC0] * ints.count), rounded
        )
        narrow = self.trunc(rounded, ir.VectorType(I16, ints.count))
        self.store(narrow, self.at(base, index, I16), align=2)

    def write_bytes(self, value: Any, base: Any, index: Any) -> None:
        """Stores the lowest byte of each number of a vector of int32."""
        self.store(self.lowest_bytes(value), self.at(base, index, I8), align=1)

    def lowest_bytes(self, value: Any) -> Any:
        """Of each number of a vector of int32."""
        return self.trunc(value, ir.VectorType(I8, self.lanes))

    def unsigned_bytes(self, words: Any) -> Any:
        """Four int8 in each int32, each with 128 added."""
        return self.xor(words, self.number(0x80808080 - (1 << 32)))

    def variable(self, value: Any) -> Any:
        """A variable with a first value, for `load` and `store`; it ends up in a register."""
        place = self.room(value.type)
        self.store(value, place)
        return place

    def prefetch(self, base: Any, index: Any, type_: ir.Type = F32, near: bool = True) -> None:
        """Asks for the cache line of an element that will be read soon, into a core's nearest cache or the next."""
        arguments = [self.at(base, index, type_), *(ir.Constant(I32, number) for number in (0, 3 if near else 2, 1))]
        self._intrinsic("llvm.prefetch.p0", ir.VoidType(), *arguments)

    # --- vectors

    def splat(self, value: Any, lanes: builtins.int | None = None) -> Any:
        """A scalar in all lanes."""
        lanes = lanes or self.lanes
        empty = ir.Constant(ir.VectorType(value.type, lanes), ir.Undefined)
        first = self.insert_element(empty, value, ir.Constant(I32, 0))
        return self.shuffle_vector(first, first, indices([0] * lanes))

    def multiply_add(self, a: Any, b: Any, c: Any) -> Any:
        """a * b + c, rounded once."""
        return self._intrinsic(f"llvm.fma.{self._suffix(a)}", a.type, a, b, c)

    def size_of(self, value: Any) -> Any:
        """|value|."""
        return self._intrinsic(f"llvm.fabs.{self._suffix(value)}", value.type, value)

    def rounded(self, value: Any) -> Any:
        """To the nearest whole number, ties to even."""
        return self._intrinsic(f"llvm.rint.{self._suffix(value)}", value.type, value)

    def pairs_added(self, total: Any, a: Any, b: Any) -> Any:
        """total + the products of pairs of bfloat16, which lie in one lane of float32."""
        name = {16: "512", 8: "256", 4: "128"}[self.lanes]
        return self._intrinsic(f"llvm.x86.avx512bf16.dpbf16ps.{name}", self.vector, total, a, b)

    def bytes_added(self, total: Any, unsigned: Any, signed: Any) -> Any:
        """total + the products of four bytes each, which lie in one lane of int32."""
        name = {16: "512", 8: "256", 4: "128"}[self.lanes]
        return self._intrinsic(f"llvm.x86.avx512.vpdpbusd.{name}", self.ints, total, unsigned, signed)

    def tiles(self, operation: str, *operands: Any) -> None:
        """An operation of AMX; an int is the number of a register."""
        arguments = [ir.Constant(I8, one) if isinstance(one, int) else one for one in operands]
        self._intrinsic(f"llvm.x86.{operation}", ir.VoidType(), *arguments)

    def root(self, value: Any) -> Any:
        """The square root."""
        return self._intrinsic(f"llvm.sqrt.{self._suffix(value)}", value.type, value)

    def larger(self, a: Any, b: Any) -> Any:
        return self.select(self.fcmp_ordered(">", a, b, flags=("nsz",)), a, b)

    def sum_of(self, value: Any) -> Any:
        """All lanes added up."""
        if value.type == self.ints:
            return self._intrinsic(f"llvm.vector.reduce.add.v{self.lanes}i32", I32, value)
        return self._intrinsic(f"llvm.vector.reduce.fadd.v{self.lanes}f32", F32, self.num(-0.0), value)

    def is_any(self, value: Any) -> Any:
        """Whether any number of a vector of int32, of any length, is not zero."""
        bits = self._intrinsic(f"llvm.vector.reduce.or.v{value.type.count}i32", I32, value)
        return self.icmp_unsigned("!=", bits, ir.Constant(I32, 0))

    def largest_of(self, value: Any) -> Any:
        """Of all lanes; NaN may be lost. LLVM's own, which never loses a number for it, goes lane by lane."""
        width = self.lanes
        while width > 1:
            width //= 2
            value = self.larger(*(self.shuffle_vector(value, value, indices(range(k, k + width))) for k in (0, width)))
        return self.extract_element(value, ir.Constant(I32, 0))

    def exp(self, value: Any) -> Any:
        """e^x of numbers up to 87, relative error below 2e-7 + 9e-8 |x|; 0 below -87. Of NaN it is NaN."""
        floor = self.vec(-126.0)
        scaled = self.fmul(value, self.vec(math.log2(math.e)))
        nothing = self.fcmp_ordered("<=", scaled, floor)
        scaled = self.select(nothing, floor, scaled)
        # A sum that has no room for fractions: its lowest bits are the nearest whole number, also of NaN, of which
        # a conversion would be undefined.
        shifted = self.fadd(scaled, self.vec(_WHOLE))
        rest = self.fsub(scaled, self.fsub(shifted, self.vec(_WHOLE)))
        total: Any = self.vec(_EXP2[-1])
        for factor in reversed(_EXP2[:-1]):
            total = self.multiply_add(total, rest, self.vec(factor))
        exponent = self.add(self.bitcast(shifted, self.ints), self.number(127 - _WHOLE_BITS))
        power = self.bitcast(self.shl(exponent, self.number(23)), self.vector)
        return self.select(nothing, self.vec(0.0), self.fmul(total, power))

    def sigmoid(self, value: Any) -> Any:
        """1 / (1 + e^-x), of numbers below -87 as of that."""
        most, opposite = self.vec(87.0), self.fneg(value)
        power = self.exp(self.select(self.fcmp_ordered(">", opposite, most), most, opposite))
        return self.fdiv(self.vec(1.0), self.fadd(self.vec(1.0), power))

    def exp_scalar(self, value: Any) -> Any:
        return self.extract_element(self.exp(self.splat(value)), ir.Constant(I32, 0))

    def exchange(self, a: Any, b: Any, step: builtins.int) -> tuple[Any, Any]:
        """Lanes whose number has the bit `step` go from a to b, their counterparts from b to a."""
        lanes = range(self.lanes)
        keep = [lane - step + self.lanes if lane & step else lane for lane in lanes]
        move = [lane + self.lanes if lane & step else lane + step for lane in lanes]
        return self.shuffle_vector(a, b, indices(keep)), self.shuffle_vector(a, b, indices(move))

    def alternating(self, a: Any, b: Any) -> list[Any]:
        """Of the lanes of a and then b, the even ones, and the odd ones."""
        return [self.shuffle_vector(a, b, indices(range(k, 2 * self.lanes, 2))) for k in range(2)]

    def transposed(self, rows: Sequence[Any]) -> list[Any]:
        """As many vectors as each has lanes, as a matrix, transposed."""
        rows, step = list(rows), 1
        while step < self.lanes:
            for row in range(self.lanes):
                if not row & step:
                    rows[row], rows[row + step] = self.exchange(rows[row], rows[row + step], step)
            step *= 2
        return rows

    def quarters(self, rows: Sequence[Any]) -> Any:
        """The sums of four vectors, of float32 or int32, as a vector of four."""
        width = self.lanes
        for step in (1, 2):  # within each four lanes
            rows = [self._sum(*self._mixed(a, b, step)) for a, b in zip(rows[::2], rows[1::2], strict=True)]
        total = rows[0]
        while width > 4:
            width //= 2
            parts = [self.shuffle_vector(total, total, indices(range(k, k + width))) for k in (0, width)]
            total = self._sum(*parts)
        return total

    def _mixed(self, a: Any, b: Any, size: builtins.int) -> tuple[Any, Any]:
        """The lower and the upper half of each four lanes of a and b, `size` numbers of each in turn."""
        halves = []
        for half in (0, 2):
            places = [four + half + k for four in range(0, self.lanes, 4) for k in range(2)]
            pieces = zip(*(iter(places),) * size, strict=True)
            halves.append([place + other for piece in pieces for other in (0, self.lanes) for place in piece])
        return self.shuffle_vector(a, b, indices(halves[0])), self.shuffle_vector(a, b, indices(halves[1]))

    def _sum(self, a: Any, b: Any) -> Any:
        return self.fadd(a, b) if a.type.element == F32 else self.add(a, b)

    def _suffix(self, value: Any) -> str:
        return "f32" if value.type == F32 else f"v{self.lanes}f32"

    def _intrinsic(self, name: str, returns: ir.Type, *arguments: Any) -> Any:
        module = self.module
        function = module.globals.get(name)
        if function is None:
            function = ir.Function(module, ir.FunctionType(returns, [a.type for a in arguments]), name)
        return self.call(function, arguments, fastmath=FAST if returns in (F32, self.vector) else ())


def indices(lanes: Iterable[int]) -> ir.Constant:
    """Of `shuffle_vector`."""
    constants = [ir.Constant(I32, lane) for lane in lanes]
    return ir.Constant(ir.VectorType(I32, len(constants)), constants)
