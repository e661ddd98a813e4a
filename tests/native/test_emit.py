"""What `emit.Code` writes, compiled and called with arrays of numpy, for vectors of all widths that are here."""

import ctypes
import itertools
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from llvmlite import ir

from ryzanstein_jax import native
from ryzanstein_jax.native.emit import F32, I32, I64, PTR, Code
from tests.native.processors import PROCESSORS, on

NAMES = (f"function_{number}" for number in itertools.count())


@dataclass
class Function:
    """A kernel that XLA never sees: it takes as many pointers as there are arrays."""

    write: Any
    arrays: int

    def add_to(self, module, name, lanes):
        function = ir.Function(module, ir.FunctionType(ir.VoidType(), [PTR] * self.arrays), name)
        code = Code(function.append_basic_block(), lanes)
        self.write(code, *function.args)
        code.ret_void()


def call(lanes, write, *arrays):
    name = next(NAMES)
    with on(lanes):
        address = native._loaded(native._compiled(Function(write, len(arrays)), name), name)
    function = ctypes.CFUNCTYPE(None, *[ctypes.c_void_p] * len(arrays))(address)
    function(*(array.ctypes.data for array in arrays))


def by_vectors(compute, dtype="float32"):
    """Writes `compute` of each vector of an array of 4096 numbers to another."""

    def write(code, source, result):
        with code.loop(0, 4096, code.lanes) as index:
            code.write(compute(code, code.read(source, index)), result, index, dtype)

    return write


@pytest.mark.parametrize("lanes", PROCESSORS)
def test_exp(lanes):
    found = np.empty(4096, np.float32)

    def exp(values):
        source = np.resize(np.asarray(values, np.float32), 4096)
        call(lanes, by_vectors(lambda code, x: code.exp(x)), source, found)
        return source

    x = exp(np.linspace(-87.0, 87.0, 4096))
    wanted = np.exp(x.astype(np.float64))
    assert np.all(np.abs(found - wanted) <= (2e-7 + 9e-8 * np.abs(x)) * wanted)
    x = exp(np.linspace(-0.01, 0.01, 4095))
    np.testing.assert_allclose(found, np.exp(x.astype(np.float64)), rtol=1.5e-7)
    exp([0.0, -0.0])
    assert np.all(found == 1.0)
    exp([-88.0, -1e4, -1e30, -3e38, -np.inf])
    assert not found.any()
    exp([np.nan, -np.nan])
    assert np.isnan(found).all(), "what is no number must be seen"


@pytest.mark.parametrize("lanes", PROCESSORS)
def test_sigmoid(lanes):
    source, found = np.linspace(-87.0, 87.0, 4096).astype(np.float32), np.empty(4096, np.float32)
    call(lanes, by_vectors(lambda code, x: code.sigmoid(x)), source, found)
    wanted = 1 / (1 + np.exp(-source.astype(np.float64)))
    assert np.all(np.abs(found - wanted) <= (4e-7 + 9e-8 * np.abs(source)) * wanted)
    source = np.resize(np.asarray([-88.0, -1e4, -3e38, -np.inf, 88.0, 3e38, np.inf, np.nan], np.float32), 4096)
    call(lanes, by_vectors(lambda code, x: code.sigmoid(x)), source, found)
    assert np.all((found[:4] > 0) & (found[:4] < 1e-37)) and np.all(found[4:7] == 1.0) and np.isnan(found[7])


@pytest.mark.parametrize("lanes", PROCESSORS)
def test_bfloat16_is_rounded_as_elsewhere(lanes):
    rng = np.random.default_rng(0)
    bits = rng.integers(0, 1 << 32, 4096, np.uint64).astype(np.uint32)
    bits[:1024] = bits[:1024] & 0xFFFF0000 | 0x8000  # halfway between two
    bits[1024:1032] = [0x7F800000, 0xFF800000, 0x7F7FFFFF, 0, 0x80000000, 1, 0x7FFFFFFF, 0xFFFFFFFF]
    source, found = bits.view(np.float32), np.empty(4096, ml_dtypes.bfloat16)
    call(lanes, by_vectors(lambda code, x: x, "bfloat16"), source, found)
    with np.errstate(over="ignore", invalid="ignore"):
        np.testing.assert_array_equal(found.astype(np.float32), source.astype(ml_dtypes.bfloat16).astype(np.float32))
    assert np.isnan(source).any() and np.isinf(found.astype(np.float32)).sum() >= 3


@pytest.mark.parametrize("lanes", PROCESSORS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8", "uint8"])
def test_reading_widens(lanes, dtype):
    numbers = np.arange(-128, 128).astype(np.int8)
    # Of 8 bits all that there are.
    source = numbers.view(dtype) if np.dtype(dtype).itemsize == 1 else numbers.astype(dtype)
    # One off the beginning: nothing may depend on alignment beyond that of a number.
    found = np.empty(257, np.float32)[1:]

    def write(code, source, result):
        with code.loop(0, 256, code.lanes) as index:
            code.write(code.read(source, index, dtype), result, index)

    call(lanes, write, source, found)
    wanted = (source.view(ml_dtypes.float8_e4m3fn) if dtype == "uint8" else source).astype(np.float32)
    np.testing.assert_array_equal(found, np.where(np.isnan(wanted), np.copysign(480, wanted), wanted))


@pytest.mark.parametrize("lanes", PROCESSORS)
def test_vectors(lanes):
    rng = np.random.default_rng(lanes)
    source = rng.integers(-50, 50, (lanes, lanes)).astype(np.float32)
    matrix, sums, totals, largest = (np.empty(shape, np.float32) for shape in ((lanes, lanes), lanes, lanes, lanes))

    def write(code, source, matrix, sums, totals, largest):
        rows = [code.read(source, lanes * row) for row in range(lanes)]
        for row, column in enumerate(code.transposed(rows)):
            code.write(column, matrix, lanes * row)
        for four in range(0, lanes, 4):
            code.store(code.quarters(rows[four : four + 4]), code.at(sums, four), align=4)
        for row, value in enumerate(rows):
            code.store(code.sum_of(value), code.at(totals, row, F32))
            code.store(code.largest_of(value), code.at(largest, row, F32))

    call(lanes, write, source, matrix, sums, totals, largest)
    np.testing.assert_array_equal(matrix, source.T)
    np.testing.assert_array_equal(sums, source.sum(axis=1))
    np.testing.assert_array_equal(totals, source.sum(axis=1))
    np.testing.assert_array_equal(largest, source.max(axis=1))


@pytest.mark.parametrize("lanes", PROCESSORS)
def test_numbers_of_int32(lanes):
    rows = np.random.default_rng(lanes).integers(-(2**30), 2**30, (4, lanes), dtype=np.int32)
    rows[2], rows[3] = 0, [0] * (lanes - 1) + [1 << 31 - 2]
    sums, total, is_any, low = (
        np.empty(4, np.int32),
        np.empty(1, np.int32),
        np.empty(4, np.int32),
        np.empty(lanes, np.int8),
    )

    def write(code, source, sums, total, is_any, low):
        read = [code.load(code.at(source, lanes * row, I32), typ=code.ints, align=4) for row in range(4)]
        code.store(code.quarters(read), code.at(sums, 0, I32), align=4)
        code.store(code.sum_of(read[0]), code.at(total, 0, I32))
        for row, value in enumerate(read):
            code.store(code.zext(code.is_any(value), I32), code.at(is_any, row, I32))
        code.write_bytes(read[1], low, 0)

    call(lanes, write, rows, sums, total, is_any, low)
    np.testing.assert_array_equal(sums, rows.sum(axis=1, dtype=np.int32))
    assert total == rows[0].sum(dtype=np.int32) and list(is_any) == [1, 1, 0, 1]
    np.testing.assert_array_equal(low, rows[1].astype(np.int8))


@pytest.mark.parametrize("lanes", list(PROCESSORS)[:1])
@pytest.mark.parametrize(
    "bounds", [(0, 0, 1), (0, 5, 1), (3, 3, 2), (3, 4, 2), (0, 9, 4), (0, 8, 4), (5, 2, 1), (-3, 3, 3)]
)
def test_a_loop_is_a_range(lanes, bounds):
    found = np.full(17, -99, np.int64)

    def write(code, given, result):
        begin, end, step = (code.get(given, number, I64) for number in range(3))
        count = code.room(I64)
        code.store(code.int(0), count)
        with code.loop(begin, end, step) as index:
            code.store(index, code.at(result, code.load(count, typ=I64), I64))
            code.store(code.calc(code.load(count, typ=I64), "+", 1), count)

    call(lanes, write, np.array(bounds, np.int64), found)
    wanted = list(range(*bounds))
    assert found[: len(wanted)].tolist() == wanted and np.all(found[len(wanted) :] == -99)


@pytest.mark.parametrize("lanes", list(PROCESSORS)[:1])
def test_whole_numbers(lanes):
    given, found = np.array([7, -7, 3_000_000_000_000], np.int64), np.empty(5, np.int64)

    def write(code, given, result):
        a, b, c = (code.get(given, number, I64) for number in range(3))
        results = [
            code.calc(a, "*", 3, "+", 1, "/", 4),
            code.least(a, b),
            code.most(b, 2),
            code.calc(c, "%", 1_000_003),
        ]
        for number, value in enumerate([*results, code.calc(c, "*", c, "-", 1)]):
            code.store(value, code.at(result, number, I64))

    call(lanes, write, given, found)
    c = 3_000_000_000_000
    wrapped = (c * c - 1 + (1 << 63)) % (1 << 64) - (1 << 63)
    assert found.tolist() == [5, -7, 2, c % 1_000_003, wrapped]
