"""What the engine counts, read when Prometheus asks: nothing is kept twice."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from ryzanstein_jax.metrics import SECONDS_BUCKETS, HistogramSnapshot, MetricsSnapshot
from ryzanstein_jax.server.backend import ReplicaView
from ryzanstein_jax.server.health import Health, Status
from ryzanstein_jax.server.instruments import PREFIX

#: Counters that dashboards go by, which are there before anything was counted. Others follow as they come.
_COUNTERS = {
    "compiles": "Programs compiled.",
    "restarts": "Times that worker processes were replaced.",
    "faults": "Faults of worker processes and devices.",
    "requests_replayed": "Requests that went on after a recovery.",
    "requests_moved": "Requests that went on on another replica.",
}
#: The two executors measure waiting for a step's result under names of their own.
_STEP = ("step_wait_seconds", "step_fetch_seconds")
_NO_VALUES = HistogramSnapshot(
    count=0, sum=0.0, min=0.0, max=0.0, p50=0.0, p99=0.0, buckets=[(b, 0) for b in (*SECONDS_BUCKETS, float("inf"))]
)


class EngineCollector(Collector):
    """Metrics of the engine behind a `Health`; before it has started, those of the server's state only."""

    def __init__(self, health: Health, version: str):
        self._health, self._version = health, version

    def collect(self) -> Iterator[Metric]:
        health, backend = self._health, self._health.backend
        info = GaugeMetricFamily(f"{PREFIX}_build_info", "Always 1.", labels=["version"])
        info.add_metric([self._version], 1)
        yield info
        now = health.status
        status = GaugeMetricFamily(f"{PREFIX}_status", "1 for what the server can do now.", labels=["status"])
        for one in Status:
            status.add_metric([one.value], float(one is now))
        yield status
        age = "Seconds since the engine's last step; near 0 while idle."
        yield GaugeMetricFamily(f"{PREFIX}_last_progress_age_seconds", age, health.progress_age if backend else 0.0)
        if backend is None:
            yield from _of_snapshot(MetricsSnapshot(counters={}, histograms={}))
            return
        yield from _of_replicas(backend.replicas)
        yield from _of_leader(backend.replicas)


def _of_replicas(replicas: Sequence[ReplicaView]) -> Iterator[Metric]:
    """Of each; where there are several, told apart by a label."""
    if len(replicas) == 1:
        yield from _of_replica(replicas[0])
        return
    found: dict[str, Metric] = {}
    for number, replica in enumerate(replicas):
        for family in _of_replica(replica):
            whole = found.setdefault(family.name, Metric(family.name, family.documentation, family.type))
            for sample in family.samples:
                whole.samples.append(sample._replace(labels={**sample.labels, "replica": str(number)}))
    yield from found.values()


def _of_replica(replica: ReplicaView) -> Iterator[Metric]:
    yield from _of_snapshot(replica.metrics.snapshot())
    yield from _of_scheduler(replica)
    yield from _of_devices(replica)


def _of_snapshot(snapshot: MetricsSnapshot) -> Iterator[Metric]:
    counters, histograms = snapshot["counters"], dict(snapshot["histograms"])
    for name, text in _COUNTERS.items():
        yield CounterMetricFamily(f"{PREFIX}_{name}", text, counters.get(name, 0))
    step = next((histograms.pop(name) for name in _STEP if name in histograms), _NO_VALUES)
    yield _histogram("step_seconds", "Time waited for the result of a step.", step)
    recovery = histograms.pop("recovery_seconds", _NO_VALUES)
    yield _histogram("recovery_seconds", "From a fault to the next token.", recovery)
    for name, histogram in histograms.items():
        yield _histogram(f"engine_{name}", "A span of the engine.", histogram)
    for name, count in counters.items():
        if name not in _COUNTERS:
            yield CounterMetricFamily(f"{PREFIX}_engine_{name}", "A counter of the engine.", count)


def _of_scheduler(replica: ReplicaView) -> Iterator[Metric]:
    stats = replica.stats()
    sequences = GaugeMetricFamily(f"{PREFIX}_sequences", "Sequences in the scheduler, by state.", labels=["state"])
    sequences.add_metric(["running"], stats.num_running)
    sequences.add_metric(["waiting"], stats.num_waiting)
    yield sequences
    pages = GaugeMetricFamily(f"{PREFIX}_kv_pages", "Pages of the KV cache, by state.", labels=["state"])
    pages.add_metric(["used"], stats.num_pages_used)
    pages.add_metric(["idle"], stats.num_pages_idle)
    pages.add_metric(["free"], stats.num_pages - stats.num_pages_used - stats.num_pages_idle)
    yield pages
    yield CounterMetricFamily(f"{PREFIX}_steps", "Steps scheduled.", stats.num_steps)
    yield CounterMetricFamily(f"{PREFIX}_preemptions", "Sequences that lost their pages.", stats.num_preemptions)
    queries = "Tokens looked for in the prefix cache."
    yield CounterMetricFamily(f"{PREFIX}_prefix_cache_queries", queries, stats.num_prefix_queries)
    yield CounterMetricFamily(f"{PREFIX}_prefix_cache_hits", "Tokens found there.", stats.num_prefix_hits)
    orchestrator = replica.orchestrator
    if orchestrator is not None:
        width = orchestrator.width if str(orchestrator.state) in ("ready", "degraded") else 0
        yield GaugeMetricFamily(f"{PREFIX}_devices", "Devices that serve.", width)


def _of_devices(replica: ReplicaView) -> Iterator[Metric]:
    """What each rank uses, and how the memory of one is divided."""
    memory = GaugeMetricFamily(f"{PREFIX}_device_memory_bytes", "In use on the device of a rank.", labels=["rank"])
    text = "Results of collectives that a rank received, since its process began."
    moved = CounterMetricFamily(f"{PREFIX}_collective_bytes", text, labels=["rank"])
    for rank in replica.usage():
        if rank.memory_bytes is not None:
            memory.add_metric([str(rank.rank)], rank.memory_bytes)
        moved.add_metric([str(rank.rank)], rank.collective_bytes)
    yield memory
    yield moved
    text = "Of each device, as computed at the start."
    plan = GaugeMetricFamily(f"{PREFIX}_memory_plan_bytes", text, labels=["part"])
    for part in ("total", "budget", "weights", "temporaries", "logits", "kv_cache"):
        plan.add_metric([part], getattr(replica.report.memory, part))
    yield plan


def _of_leader(replicas: Sequence[ReplicaView]) -> Iterator[Metric]:
    text = "Processor time of the event loop and of the engines' threads: over tokens, what a token costs the leader."
    seconds = CounterMetricFamily(f"{PREFIX}_leader_cpu_seconds", text, labels=["thread"])
    seconds.add_metric(["server"], time.thread_time())  # Prometheus is answered by the event loop
    seconds.add_metric(["engine"], sum(replica.cpu_seconds() for replica in replicas))
    yield seconds


def _histogram(name: str, text: str, found: HistogramSnapshot) -> Metric:
    buckets = [("+Inf" if bound == float("inf") else f"{bound:g}", count) for bound, count in found["buckets"]]
    return HistogramMetricFamily(f"{PREFIX}_{name}", text, buckets=buckets, sum_value=found["sum"])
