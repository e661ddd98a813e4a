"""Counters, histograms and spans."""

import json
import math
import threading
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ryzanstein_jax.errors import ConfigError
from ryzanstein_jax.metrics import SECONDS_BUCKETS, Metrics


def test_a_counter_adds_up_and_starts_at_zero() -> None:
    metrics = Metrics()
    assert metrics.counter("steps") == 0
    metrics.count("steps")
    metrics.count("steps", 4)
    metrics.count("steps", 0)
    assert metrics.counter("steps") == 5
    assert metrics.snapshot()["counters"] == {"steps": 5}


def test_a_counter_never_falls() -> None:
    metrics = Metrics()
    metrics.count("steps", 2)
    with pytest.raises(ConfigError, match="steps=-1"):
        metrics.count("steps", -1)
    assert metrics.counter("steps") == 2


@given(st.lists(st.floats(1e-7, 1e4), min_size=1, max_size=60))
def test_a_histogram_agrees_with_the_values(values: list[float]) -> None:
    metrics = Metrics()
    for value in values:
        metrics.observe("seconds", value)
    found = metrics.snapshot()["histograms"]["seconds"]
    assert found["count"] == len(values)
    assert found["sum"] == pytest.approx(math.fsum(values))
    assert (found["min"], found["max"]) == (min(values), max(values))
    for bound, count in found["buckets"]:
        assert count == sum(value <= bound for value in values)
    assert found["buckets"][-1] == (math.inf, len(values))
    # A percentile is at least the true one and no further off than its bucket is wide.
    for name, share in (("p50", 0.5), ("p99", 0.99)):
        true = sorted(values)[math.ceil(share * len(values)) - 1]
        shown = found[name]
        bucket = next((bound for bound in SECONDS_BUCKETS if bound >= true), math.inf)
        assert true <= shown <= min(bucket, max(values))


def test_a_histogram_takes_its_own_bounds_once() -> None:
    metrics = Metrics()
    metrics.declare_histogram("batch_size", (1, 2, 4))
    assert metrics.snapshot()["histograms"]["batch_size"]["count"] == 0
    assert metrics.snapshot()["histograms"]["batch_size"]["p99"] == 0.0
    for value in (1, 3, 9):
        metrics.observe("batch_size", value)
    metrics.declare_histogram("batch_size", (8,))
    assert metrics.snapshot()["histograms"]["batch_size"]["buckets"] == [(1, 1), (2, 1), (4, 2), (math.inf, 3)]


@pytest.mark.parametrize("bounds", [(), (2, 1), (1, 1), (1, math.inf), (math.nan,)])
def test_bounds_that_are_no_ladder_are_refused(bounds: tuple[float, ...]) -> None:
    with pytest.raises(ConfigError, match="ascending"):
        Metrics().declare_histogram("seconds", bounds)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_value_that_would_spoil_the_sum_is_refused(value: float) -> None:
    metrics = Metrics()
    with pytest.raises(ConfigError, match="finite"):
        metrics.observe("seconds", value)
    assert metrics.snapshot()["histograms"] == {}


def test_a_span_times_its_block_even_when_it_raises() -> None:
    metrics = Metrics()
    with metrics.span("decode") as span:
        time.sleep(0.01)
    assert 0.01 <= span.seconds < 5
    with pytest.raises(KeyError), metrics.span("decode"):
        raise KeyError
    found = metrics.snapshot()["histograms"]["decode"]
    assert found["count"] == 2
    assert found["max"] == span.seconds


def test_spans_of_one_name_may_nest() -> None:
    metrics = Metrics()
    with metrics.span("step") as outer, metrics.span("step") as inner:
        pass
    assert outer.seconds >= inner.seconds
    assert metrics.snapshot()["histograms"]["step"]["count"] == 2


def test_a_snapshot_stands_still_and_is_plain_data() -> None:
    metrics = Metrics()
    metrics.count("tokens", 3)
    metrics.observe("seconds", 0.25)
    before = metrics.snapshot()
    metrics.count("tokens")
    metrics.observe("seconds", 0.5)
    assert before["counters"] == {"tokens": 3}
    assert before["histograms"]["seconds"]["count"] == 1
    assert json.loads(json.dumps(before))["counters"] == {"tokens": 3}


def test_no_update_is_lost_between_threads() -> None:
    metrics = Metrics()

    def work() -> None:
        for _ in range(2000):
            metrics.count("tokens", 2)
            metrics.observe("seconds", 0.5)

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert metrics.counter("tokens") == 8 * 2000 * 2
    found = metrics.snapshot()["histograms"]["seconds"]
    assert (found["count"], found["sum"]) == (16000, 8000.0)
