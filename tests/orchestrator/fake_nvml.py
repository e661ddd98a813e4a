"""A module like `pynvml` over GPUs made of numbers. Constants, structs and errors are those of the real one."""

from __future__ import annotations

import ctypes
from collections import deque
from dataclasses import dataclass, field
from typing import Any

import pynvml


@dataclass
class FakeGpu:
    """What the fake driver knows of a GPU. A function named in `missing` raises that error."""

    uuid: str = "GPU-0"
    name: str = "NVIDIA H100"
    temperature: int = 50
    slowdown: int = 90
    used: int = 1 << 30
    total: int = 80 << 30
    processes: list[tuple[int, int | None]] = field(default_factory=list)
    ecc: dict[int, int] = field(default_factory=lambda: {0: 0, 1: 0})
    rows: tuple[int, int, int, int] = (0, 0, 0, 0)
    pages_pending: int = 0
    reasons: int = 0
    links: dict[int, int] = field(default_factory=dict)
    link_errors: dict[tuple[int, int], int] = field(default_factory=dict)
    pcie_width: int = 16
    xids: deque[int] = field(default_factory=deque)
    lost: bool = False
    missing: dict[str, int] = field(default_factory=dict)


class FakeNvml:
    """Stands for the module: only what is defined here, or a constant or class of `pynvml`, is there."""

    NVMLError = pynvml.NVMLError

    def __init__(self, *gpus: FakeGpu):
        self.gpus, self.open_sets, self.started = list(gpus), [], 0
        self.init_error: int | None = None

    def __getattr__(self, name: str) -> Any:
        value = getattr(pynvml, name)
        if callable(value) and not isinstance(value, type):
            raise AttributeError(f"the fake has no {name}")
        return value

    def _gpu(self, function: str, handle: int) -> FakeGpu:
        gpu = self.gpus[handle]
        if gpu.lost:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_GPU_IS_LOST)
        if function in gpu.missing:
            raise pynvml.NVMLError(gpu.missing[function])
        return gpu

    def nvmlInit(self):
        if self.init_error is not None:
            raise pynvml.NVMLError(self.init_error)
        self.started += 1

    def nvmlShutdown(self):
        self.started -= 1

    def nvmlDeviceGetCount(self):
        return len(self.gpus)

    def nvmlDeviceGetHandleByIndex(self, index):
        self._gpu("nvmlDeviceGetHandleByIndex", index)
        return index

    def nvmlDeviceGetPciInfo(self, handle):
        self._gpu("nvmlDeviceGetPciInfo", handle)
        return pynvml.nvmlPciInfo_t(busId=f"00000000:{handle + 10:02X}:00.0".encode())

    def nvmlDeviceGetUUID(self, handle):
        return self._gpu("nvmlDeviceGetUUID", handle).uuid

    def nvmlDeviceGetName(self, handle):
        return self._gpu("nvmlDeviceGetName", handle).name

    def nvmlDeviceGetMemoryInfo(self, handle):
        gpu = self._gpu("nvmlDeviceGetMemoryInfo", handle)
        return pynvml.c_nvmlMemory_t(total=gpu.total, free=gpu.total - gpu.used, used=gpu.used)

    def nvmlDeviceGetUtilizationRates(self, handle):
        self._gpu("nvmlDeviceGetUtilizationRates", handle)
        return pynvml.c_nvmlUtilization_t(gpu=77, memory=33)

    def nvmlDeviceGetRemappedRows(self, device):
        return self._gpu("nvmlDeviceGetRemappedRows", device).rows

    def nvmlDeviceGetRetiredPagesPendingStatus(self, device):
        return self._gpu("nvmlDeviceGetRetiredPagesPendingStatus", device).pages_pending

    def nvmlDeviceGetComputeRunningProcesses(self, handle):
        gpu = self._gpu("nvmlDeviceGetComputeRunningProcesses", handle)
        return [pynvml.nvmlFriendlyObject(dict(pid=pid, usedGpuMemory=used)) for pid, used in gpu.processes]

    def nvmlDeviceGetCurrentClocksEventReasons(self, handle):
        return self._gpu("nvmlDeviceGetCurrentClocksEventReasons", handle).reasons

    def nvmlDeviceGetCurrentClocksThrottleReasons(self, handle):
        return self._gpu("nvmlDeviceGetCurrentClocksThrottleReasons", handle).reasons

    def nvmlDeviceGetTotalEccErrors(self, handle, errorType, counterType):
        assert counterType == pynvml.NVML_VOLATILE_ECC
        return self._gpu("nvmlDeviceGetTotalEccErrors", handle).ecc[errorType]

    def nvmlDeviceGetTemperature(self, handle, sensor):
        assert sensor == pynvml.NVML_TEMPERATURE_GPU
        return self._gpu("nvmlDeviceGetTemperature", handle).temperature

    def nvmlDeviceGetTemperatureThreshold(self, handle, threshold):
        assert threshold == pynvml.NVML_TEMPERATURE_THRESHOLD_SLOWDOWN
        return self._gpu("nvmlDeviceGetTemperatureThreshold", handle).slowdown

    def nvmlDeviceGetPowerUsage(self, handle):
        self._gpu("nvmlDeviceGetPowerUsage", handle)
        return 123_456

    def nvmlDeviceGetEnforcedPowerLimit(self, handle):
        self._gpu("nvmlDeviceGetEnforcedPowerLimit", handle)
        return 700_000

    def nvmlDeviceGetNvLinkState(self, device, link):
        gpu = self._gpu("nvmlDeviceGetNvLinkState", device)
        if link not in gpu.links:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_SUPPORTED)
        return gpu.links[link]

    def nvmlDeviceGetNvLinkErrorCounter(self, device, link, counter):
        return self._gpu("nvmlDeviceGetNvLinkErrorCounter", device).link_errors.get((link, counter), 0)

    def nvmlDeviceGetCurrPcieLinkGeneration(self, handle):
        self._gpu("nvmlDeviceGetCurrPcieLinkGeneration", handle)
        return 5

    def nvmlDeviceGetCurrPcieLinkWidth(self, handle):
        return self._gpu("nvmlDeviceGetCurrPcieLinkWidth", handle).pcie_width

    def nvmlDeviceGetMaxPcieLinkWidth(self, handle):
        self._gpu("nvmlDeviceGetMaxPcieLinkWidth", handle)
        return 16

    def nvmlDeviceGetPcieReplayCounter(self, handle):
        self._gpu("nvmlDeviceGetPcieReplayCounter", handle)
        return 3

    def nvmlEventSetCreate(self):
        events = [None, len(self.open_sets)]
        self.open_sets.append(events)
        return events

    def nvmlDeviceRegisterEvents(self, handle, eventTypes, eventSet):
        self._gpu("nvmlDeviceRegisterEvents", handle)
        assert eventTypes == pynvml.nvmlEventTypeXidCriticalError
        eventSet[0] = handle

    def nvmlEventSetWait_v2(self, eventSet, timeoutms):
        assert timeoutms == 0, "sampling must not wait"
        gpu = self.gpus[eventSet[0]]
        if gpu.xids:
            data = pynvml.c_nvmlEventData_t(
                eventType=pynvml.nvmlEventTypeXidCriticalError, eventData=ctypes.c_ulonglong(gpu.xids.popleft()).value
            )
            return data
        raise pynvml.NVMLError(pynvml.NVML_ERROR_GPU_IS_LOST if gpu.lost else pynvml.NVML_ERROR_TIMEOUT)

    def nvmlEventSetFree(self, eventSet):
        self.open_sets.remove(eventSet)
