"""Counters, histograms and spans of one engine: thread-safe, bounded, without a dependency."""

from __future__ import annotations

import math
import threading
import time
from bisect import bisect_left
from collections.abc import Sequence
from itertools import accumulate
from typing import TypedDict

from ryzanstein_jax.errors import ConfigError

#: Upper bounds, in seconds, of a histogram's buckets: 1-2-5 steps from 1 microsecond to 500 seconds.
SECONDS_BUCKETS = tuple(mantissa * 10.0**exponent for exponent in range(-6, 3) for mantissa in (1, 2, 5))


class HistogramSnapshot(TypedDict):
    """One histogram at one moment. `min`, `max` and the percentiles are 0 while `count` is.

    A percentile is the upper bound of the bucket that holds it, and never outside `min` to `max`.
    `buckets` are (upper bound, values at most that large) pairs, cumulative; infinity is the last bound.
    """

    count: int
    sum: float
    min: float
    max: float
    p50: float
    p99: float
    buckets: list[tuple[float, int]]


class MetricsSnapshot(TypedDict):
    """All numbers of one `Metrics` at one moment, by name."""

    counters: dict[str, int]
    histograms: dict[str, HistogramSnapshot]


class _Histogram:
    """Counts per bucket; the caller holds the lock."""

    def __init__(self, bounds: Sequence[float]):
        self.bounds = tuple(bounds)
        self.counts = [0] * (len(self.bounds) + 1)
        self.total, self.smallest, self.largest = 0.0, math.inf, -math.inf

    def add(self, value: float) -> None:
        self.counts[bisect_left(self.bounds, value)] += 1
        self.total += value
        self.smallest, self.largest = min(self.smallest, value), max(self.largest, value)

    def snapshot(self) -> HistogramSnapshot:
        buckets = list(zip((*self.bounds, math.inf), accumulate(self.counts), strict=True))
        total_count = buckets[-1][1]

        def percentile(share: float) -> float:
            if not total_count:
                return 0.0
            bound = next(bound for bound, reached in buckets if reached >= share * total_count)
            return min(max(bound, self.smallest), self.largest)

        return HistogramSnapshot(
            count=total_count,
            sum=self.total,
            min=self.smallest if total_count else 0.0,
            max=self.largest if total_count else 0.0,
            p50=percentile(0.50),
            p99=percentile(0.99),
            buckets=buckets,
        )


class Span:
    """Times a `with` block into a histogram of seconds, also when the block raises."""

    __slots__ = ("_metrics", "_name", "_started", "seconds")

    def __init__(self, metrics: Metrics, name: str):
        self._metrics, self._name, self.seconds = metrics, name, 0.0

    def __enter__(self) -> Span:
        self._started = time.perf_counter()
        return self

    def __exit__(self, *exception: object) -> None:
        self.seconds = time.perf_counter() - self._started
        self._metrics.observe(self._name, self.seconds)


class Metrics:
    """The numbers of one engine. Names come from the code, never from a request, so they are few."""

    def __init__(self) -> None:
        # One lock for all: every critical section is well under a microsecond.
        self._lock = threading.Lock()
        self._counters: dict[str, int] = {}
        self._histograms: dict[str, _Histogram] = {}

    def count(self, name: str, amount: int = 1) -> None:
        """Adds `amount`, 0 or more, to a counter.

        Raises:
            ConfigError: the amount is negative: counters only grow.
        """
        if amount < 0:
            raise ConfigError(name, amount, "a counter only grows; add 0 or more")
        with self._lock:
            self._counters[name] = self._counters.get(name, 0) + amount

    def counter(self, name: str) -> int:
        """What a counter has reached; 0 if nothing was added yet."""
        with self._lock:
            return self._counters.get(name, 0)

    def declare_histogram(self, name: str, bounds: Sequence[float]) -> None:
        """Gives a histogram its own ascending bucket bounds; one that exists keeps those it has."""
        if not bounds or any(not low < high for low, high in zip(bounds, [*bounds[1:], math.inf], strict=True)):
            raise ConfigError(name, tuple(bounds), "give finite bucket bounds in ascending order")
        with self._lock:
            self._histograms.setdefault(name, _Histogram(bounds))

    def observe(self, name: str, value: float) -> None:
        """Adds a value to a histogram, of `SECONDS_BUCKETS` unless declared otherwise.

        Raises:
            ConfigError: the value is not finite, and would spoil the sum for good.
        """
        if not math.isfinite(value):
            raise ConfigError(name, value, "observe finite numbers only")
        with self._lock:
            histogram = self._histograms.get(name)
            if histogram is None:
                histogram = self._histograms[name] = _Histogram(SECONDS_BUCKETS)
            histogram.add(value)

    def span(self, name: str) -> Span:
        """A context manager that observes how many seconds its block took; its `seconds` says so too."""
        return Span(self, name)

    def snapshot(self) -> MetricsSnapshot:
        """All counters and histograms of one moment; later changes do not show in it."""
        with self._lock:
            histograms = {name: histogram.snapshot() for name, histogram in self._histograms.items()}
            return MetricsSnapshot(counters=dict(self._counters), histograms=histograms)
