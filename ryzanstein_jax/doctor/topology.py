"""How GPUs are connected, as NVIDIA's management library (NVML) tells it: NVLink, PCIe, and what is in the way."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Any

from ryzanstein_jax.doctor.finding import Place
from ryzanstein_jax.orchestrator.telemetry import normal_bus_id

#: GB/s of one link in one direction, by NVLink's version: NVIDIA's data sheets of P100, V100, A100, H100 and B200.
LINK_GB_PER_S = {1: 20.0, 2: 25.0, 3: 25.0, 4: 25.0, 5: 50.0}
#: NVML's nvmlGpuTopologyLevel_t, in the words of `nvidia-smi topo -m`.
_LEVELS = {0: "LOC", 10: "PIX", 20: "PXB", 30: "PHB", 40: "NODE", 50: "SYS"}
_BRIDGE, _ACS_CAPABILITY = 0x0604, 0x000D


@dataclass(frozen=True)
class Topology:
    """GPUs and the way from each to each.

    Attributes:
        names: of the GPUs, by NVML's index.
        matrix: "X" on the diagonal; "NV18": that many NVLinks; PIX, PXB, PHB, NODE, SYS: over PCIe, ever farther;
            "?" where the driver does not tell.
        nvlink_gb_per_s: of each GPU in one direction, all its links that are up; None without, or of unknown version.
        mig: indices of GPUs that are divided.
        driver: version; None if it does not tell.
    """

    names: tuple[str, ...] = ()
    matrix: tuple[tuple[str, ...], ...] = ()
    nvlink_gb_per_s: tuple[float | None, ...] = ()
    mig: tuple[int, ...] = ()
    driver: str | None = None


def read_topology(nvml: Any) -> Topology:
    """Asks a module like `pynvml` that is started already; what it does not offer is left out."""

    def ask(function: str, *arguments: Any) -> Any:
        call = getattr(nvml, function, None)
        if call is None or None in arguments:  # a GPU that is lost has no handle
            return None
        try:
            return call(*arguments)
        except nvml.NVMLError:
            return None

    handles = [ask("nvmlDeviceGetHandleByIndex", index) for index in range(ask("nvmlDeviceGetCount") or 0)]
    buses = [normal_bus_id(_text(getattr(ask("nvmlDeviceGetPciInfo", handle), "busId", ""))) for handle in handles]
    links = [_links(nvml, ask, handle) for handle in handles]

    def way(one: int, other: int) -> str:
        if one == other:
            return "X"
        if count := sum(bus == buses[other] for bus, _ in links[one]):
            return f"NV{count}"
        # Through a switch, the far end of a link is the switch and not the GPU.
        switched = [sum(bus not in buses for bus, _ in links[gpu]) for gpu in (one, other)]
        if min(switched):
            return f"NV{min(switched)}"
        level = ask("nvmlDeviceGetTopologyCommonAncestor", handles[one], handles[other])
        return _LEVELS.get(level, "?")

    gpus = range(len(handles))
    speeds = [[None if version is None else LINK_GB_PER_S.get(version) for _, version in links[gpu]] for gpu in gpus]
    known = [sum(s for s in speed if s) if speed and None not in speed else None for speed in speeds]
    mig = tuple(gpu for gpu in gpus if (ask("nvmlDeviceGetMigMode", handles[gpu]) or (0, 0))[0])
    return Topology(
        tuple(_text(ask("nvmlDeviceGetName", handle)) or "GPU" for handle in handles),
        tuple(tuple(way(one, other) for other in gpus) for one in gpus),
        tuple(known),
        mig,
        _text(ask("nvmlSystemGetDriverVersion")) or None,
    )


def _links(nvml: Any, ask: Any, handle: Any) -> list[tuple[str, int | None]]:
    """The far end and the version of each NVLink of a GPU that is up."""
    found = []
    for link in range(nvml.NVML_NVLINK_MAX_LINKS):
        if ask("nvmlDeviceGetNvLinkState", handle, link):
            remote = ask("nvmlDeviceGetNvLinkRemotePciInfo", handle, link)
            bus = normal_bus_id(_text(remote.busId)) if remote is not None else ""
            found.append((bus, ask("nvmlDeviceGetNvLinkVersion", handle, link)))
    return found


def acs_bridges(place: Place) -> list[str] | None:
    """PCI bridges that redirect traffic between their devices to the root (ACS); None where they can't be read.

    From the PCI Express specification: extended capabilities begin at byte 0x100; the control register of Access
    Control Services is at 6 in it, and bits 2 and 3 redirect requests and completions between peers. Only
    root reads it.
    """
    found, is_readable = [], False
    for device in place.names("sys/bus/pci/devices"):
        folder = f"sys/bus/pci/devices/{device}"
        if not (place.read(f"{folder}/class") or "").startswith(f"0x{_BRIDGE:04x}"):
            continue
        try:
            with (place.root / folder / "config").open("rb") as file:
                config = file.read(4096)
        except OSError:
            continue
        if len(config) < 0x104:
            continue
        is_readable = True
        offset = 0x100
        for _ in range(64):  # a list that leads to itself must not be followed for ever
            if not 0x100 <= offset <= len(config) - 8:
                break
            (header,) = struct.unpack_from("<I", config, offset)
            if header & 0xFFFF == _ACS_CAPABILITY:
                (control,) = struct.unpack_from("<H", config, offset + 6)
                if control & 0b1100:
                    found.append(device)
                break
            offset = header >> 20
    return found if is_readable else None


def _text(value: str | bytes | None) -> str:
    return value.decode(errors="replace") if isinstance(value, bytes) else value or ""
