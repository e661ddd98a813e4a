"""`GpuTelemetry`: what NVIDIA's management library (NVML) tells of each GPU, read beside the ranks, without CUDA.

Whatever a GPU, driver or library does not offer is None. What the numbers mean is judged in `gpu_problems`.
"""

from __future__ import annotations

import importlib
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

MAX_XIDS = 64  # of one GPU in one sample: a broken GPU can report without end

#: Name -> bit of NVML's clock event reasons, by the constant that holds it. Idle and settings are no events to tell of.
_REASONS = {
    "power cap": "nvmlClocksEventReasonSwPowerCap",
    "hardware slowdown": "nvmlClocksEventReasonHwSlowdown",
    "software thermal slowdown": "nvmlClocksEventReasonSwThermalSlowdown",
    "hardware thermal slowdown": "nvmlClocksEventReasonHwThermalSlowdown",
    "power brake": "nvmlClocksEventReasonHwPowerBrakeSlowdown",
}
_LINK_ERRORS = {
    "replay": "NVML_NVLINK_ERROR_DL_REPLAY",
    "recovery": "NVML_NVLINK_ERROR_DL_RECOVERY",
    "crc flit": "NVML_NVLINK_ERROR_DL_CRC_FLIT",
    "crc data": "NVML_NVLINK_ERROR_DL_CRC_DATA",
}


@dataclass(frozen=True)
class NvLink:
    """One NVLink of a GPU.

    Attributes:
        link: its number.
        active: whether it is up.
        errors: count of each kind of error since the driver was loaded; kinds that this GPU does not count are absent.
    """

    link: int
    active: bool
    errors: dict[str, int]


@dataclass(frozen=True)
class GpuSample:
    """One GPU at one moment; None is what it does not tell.

    Attributes:
        index: NVML's, in order of the PCI bus. CUDA may count otherwise: go by `pci_bus_id` or `uuid`.
        uuid, name: of the GPU.
        pci_bus_id: as "0000:3b:00.0".
        lost: it fell off the bus, and tells nothing any more.
        reset_required: it works again after a reset only.
        temperature, slowdown_temperature: in degrees Celsius; at the second it slows itself down.
        memory_used, memory_total: in bytes.
        processes: (process id, bytes or None) of each compute process that is visible from here.
        utilization: share of the last moments in which some kernel ran, in percent.
        power, power_limit: in watts.
        ecc_corrected, ecc_uncorrected: memory errors since the driver was loaded.
        pages_pending: memory pages wait for a reset to be retired (before Ampere).
        rows_pending, rows_failed: memory rows wait for a reset to be remapped, or could not be (from Ampere on).
        nvlinks: those that the GPU has; () without NVLink, None if it does not tell.
        throttle_reasons: why it runs below its clock, of `power cap`, `hardware slowdown` and so on.
        pcie_generation, pcie_width, pcie_max_width: of the link; the generation falls while the GPU idles.
        pcie_replays: packets sent again since the driver was loaded.
        xids: error numbers that the driver reported since the sample before.
    """

    index: int
    uuid: str | None = None
    name: str | None = None
    pci_bus_id: str | None = None
    lost: bool = False
    reset_required: bool = False
    temperature: int | None = None
    slowdown_temperature: int | None = None
    memory_used: int | None = None
    memory_total: int | None = None
    processes: tuple[tuple[int, int | None], ...] | None = None
    utilization: int | None = None
    power: float | None = None
    power_limit: float | None = None
    ecc_corrected: int | None = None
    ecc_uncorrected: int | None = None
    pages_pending: bool | None = None
    rows_pending: bool | None = None
    rows_failed: bool | None = None
    nvlinks: tuple[NvLink, ...] | None = None
    throttle_reasons: tuple[str, ...] | None = None
    pcie_generation: int | None = None
    pcie_width: int | None = None
    pcie_max_width: int | None = None
    pcie_replays: int | None = None
    xids: tuple[int, ...] = ()


@dataclass(frozen=True)
class TelemetrySample:
    """All GPUs at one moment.

    Attributes:
        monotonic: seconds of `time.monotonic`.
        gpus: by index.
    """

    monotonic: float
    gpus: tuple[GpuSample, ...] = ()


class _LostError(Exception):
    """A call found that the GPU fell off the bus."""


@dataclass
class _Gpu:
    """A GPU between samples."""

    index: int
    handle: Any = None
    events: Any = None  # its own set, so that an event names its GPU also when nothing can be asked of it any more
    identity: tuple[str | None, str | None, str | None] = (None, None, None)
    lost: bool = False
    reset_required: bool = False


class GpuTelemetry:
    """Reads the GPUs of this machine, all of them, whatever CUDA_VISIBLE_DEVICES says.

    Without the library, driver or GPUs, `available` is False, `reason` says why, and samples are empty: no error.
    A GPU that is lost is looked for again with each sample. Parts of a GPU (MIG) are not told apart.
    A call may take seconds while a GPU fails, so sample in a thread of its own. Thread-safe.

    Args:
        nvml: the module `pynvml`, or one with the same functions; None imports it if it is installed.
    """

    def __init__(self, nvml: ModuleType | Any | None = None):
        self._lock = threading.Lock()
        self._gpus: list[_Gpu] = []
        self.reason = ""
        self._nvml: Any = None
        if nvml is None:
            try:
                nvml = importlib.import_module("pynvml")
            except ImportError:
                self.reason = "the package nvidia-ml-py is not installed"
                return
        try:
            nvml.nvmlInit()
        except nvml.NVMLError as error:
            self.reason = f"NVML does not start: {error}"
            return
        self._nvml = nvml
        for index in range(self._ask("nvmlDeviceGetCount") or 0):
            gpu = _Gpu(index)
            self._find(gpu)
            if gpu.lost or gpu.handle is not None:  # else the driver counts it and won't let this user speak to it
                self._gpus.append(gpu)
        if not self._gpus:
            self.reason = "there is no GPU"

    @property
    def available(self) -> bool:
        """Whether there is anything to read."""
        return bool(self._gpus)

    def sample(self) -> TelemetrySample:
        """Reads all GPUs, and the Xid errors since the last sample. It waits for nothing but the driver."""
        with self._lock:
            return TelemetrySample(time.monotonic(), tuple(self._sample(gpu) for gpu in self._gpus))

    def close(self) -> None:
        """Ends the use of NVML. May be called again; later samples are empty."""
        with self._lock:
            if self._nvml is None:
                return
            for gpu in self._gpus:
                if gpu.events is not None:
                    self._ask_safely("nvmlEventSetFree", gpu.events)
            self._ask_safely("nvmlShutdown")
            self._gpus, self._nvml, self.reason = [], None, "closed"

    def _find(self, gpu: _Gpu) -> None:
        try:
            gpu.handle = self._ask("nvmlDeviceGetHandleByIndex", gpu.index)
            if gpu.handle is not None:
                self._open(gpu)
        except _LostError:
            gpu.lost = True

    def _open(self, gpu: _Gpu) -> None:
        bus = self._ask("nvmlDeviceGetPciInfo", gpu.handle)
        gpu.identity = (
            _text(self._ask("nvmlDeviceGetUUID", gpu.handle)),
            _text(self._ask("nvmlDeviceGetName", gpu.handle)),
            normal_bus_id(_text(bus.busId) or "") if bus is not None else None,
        )
        events = self._ask("nvmlEventSetCreate")
        if events is None:
            return
        try:
            self._nvml.nvmlDeviceRegisterEvents(gpu.handle, self._nvml.nvmlEventTypeXidCriticalError, events)
            gpu.events = events
        except self._nvml.NVMLError:  # not offered, for example inside some virtual machines
            self._ask_safely("nvmlEventSetFree", events)

    def _sample(self, gpu: _Gpu) -> GpuSample:
        uuid, name, bus = gpu.identity
        xids = self._xids(gpu)
        found: dict[str, Any] = {}
        if gpu.lost:
            self._look_again(gpu)
        if not gpu.lost:
            try:
                found = self._values(gpu)
            except _LostError:
                gpu.lost = True
        return GpuSample(
            gpu.index, uuid, name, bus, lost=gpu.lost, reset_required=gpu.reset_required, xids=xids, **found
        )

    def _look_again(self, gpu: _Gpu) -> None:
        """Takes a lost GPU in again where it is there, and not another one by its number."""
        again = _Gpu(gpu.index)
        self._find(again)
        is_back = not again.lost and again.handle is not None and gpu.identity[0] in (None, again.identity[0])
        kept, dropped = (again, gpu) if is_back else (gpu, again)
        if dropped.events is not None:
            self._ask_safely("nvmlEventSetFree", dropped.events)
        gpu.handle, gpu.events, gpu.identity, gpu.lost = kept.handle, kept.events, kept.identity, kept.lost

    def _values(self, gpu: _Gpu) -> dict[str, Any]:
        nvml, handle = self._nvml, gpu.handle

        def ask(function: str, *arguments: Any) -> Any:
            return self._ask(function, handle, *arguments, gpu=gpu)

        gpu.reset_required = False
        memory = ask("nvmlDeviceGetMemoryInfo")
        utilization = ask("nvmlDeviceGetUtilizationRates")
        rows = ask("nvmlDeviceGetRemappedRows")
        pages = ask("nvmlDeviceGetRetiredPagesPendingStatus")
        processes = ask("nvmlDeviceGetComputeRunningProcesses")
        reasons = ask("nvmlDeviceGetCurrentClocksEventReasons")
        if reasons is None:  # older drivers have the older name only; the bits are the same
            reasons = ask("nvmlDeviceGetCurrentClocksThrottleReasons")

        def ecc(kind: int) -> Any:
            return ask("nvmlDeviceGetTotalEccErrors", kind, nvml.NVML_VOLATILE_ECC)

        return dict(
            temperature=ask("nvmlDeviceGetTemperature", nvml.NVML_TEMPERATURE_GPU),
            slowdown_temperature=ask("nvmlDeviceGetTemperatureThreshold", nvml.NVML_TEMPERATURE_THRESHOLD_SLOWDOWN),
            memory_used=_with(memory, lambda: int(memory.used)),
            memory_total=_with(memory, lambda: int(memory.total)),
            processes=_with(processes, lambda: tuple((int(p.pid), p.usedGpuMemory) for p in processes)),
            utilization=_with(utilization, lambda: int(utilization.gpu)),
            power=_watts(ask("nvmlDeviceGetPowerUsage")),
            power_limit=_watts(ask("nvmlDeviceGetEnforcedPowerLimit")),
            ecc_corrected=ecc(nvml.NVML_MEMORY_ERROR_TYPE_CORRECTED),
            ecc_uncorrected=ecc(nvml.NVML_MEMORY_ERROR_TYPE_UNCORRECTED),
            pages_pending=_with(pages, lambda: pages == nvml.NVML_FEATURE_ENABLED),
            rows_pending=_with(rows, lambda: bool(rows[2])),
            rows_failed=_with(rows, lambda: bool(rows[3])),
            nvlinks=self._nvlinks(gpu),
            throttle_reasons=_with(
                reasons, lambda: tuple(name for name, bit in _REASONS.items() if reasons & getattr(nvml, bit))
            ),
            pcie_generation=ask("nvmlDeviceGetCurrPcieLinkGeneration"),
            pcie_width=ask("nvmlDeviceGetCurrPcieLinkWidth"),
            pcie_max_width=ask("nvmlDeviceGetMaxPcieLinkWidth"),
            pcie_replays=ask("nvmlDeviceGetPcieReplayCounter"),
        )

    def _nvlinks(self, gpu: _Gpu) -> tuple[NvLink, ...]:
        links = []
        for link in range(self._nvml.NVML_NVLINK_MAX_LINKS):
            active = self._ask("nvmlDeviceGetNvLinkState", gpu.handle, link, gpu=gpu)
            if active is None:  # no such link
                continue
            errors = {}
            if active:
                for name, counter in _LINK_ERRORS.items():
                    count = self._ask(
                        "nvmlDeviceGetNvLinkErrorCounter", gpu.handle, link, getattr(self._nvml, counter), gpu=gpu
                    )
                    if count is not None:
                        errors[name] = count
            links.append(NvLink(link, bool(active), errors))
        return tuple(links)

    def _xids(self, gpu: _Gpu) -> tuple[int, ...]:
        """Takes the waiting Xid events, without waiting for one."""
        found: list[int] = []
        for _ in range(MAX_XIDS if gpu.events is not None else 0):
            try:
                event = self._nvml.nvmlEventSetWait_v2(gpu.events, 0)
            except self._nvml.NVMLError:
                break  # NVML_ERROR_TIMEOUT: there are no more. That the GPU is lost, the next call finds too
            if event.eventType == self._nvml.nvmlEventTypeXidCriticalError:
                found.append(int(event.eventData))
        return tuple(found)

    def _ask(self, function: str, *arguments: Any, gpu: _Gpu | None = None) -> Any:
        """What a function of NVML returns, or None where this GPU, driver or library does not have it.

        Raises:
            _LostError: the GPU fell off the bus.
        """
        call = getattr(self._nvml, function, None)
        if call is None:
            return None
        try:
            return call(*arguments)
        except self._nvml.NVMLError as error:
            if error.value == self._nvml.NVML_ERROR_GPU_IS_LOST:
                raise _LostError from error
            if error.value == self._nvml.NVML_ERROR_RESET_REQUIRED and gpu is not None:
                gpu.reset_required = True
            return None

    def _ask_safely(self, function: str, *arguments: Any) -> None:
        try:
            self._ask(function, *arguments)
        except _LostError:
            pass  # it is being let go of


def normal_bus_id(text: str) -> str:
    """A PCI bus id as CUDA writes it: NVML writes "00000000:3B:00.0" for "0000:3b:00.0"."""
    domain, colon, rest = text.lower().partition(":")
    return f"{domain[-4:] if domain[:-4].strip('0') == '' else domain}{colon}{rest}"


def _with(value: Any, make: Callable[[], Any]) -> Any:
    return None if value is None else make()


def _watts(milliwatts: int | None) -> float | None:
    return None if milliwatts is None else milliwatts / 1000


def _text(value: str | bytes | None) -> str | None:
    return value.decode(errors="replace") if isinstance(value, bytes) else value
