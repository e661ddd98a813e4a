"""What is wrong with a GPU, from two samples of it: findings with a remedy, each told once."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from enum import StrEnum

from ryzanstein_jax.budget import size_text
from ryzanstein_jax.orchestrator.telemetry import GpuSample, TelemetrySample

FOREIGN_BYTES = 256 << 20  # of other processes that nobody needs to hear of
_RESET = "stop all that uses the GPU and reset it (nvidia-smi -r), or restart the machine"
_HARDWARE = "restart the machine; if it comes again, have the GPU replaced"
_RESTART = "the processes that used it are started again; if it comes again on this GPU alone, suspect the hardware"


class FindingKind(StrEnum):
    """What was found."""

    LOST = "lost"
    RESET_REQUIRED = "reset_required"
    XID = "xid"
    ECC_UNCORRECTED = "ecc_uncorrected"
    MEMORY_REPAIR_PENDING = "memory_repair_pending"
    MEMORY_REPAIR_FAILED = "memory_repair_failed"
    HOT = "hot"
    SLOWED = "slowed"
    NVLINK_DOWN = "nvlink_down"
    NVLINK_ERRORS = "nvlink_errors"
    PCIE_NARROW = "pcie_narrow"
    MEMORY_TAKEN = "memory_taken"


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong.

    Attributes:
        kind: what.
        gpu: index of the GPU, as in its sample.
        severity: "fatal" if what runs on the GPU is not to be trusted any more, or "warning".
        text: a sentence with the numbers.
        remedy: what to do.
        unusable: whether the GPU stays broken until somebody repairs or resets it: a new process won't help.
    """

    kind: FindingKind
    gpu: int
    severity: str
    text: str
    remedy: str
    unusable: bool = False


@dataclass(frozen=True)
class _Xid:
    meaning: str
    severity: str
    remedy: str
    unusable: bool = False


def _hardware(meaning: str, remedy: str = _RESET) -> _Xid:
    return _Xid(meaning, "fatal", remedy, unusable=True)


#: From NVIDIA's catalogue of Xid errors. Those of a program (13, 31, 43) end the process and leave the GPU sound.
#: 45 follows when a process is killed, which the leader itself does: a warning only.
XIDS = {
    8: _Xid("the GPU stopped processing", "fatal", _RESTART),
    13: _Xid("graphics engine exception, mostly an error of the program", "fatal", _RESTART),
    31: _Xid("memory page fault, mostly an error of the program", "fatal", _RESTART),
    32: _Xid("invalid or corrupted push buffer, mostly the bus or the driver", "fatal", _RESTART),
    38: _Xid("driver firmware error", "fatal", _RESTART),
    43: _Xid("the GPU stopped processing for an error of the program", "fatal", _RESTART),
    45: _Xid(
        "work was cleaned up after an earlier error or a killed process", "warning", "look for an error before it"
    ),
    48: _hardware("double-bit ECC error: memory that could not be corrected"),
    61: _hardware("internal micro-controller breakpoint"),
    62: _hardware("internal micro-controller halt"),
    63: _Xid("a memory page was retired or a row will be remapped", "warning", "reset the GPU when it is idle"),
    64: _hardware("a memory page could not be retired or a row not remapped", _HARDWARE),
    69: _Xid("graphics engine class error", "fatal", _RESTART),
    74: _hardware("NVLink error", "check the NVLink bridge or switch and reset the GPU"),
    79: _hardware("the GPU has fallen off the bus", "restart the machine; check power, cooling and seating"),
    92: _Xid("high rate of single-bit ECC errors", "warning", "watch it; run a diagnosis when it is idle"),
    94: _Xid("contained ECC error: only the process that met it is hurt", "fatal", _RESTART),
    95: _hardware("uncontained ECC error: all processes on the GPU are hurt"),
    109: _Xid("context switch timeout", "fatal", _RESTART),
    119: _hardware("the GPU's system processor (GSP) does not answer"),
    120: _hardware("error of the GPU's system processor (GSP)"),
    121: _Xid("corrected error of the link between the chips", "warning", "watch it"),
    140: _hardware("unrecovered ECC error"),
    143: _hardware("the GPU could not be initialized"),
    154: _Xid("the driver asks for a recovery of the GPU", "warning", "see nvidia-smi -q, GPU Recovery Action"),
}
_UNKNOWN_XID = _Xid("see NVIDIA's catalogue of Xid errors", "warning", "look it up")


def problems(
    sample: TelemetrySample, previous: TelemetrySample | None = None, *, own_processes: Collection[int] | None = None
) -> list[Finding]:
    """What is wrong and was not so in the sample before; without one, all that is wrong.

    Args:
        sample: of now.
        previous: the one before it.
        own_processes: process ids of the ranks; empty before they are started. None looks at no processes.

    Returns:
        Findings, fatal ones first.
    """
    before = {gpu.index: gpu for gpu in previous.gpus} if previous is not None else {}
    found: list[Finding] = []
    for gpu in sample.gpus:
        old = before.get(gpu.index)
        known = {finding.kind for finding in _states(old, own_processes)} if old is not None else set()
        changes = _changes(gpu, old)
        known |= {change.kind for change in changes}  # a link that just fell is also one that is down
        found += changes + [finding for finding in _states(gpu, own_processes) if finding.kind not in known]
    return sorted(found, key=lambda finding: (finding.severity != "fatal", finding.gpu))


def _states(gpu: GpuSample, own_processes: Collection[int] | None) -> list[Finding]:
    """What lasts: at most one finding of a kind."""
    found: list[Finding] = []

    def add(kind: FindingKind, severity: str, text: str, remedy: str, *, unusable: bool = False) -> None:
        found.append(Finding(kind, gpu.index, severity, f"{_named(gpu)} {text}", remedy, unusable))

    if gpu.lost:
        remedy = "restart the machine; check power, cooling and seating"
        add(FindingKind.LOST, "fatal", "fell off the bus", remedy, unusable=True)
        return found
    if gpu.reset_required:
        add(FindingKind.RESET_REQUIRED, "fatal", "works again after a reset only", _RESET, unusable=True)
    if gpu.rows_failed:
        text = "could not remap a broken memory row"
        add(FindingKind.MEMORY_REPAIR_FAILED, "fatal", text, _HARDWARE, unusable=True)
    if gpu.rows_pending or gpu.pages_pending:
        text = "waits for a reset to put broken memory out of use"
        add(FindingKind.MEMORY_REPAIR_PENDING, "warning", text, "reset the GPU when it is idle")
    if gpu.temperature is not None and gpu.slowdown_temperature and gpu.temperature >= gpu.slowdown_temperature:
        text = f"has {gpu.temperature} °C and slows itself down from {gpu.slowdown_temperature} °C on"
        add(FindingKind.HOT, "warning", text, "check fans and air flow")
    # Running at the power limit is what a busy GPU does.
    if slowed := [reason for reason in gpu.throttle_reasons or () if reason != "power cap"]:
        add(FindingKind.SLOWED, "warning", f"is slowed down: {', '.join(slowed)}", "check cooling and power supply")
    if gpu.pcie_width and gpu.pcie_max_width and gpu.pcie_width < gpu.pcie_max_width:
        text = f"has {gpu.pcie_width} of {gpu.pcie_max_width} PCIe lanes"
        add(FindingKind.PCIE_NARROW, "warning", text, "reseat it, or use a full slot")
    down = [link.link for link in gpu.nvlinks or () if not link.active]
    if down and len(down) < len(gpu.nvlinks or ()):  # with none up there is no bridge
        text = f"has {len(down)} of {len(gpu.nvlinks or ())} NVLinks down: {', '.join(map(str, down))}"
        add(FindingKind.NVLINK_DOWN, "warning", text, "check the NVLink bridge or switch (nvidia-smi nvlink -s)")
    if own_processes is not None and (taken := _taken(gpu, own_processes)):
        add(FindingKind.MEMORY_TAKEN, "warning", taken, "stop them, or lower memory_fraction by their share")
    return found


def _taken(gpu: GpuSample, own_processes: Collection[int]) -> str:
    """What other processes hold of the memory, if it matters."""
    others = [(pid, used) for pid, used in gpu.processes or () if pid not in own_processes]
    size = sum(used or 0 for _, used in others)
    if not own_processes and gpu.memory_used is not None:
        # Processes of other containers are not listed; the driver itself takes some, up to 1 GiB.
        size = max(size, gpu.memory_used - (1 << 30))
    if size <= FOREIGN_BYTES:
        return ""
    names = ", ".join(str(pid) for pid, _ in others[:8]) or "unknown"
    return f"has {size_text(size)} of its memory taken by other processes ({names})"


def _changes(gpu: GpuSample, old: GpuSample | None) -> list[Finding]:
    """What happened since the sample before."""
    found = []
    for number in dict.fromkeys(gpu.xids):
        xid = XIDS.get(number, _UNKNOWN_XID)
        times = f", {gpu.xids.count(number)} times" if gpu.xids.count(number) > 1 else ""
        text = f"{_named(gpu)} reported Xid {number}{times}: {xid.meaning}"
        found.append(Finding(FindingKind.XID, gpu.index, xid.severity, text, xid.remedy, xid.unusable))
    if gpu.ecc_uncorrected:
        # A count below the one before started anew with the driver. Errors of before the first sample are history.
        known = old.ecc_uncorrected if old is not None else None
        new = gpu.ecc_uncorrected - (known or 0) if gpu.ecc_uncorrected >= (known or 0) else gpu.ecc_uncorrected
        if new:
            severity, since = ("fatal", "new") if known is not None else ("warning", "since the driver was loaded")
            text = f"{_named(gpu)} has {new} uncorrected memory errors, {since}"
            found.append(Finding(FindingKind.ECC_UNCORRECTED, gpu.index, severity, text, _RESET, known is not None))
    if old is None:
        return found
    links = {link.link: link for link in old.nvlinks or ()}
    fallen = [k.link for k in gpu.nvlinks or () if not k.active and k.link in links and links[k.link].active]
    if fallen:
        text = f"{_named(gpu)} lost NVLink {', '.join(map(str, fallen))}"
        remedy = "check the NVLink bridge or switch and reset the GPU"
        found.append(Finding(FindingKind.NVLINK_DOWN, gpu.index, "fatal", text, remedy, unusable=True))
    worse = []
    for link in gpu.nvlinks or ():
        for name, count in link.errors.items():
            new = count - (links[link.link].errors.get(name, count) if link.link in links else count)
            if new > 0:
                worse.append(f"{new} x {name} on link {link.link}")
    if worse:
        text = f"{_named(gpu)} has new NVLink errors: {', '.join(worse[:8])}"
        found.append(
            Finding(FindingKind.NVLINK_ERRORS, gpu.index, "warning", text, "check the NVLink bridge or switch")
        )
    return found


def _named(gpu: GpuSample) -> str:
    return f"GPU {gpu.index} ({', '.join(part for part in (gpu.name, gpu.pci_bus_id) if part) or 'unknown'})"
