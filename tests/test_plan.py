"""The bytes of plans and results: they come back as they went, and no bytes do harm."""

import hashlib
import struct
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ryzanstein_jax import plan as plan_module
from ryzanstein_jax.plan import BIAS, ROW, PlanFormatError, StepPlan, StepResult

PLAN_ARRAYS = ("token_ids", "positions", "query_lens", "page_tables", "rows", "bias", "mask", "pools")
RESULT_ARRAYS = ("tokens", "logprobs", "ranks", "top_tokens", "top_logprobs", "pooled")
HEADER = struct.Struct("<4sHHQqqqqqqqqq")


def filled(rng: np.random.Generator, dtype: Any, shape: tuple[int, ...]) -> np.ndarray:
    """An array of arbitrary bytes, NaNs of any payload among them."""
    dtype = np.dtype(dtype)
    return np.frombuffer(rng.bytes(int(np.prod(shape)) * dtype.itemsize), dtype).reshape(shape)


@st.composite
def plans(draw: st.DrawFn) -> StepPlan:
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    decodes, prefills = draw(st.integers(0, 4)), draw(st.integers(0, 3))
    tokens = decodes + draw(st.integers(0, 9))
    rows = draw(st.integers(0, 5))
    words = draw(st.integers(1, 4)) if rows and draw(st.booleans()) else 0
    return StepPlan(
        step=draw(st.integers(0, 2**64 - 1)),
        num_decodes=decodes,
        token_ids=filled(rng, "<i4", (tokens,)),
        positions=filled(rng, "<i4", (tokens,)),
        query_lens=filled(rng, "<i4", (decodes + prefills,)),
        page_tables=filled(rng, "<i4", (decodes + prefills, draw(st.integers(0, 5)))),
        rows=filled(rng, ROW, (rows,)),
        full=draw(st.booleans()),
        num_logprobs=draw(st.integers(-1, 20)),
        bias=filled(rng, BIAS, (draw(st.integers(0, 3)),)),
        mask=filled(rng, "<u4", (rows if words else 0, words)),
        pools=filled(rng, "<i4", (draw(st.integers(0, 3)), 2)),
    )


@st.composite
def results(draw: st.DrawFn) -> StepResult:
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    rows = draw(st.integers(0, 5))
    scored = rows if draw(st.booleans()) else 0
    top = (rows, draw(st.integers(1, 4))) if rows and draw(st.booleans()) else (0, 0)
    pooled = (draw(st.integers(1, 3)), draw(st.integers(1, 5))) if draw(st.booleans()) else (0, 0)
    return StepResult(
        step=draw(st.integers(0, 2**64 - 1)),
        tokens=filled(rng, "<i4", (rows,)),
        logprobs=filled(rng, "<f4", (scored,)),
        ranks=filled(rng, "<i4", (scored,)),
        top_tokens=filled(rng, "<i4", top),
        top_logprobs=filled(rng, "<f4", top),
        pooled=filled(rng, "<f4", pooled),
    )


def assert_same(found: Any, wanted: Any, arrays: tuple[str, ...]) -> None:
    for name in arrays:
        one, other = getattr(found, name), getattr(wanted, name)
        assert (one.shape, one.dtype) == (other.shape, other.dtype), name
        assert one.tobytes() == other.tobytes(), name


@given(plans())
def test_a_plan_comes_back_as_it_went(plan: StepPlan) -> None:
    data = plan.to_bytes()
    for view in (data, memoryview(data), bytearray(data)):
        found = StepPlan.from_bytes(view)
        assert (found.step, found.num_decodes, found.full, found.num_logprobs) == (
            plan.step,
            plan.num_decodes,
            plan.full,
            plan.num_logprobs,
        )
        assert found.num_prefills == len(plan.query_lens) - plan.num_decodes
        assert found.num_prefill_tokens == len(plan.token_ids) - plan.num_decodes
        assert_same(found, plan, PLAN_ARRAYS)
    assert found.to_bytes() == data


@given(results())
def test_a_result_comes_back_as_it_went(result: StepResult) -> None:
    data = result.to_bytes()
    found = StepResult.from_bytes(data)
    assert found.step == result.step
    assert_same(found, result, RESULT_ARRAYS)
    assert found.to_bytes() == data


def test_the_shortest_plan_and_result_have_their_defaults() -> None:
    none = np.zeros(0, np.int32)
    plan = StepPlan(0, 0, none, none, none, np.zeros((0, 0), np.int32), np.zeros(0, ROW))
    found = StepPlan.from_bytes(plan.to_bytes())
    assert (found.full, found.num_logprobs, found.bias.dtype, found.mask.shape) == (False, -1, BIAS, (0, 0))
    assert len(plan.to_bytes()) == HEADER.size
    assert StepResult.from_bytes(StepResult(7, none).to_bytes()).top_tokens.shape == (0, 0)


def test_the_layout_only_changes_with_its_version() -> None:
    """A rank of another release must refuse a plan, not misread it: new layout, new _VERSION, new digest here."""
    rows = np.zeros(2, ROW)
    for place, name in enumerate(ROW.names or ()):
        rows[name] = place + 1
    plan = StepPlan(
        step=3,
        num_decodes=1,
        token_ids=np.array([-1, 5, 6], np.int32),
        positions=np.array([9, 0, 1], np.int32),
        query_lens=np.array([1, 2], np.int32),
        page_tables=np.array([[1, 2], [3, 0]], np.int32),
        rows=rows,
        full=True,
        num_logprobs=2,
        bias=np.array([(0, 7, -1.5)], BIAS),
        mask=np.array([[1], [2]], np.uint32),
        pools=np.array([[1, 2]], np.int32),
    )
    one = np.ones(2)
    result = StepResult(
        3, one.astype("i4"), one.astype("f4"), one.astype("i4"), np.ones((2, 1), "i4"), np.ones((2, 1), "f4"),
        np.full((1, 3), 0.5, "f4"),
    )  # fmt: skip
    assert plan_module._VERSION == 2
    assert ROW.itemsize == 56
    digest = hashlib.sha256(plan.to_bytes() + result.to_bytes()).hexdigest()
    assert digest == "a790f877e5f9efcfb0048af904254606f528402673d763d3c728d15317d16b44"


EITHER = pytest.mark.parametrize("kind", [StepPlan, StepResult])


def example(kind: type) -> bytes:
    """Bytes of a plan or result with every array in it."""
    if kind is StepResult:
        floats, ints = np.ones((2, 3), np.float32), np.ones((2, 3), np.int32)
        return StepResult(1, ints[:, 0], floats[:, 0], ints[:, 0], ints, floats, floats).to_bytes()
    ints = np.arange(1, 7, dtype=np.int32)
    return StepPlan(
        1, 2, ints, ints, ints[:3], np.ones((3, 2), np.int32), np.ones(2, ROW), True, 1, np.ones(1, BIAS),
        np.ones((2, 3), np.uint32), ints[:4].reshape(2, 2),
    ).to_bytes()  # fmt: skip


@EITHER
def test_every_truncation_is_refused(kind: Any) -> None:
    data = example(kind)
    kind.from_bytes(data)
    for length in range(len(data)):
        with pytest.raises(PlanFormatError):
            kind.from_bytes(data[:length])


@EITHER
@given(tail=st.binary(min_size=1, max_size=64))
def test_bytes_left_over_are_refused(kind: Any, tail: bytes) -> None:
    with pytest.raises(PlanFormatError, match="left over"):
        kind.from_bytes(example(kind) + tail)


@EITHER
@given(data=st.binary(max_size=400))
def test_noise_is_refused(kind: Any, data: bytes) -> None:
    with pytest.raises(PlanFormatError):
        kind.from_bytes(data)


def test_plans_and_results_are_not_mistaken_for_each_other() -> None:
    with pytest.raises(PlanFormatError, match="not a step result"):
        StepResult.from_bytes(example(StepPlan))
    with pytest.raises(PlanFormatError, match="not a step plan"):
        StepPlan.from_bytes(example(StepResult))


@EITHER
def test_another_version_is_refused(kind: Any) -> None:
    data = bytearray(example(kind))
    data[4] += 1
    with pytest.raises(PlanFormatError, match="version 2"):
        kind.from_bytes(data)


NASTY = st.sampled_from([-(2**63), -2, -1, 0, 1, 2, 3, 6, 255, 2**31, 2**32, 2**61, 2**62, 2**63 - 1])


@EITHER
@given(flag=st.integers(0, 2**16 - 1), counts=st.lists(NASTY, min_size=9, max_size=9))
def test_a_hostile_header_costs_nothing_and_is_refused(kind: Any, flag: int, counts: list[int]) -> None:
    """Counts that multiply to more than memory, or to nothing, must end in the typed error and in no other."""
    magic = b"RYZP" if kind is StepPlan else b"RYZR"
    data = HEADER.pack(magic, 2, flag, 0, *counts) + example(kind)[HEADER.size :]
    try:
        found = kind.from_bytes(data)
    except PlanFormatError:
        return
    total = sum(getattr(found, name).nbytes for name in (PLAN_ARRAYS if kind is StepPlan else RESULT_ARRAYS))
    assert total + HEADER.size == len(data)


@pytest.mark.parametrize(
    ("kind", "counts"),
    [
        (StepPlan, (0, -1, 0, 0, 2**62, 0, 0, 0, 0)),  # page tables of no sequence
        (StepPlan, (0, -1, 0, 0, 0, 0, 0, 2**62, 0)),  # a mask of no row
        (StepPlan, (1, -1, 0, 1, 0, 0, 0, 0, 0)),  # a decode without its token
        (StepPlan, (1, -1, 1, 0, 0, 0, 0, 0, 0)),  # a decode without its sequence
        (StepPlan, (0, -2, 0, 0, 0, 0, 0, 0, 0)),
        (StepPlan, (0, -1, 0, 0, 0, 0, 0, 0, -1)),
        (StepResult, (0, 2**62, 0, 0, 0, 0, 0, 0, 0)),  # alternatives of no row
        (StepResult, (0, 0, 0, 2**62, 0, 0, 0, 0, 0)),  # hidden states of no pool
        (StepResult, (-1, 0, 0, 0, 0, 0, 0, 0, 0)),
    ],
)
def test_impossible_counts_with_no_arrays_are_refused(kind: Any, counts: tuple[int, ...]) -> None:
    magic = b"RYZP" if kind is StepPlan else b"RYZR"
    with pytest.raises(PlanFormatError):
        kind.from_bytes(HEADER.pack(magic, 2, 0, 0, *counts))


@EITHER
@given(place=st.integers(0, 10**6), value=st.integers(0, 255))
def test_one_wrong_byte_never_raises_anything_else(kind: Any, place: int, value: int) -> None:
    data = bytearray(example(kind))
    data[place % len(data)] = value
    try:
        kind.from_bytes(data)
    except PlanFormatError:
        pass


@EITHER
def test_too_many_bytes_are_refused_before_they_are_read(kind: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    data = example(kind)
    monkeypatch.setattr(plan_module, "MAX_PLAN_BYTES", len(data) - 1)
    with pytest.raises(PlanFormatError, match="over the limit"):
        kind.from_bytes(data)
