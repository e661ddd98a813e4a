"""What the server, its engine and its devices do now, as plain values: for the page, and for people with curl."""

from __future__ import annotations

import time
from collections import deque
from datetime import UTC, datetime
from typing import Any

from prometheus_client import Counter, Gauge

from ryzanstein_jax.server.backend import Backend
from ryzanstein_jax.server.health import ALIVE, Status
from ryzanstein_jax.server.service import Service

_MOST_EVENTS = 60
#: What happens to the server itself, beside what its orchestrator tells.
_TEXT = {
    Status.STARTING: "the model is being loaded",
    Status.READY: "the server answers",
    Status.DEGRADED: "the server answers, on less than was configured",
    Status.RECOVERING: "devices were lost; requests wait",
    Status.STALLED: "requests run and no step is made",
    Status.DRAINING: "the server ends; it takes no new requests",
    Status.FAILED: "the engine has failed",
}


class StatusReport:
    """Looks at a service whenever it is asked to."""

    def __init__(self, service: Service):
        self._service, self._began = service, time.monotonic()
        self._changes: deque[dict[str, Any]] = deque(maxlen=_MOST_EVENTS)
        service.health.on_change = self.note

    def note(self, status: Status) -> None:
        """The server's status has changed."""
        now = datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
        severity = "info" if status in ALIVE and status is not Status.RECOVERING else "warning"
        self._changes.append(
            {"time": now, "kind": "status", "severity": severity, "rank": None, "message": _TEXT[status]}
        )

    def to_json(self) -> dict[str, Any]:
        """All of it."""
        service, health = self._service, self._service.health
        backend, instruments = health.backend, service.instruments
        found: dict[str, Any] = {
            "status": health.status.value,
            "model": service.model,
            "version": service.version,
            "uptime_seconds": round(time.monotonic() - self._began, 3),
            "requests": {
                **_values(instruments.requests),
                "sequences": service.admission.num_sequences,
                "most_sequences": service.admission.limit,
            },
            "tokens": {
                "prompt": _values(instruments.prompt_tokens)[""],
                "generation": _values(instruments.generation_tokens)[""],
            },
            "engine": None,
            "orchestrator": None,
            "events": list(self._changes),
        }
        if backend is not None:
            found["engine"] = _engine(backend, health.progress_age)
            if backend.orchestrator is not None:
                orchestrator = backend.orchestrator.status()
                events = [*self._changes, *orchestrator.pop("events")]
                found |= {"orchestrator": orchestrator, "events": sorted(events, key=lambda event: event["time"])}
        found["events"] = found["events"][-_MOST_EVENTS:]
        return found


def _values(metric: Counter | Gauge) -> dict[str, int]:
    """Of a metric with one label or none, by the label."""
    samples = [sample for family in metric.collect() for sample in family.samples if "_created" not in sample.name]
    return {next(iter(sample.labels.values()), ""): int(sample.value) for sample in samples}


def _ranks(backend: Backend) -> list[dict[str, Any]]:
    several = len(backend.replicas) > 1
    return [
        {**({"replica": number} if several else {}), **vars(rank)}
        for number, replica in enumerate(backend.replicas)
        for rank in replica.usage()
    ]


def _replicas(backend: Backend) -> list[dict[str, Any]]:
    found = []
    for number, replica in enumerate(backend.replicas):
        stats, orchestrator = replica.stats(), replica.orchestrator
        found.append(
            {
                "replica": number,
                "state": "ready" if orchestrator is None else str(orchestrator.state),
                "running": stats.num_running,
                "waiting": stats.num_waiting,
                "steps": stats.num_steps,
                "pages": {"total": stats.num_pages, "used": stats.num_pages_used, "idle": stats.num_pages_idle},
                "requests_moved": replica.metrics.counter("requests_moved"),
            }
        )
    return found


def _engine(backend: Backend, age: float) -> dict[str, Any]:
    stats = backend.stats()
    return {
        "device": backend.report.device,
        "dtype": backend.report.dtype,
        "kv_cache_dtype": backend.report.kv_cache_dtype,
        "max_model_len": backend.max_length,
        "running": stats.num_running,
        "waiting": stats.num_waiting,
        "pages": {"total": stats.num_pages, "used": stats.num_pages_used, "idle": stats.num_pages_idle},
        "steps": stats.num_steps,
        "preemptions": stats.num_preemptions,
        "prefix_cache": {"queries": stats.num_prefix_queries, "hits": stats.num_prefix_hits},
        "progress_age_seconds": round(age, 3),
        "replicas": _replicas(backend),
        "ranks": _ranks(backend),
    }
