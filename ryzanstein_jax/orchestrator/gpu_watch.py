"""Looks at the GPUs from outside while ranks use them: a thread of its own, since a failing GPU may stall NVML."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable, Collection
from typing import Any

from ryzanstein_jax.orchestrator.events import EventKind, EventLog
from ryzanstein_jax.orchestrator.gpu_problems import problems
from ryzanstein_jax.orchestrator.telemetry import GpuSample, GpuTelemetry, TelemetrySample


class GpuWatch:
    """Samples all GPUs every so often and records what is new and wrong.

    Args:
        telemetry: the GPUs; where there are none, nothing is started.
        interval: seconds between two looks.
        events: gets the findings.
        own_processes: pids whose use of memory is no surprise.
        on_unusable: called, from the thread, with a GPU and what is wrong with it that only a reset or a repair mends.
        on_back: called, from the thread, with a GPU that was lost and is there again.
    """

    def __init__(
        self,
        telemetry: GpuTelemetry,
        interval: float,
        events: EventLog,
        own_processes: Callable[[], Collection[int]],
        on_unusable: Callable[[GpuSample, str], None],
        on_back: Callable[[GpuSample], None],
    ):
        self._telemetry, self._interval, self._events = telemetry, interval, events
        self._own_processes, self._on_unusable, self._on_back = own_processes, on_unusable, on_back
        self._sample: TelemetrySample | None = None
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="gpu-watch", daemon=True)
        if telemetry.available:
            self._thread.start()

    def summary(self) -> list[dict[str, Any]]:
        """The last look at each GPU, as plain values."""
        sample = self._sample
        return [] if sample is None else [dataclasses.asdict(gpu) for gpu in sample.gpus]

    def close(self) -> None:
        """Ends the thread; one that a stalled driver holds is left behind."""
        self._ended.set()
        if self._thread.is_alive():
            self._thread.join(self._interval + 1.0)
        else:
            self._telemetry.close()

    def _run(self) -> None:
        while True:
            sample = self._telemetry.sample()
            for finding in problems(sample, self._sample, own_processes=self._own_processes()):
                self._events.record(
                    EventKind.TELEMETRY,
                    f"{finding.text}: {finding.remedy}",
                    severity="error" if finding.severity == "fatal" else "warning",
                    finding=finding.kind.value,
                    gpu=finding.gpu,
                )
                if finding.unusable:
                    self._on_unusable(next(gpu for gpu in sample.gpus if gpu.index == finding.gpu), finding.text)
            self._note_back(sample)
            self._sample = sample
            if self._ended.wait(self._interval):
                self._telemetry.close()
                return

    def _note_back(self, sample: TelemetrySample) -> None:
        lost = {gpu.index for gpu in self._sample.gpus if gpu.lost} if self._sample is not None else set()
        for gpu in sample.gpus:
            if gpu.index in lost and not gpu.lost:
                self._events.record(
                    EventKind.TELEMETRY, f"GPU {gpu.index} is there again", gpu=gpu.index, severity="info"
                )
                self._on_back(gpu)
