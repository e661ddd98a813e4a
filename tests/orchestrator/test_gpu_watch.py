"""The thread that looks at GPUs: what is new and wrong becomes an event, and a GPU beyond help is reported."""

import time
from collections.abc import Callable

from ryzanstein_jax.orchestrator.events import EventKind, EventLog
from ryzanstein_jax.orchestrator.gpu_problems import Finding
from ryzanstein_jax.orchestrator.gpu_watch import GpuWatch
from ryzanstein_jax.orchestrator.telemetry import GpuTelemetry
from tests.orchestrator.fake_nvml import FakeGpu, FakeNvml


def wait_for(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 5.0
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_findings_become_events_and_the_unusable_gpu_is_reported() -> None:
    gpus, events, reported = [FakeGpu(uuid="GPU-0"), FakeGpu(uuid="GPU-1")], EventLog(), list[Finding]()
    watch = GpuWatch(GpuTelemetry(FakeNvml(*gpus)), 0.01, events, list, reported.append)
    wait_for(watch.summary)
    assert [gpu["uuid"] for gpu in watch.summary()] == ["GPU-0", "GPU-1"]
    assert not events.list()
    gpus[1].lost = True
    wait_for(lambda: reported)
    (event,) = events.list(kind=EventKind.TELEMETRY)
    assert (event.extra["gpu"], event.severity) == (1, "error")
    assert reported[0].gpu == 1
    watch.close()
    time.sleep(0.05)
    assert len(events.list()) == 1, "a lasting state is told once"


def test_without_gpus_nothing_is_started() -> None:
    nvml = FakeNvml()
    nvml.init_error = 9
    watch = GpuWatch(GpuTelemetry(nvml), 0.01, EventLog(), list, lambda finding: None)
    assert watch.summary() == []
    watch.close()
