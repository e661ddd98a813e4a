"""Collectives over eight CPU devices of this process: their results are compared, and a wrong one is noticed."""

import jax
import numpy as np
import pytest
from jax.sharding import Mesh

from ryzanstein_jax.collectives import bus_factor
from ryzanstein_jax.collectives.bandwidth import OPERATIONS
from ryzanstein_jax.collectives.measure import WrongSumError, _Measurement, measure
from tests.support import quick_compiles


def test_every_collective_is_timed_and_all_its_values_are_checked():
    with quick_compiles():
        points = list(measure([(operation, 3000) for operation in OPERATIONS], "float32", 1e-4))
    assert [point.operation for point in points] == list(OPERATIONS)
    for point in points:
        width = 3000 // (8 * 4)
        assert point.bytes == 8 * width * 4
        whole = 8 * 8 * width
        assert point.values_checked == whole + (whole // 8 if point.operation == "reduce-scatter" else whole)
        assert 0 < point.call_seconds <= point.call_p99_seconds
        assert point.repeats >= 1
        assert point.algorithm_bandwidth == pytest.approx(point.bytes / point.seconds)
        assert point.bus_bandwidth == pytest.approx(point.algorithm_bandwidth * bus_factor(point.operation, 8))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_sums_stay_in_the_range_of_small_types(dtype):
    with quick_compiles():
        (point,) = measure([("all-reduce", 256)], dtype, 1e-4)
    assert point.values_checked == 2 * 8 * 128


def measurement(operation: str) -> _Measurement:
    return _Measurement(Mesh(np.array(jax.devices()), ("devices",)), operation, 4096, np.dtype("float32"))


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("whole", [False, True])
def test_one_wrong_value_is_found(operation, whole):
    made = measurement(operation)
    repeats = 5 if whole else 1
    with quick_compiles():
        program = made._program(repeats, whole=whole)
        assert made._check(program, repeats, whole=whole) > 0

        def slip(buffer):
            result = program(buffer)
            return result.at[7, -1, -1].add(1.0 if result.dtype.kind == "f" and not whole else result[7, -1, -1])

        with pytest.raises(WrongSumError, match=f"{operation} of 4096 bytes"):
            made._check(slip, repeats, whole=whole)


def test_a_loop_that_forgets_a_repetition_is_found():
    for operation in ("all-reduce", "reduce-scatter", "send-recv", "all-to-all"):
        made = measurement(operation)
        with quick_compiles(), pytest.raises(WrongSumError):
            made._check(made._program(4, whole=True), 5, whole=True)
