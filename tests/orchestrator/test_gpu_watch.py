"""The thread that looks at GPUs: what is new and wrong becomes an event, and a GPU beyond help is reported."""

import time
from collections.abc import Callable

from ryzanstein_jax.orchestrator.events import EventKind, EventLog
from ryzanstein_jax.orchestrator.gpu_watch import GpuWatch
from ryzanstein_jax.orchestrator.telemetry import GpuTelemetry
from tests.orchestrator.fake_nvml import FakeGpu, FakeNvml


def wait_for(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 5.0
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_findings_become_events_and_the_unusable_gpu_is_reported() -> None:
    gpus, events, reported, back = [FakeGpu(uuid="GPU-0"), FakeGpu(uuid="GPU-1")], EventLog(), [], []
    watch = GpuWatch(
        GpuTelemetry(FakeNvml(*gpus)), 0.01, events, list, lambda *what: reported.append(what), back.append
    )
    wait_for(watch.summary)
    assert [gpu["uuid"] for gpu in watch.summary()] == ["GPU-0", "GPU-1"]
    assert not events.list()
    gpus[1].lost = True
    wait_for(lambda: reported)
    (event,) = events.list(kind=EventKind.TELEMETRY)
    assert (event.extra["gpu"], event.severity) == (1, "error")
    ((gpu, text),) = reported
    assert (gpu.index, gpu.pci_bus_id, gpu.lost) == (1, "0000:0b:00.0", True) and "fell off the bus" in text
    time.sleep(0.05)
    assert len(events.list()) == 1 and not back, "a lasting state is told once"
    gpus[1].lost = False
    wait_for(lambda: back)
    watch.close()
    assert [(gpu.index, gpu.lost) for gpu in back] == [(1, False)]
    assert [event.message for event in events.list()][1:] == ["GPU 1 is there again"]


def test_without_gpus_nothing_is_started() -> None:
    nvml = FakeNvml()
    nvml.init_error = 9
    watch = GpuWatch(GpuTelemetry(nvml), 0.01, EventLog(), list, lambda *what: None, lambda gpu: None)
    assert watch.summary() == []
    watch.close()
