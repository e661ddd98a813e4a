"""The GPUs: their state, how they are connected, and what stands between them."""

from __future__ import annotations

import dataclasses
import importlib
from typing import Any

from ryzanstein_jax.doctor.finding import Place, Section
from ryzanstein_jax.doctor.host import gpus_of_driver
from ryzanstein_jax.doctor.topology import Topology, acs_bridges, read_topology
from ryzanstein_jax.orchestrator.gpu_problems import problems
from ryzanstein_jax.orchestrator.telemetry import GpuTelemetry


def check_gpus(section: Section, place: Place, nvml: Any | None = None) -> None:
    """All GPUs of this machine, whatever CUDA_VISIBLE_DEVICES says.

    Args:
        nvml: a module like `pynvml`; None imports it if it is installed.
    """
    telemetry = GpuTelemetry(nvml)
    try:
        section.facts["gpus"] = gpus_of_driver(place)
        if not telemetry.available:
            text = f"no GPU is seen: {telemetry.reason}"
            if section.facts["gpus"]:
                section.warn(f"{section.facts['gpus']} GPUs are here, but {telemetry.reason}",
                             "pip install nvidia-ml-py; if it is installed, see that nvidia-smi works")  # fmt: skip
            else:
                section.ok(text)
            return
        sample = telemetry.sample()
        section.facts |= {"gpus": len(sample.gpus), "samples": [dataclasses.asdict(gpu) for gpu in sample.gpus]}
        for gpu in sample.gpus:
            if not gpu.lost:
                memory = f", {gpu.memory_total / 2**30:.0f} GiB" if gpu.memory_total else ""
                section.ok(f"GPU {gpu.index}: {gpu.name or 'unknown'}{memory}, {gpu.pci_bus_id or 'bus unknown'}")
        for found in problems(sample, own_processes=()):
            (section.problem if found.severity == "fatal" else section.warn)(found.text, found.remedy)
        topology = read_topology(nvml if nvml is not None else importlib.import_module("pynvml"))
    finally:
        telemetry.close()
    section.facts["topology"] = dataclasses.asdict(topology)
    section.facts["driver"] = topology.driver
    _judge(section, topology, place)


def _judge(section: Section, topology: Topology, place: Place) -> None:
    if topology.mig:
        divided = ", ".join(map(str, topology.mig))
        section.warn(f"GPU {divided} is divided (MIG): a process sees one part, and parts can't communicate",
                     "use tensor_parallel_size=1 on a part, or switch MIG off (nvidia-smi -mig 0)")  # fmt: skip
    if "CUDA_MPS_PIPE_DIRECTORY" in place.environ or (place.root / "tmp" / "nvidia-mps").exists():
        section.warn("the Multi-Process Service (MPS) is on: an error of one process ends those that share its GPU",
                     "stop it (echo quit | nvidia-cuda-mps-control) where the engine has the GPUs alone")  # fmt: skip
    count = len(topology.names)
    if count < 2:
        return
    kinds = sorted(set(topology.names))
    if len(kinds) > 1:
        section.warn(f"GPUs of several kinds: {', '.join(kinds)}: a group runs at the pace of the slowest",
                     "choose equal ones with CUDA_VISIBLE_DEVICES")  # fmt: skip
    ways = {topology.matrix[one][other] for one in range(count) for other in range(count) if one != other}
    speeds = [speed for speed in topology.nvlink_gb_per_s if speed is not None]
    if all(way.startswith("NV") for way in ways):
        speed = f", {min(speeds):g} GB/s a GPU in each direction" if len(speeds) == count else ""
        section.ok(f"NVLink between all {count} GPUs ({', '.join(sorted(ways))}){speed}")
        return
    section.ok(f"GPUs are connected by {', '.join(sorted(ways))}")
    if "SYS" in ways:
        section.warn("some GPUs reach each other only across the processors' sockets (SYS)",
                     "choose GPUs of one socket with CUDA_VISIBLE_DEVICES")  # fmt: skip
    bridges = acs_bridges(place)
    if bridges:
        section.warn(f"ACS sends traffic between GPUs over the root complex ({', '.join(bridges[:4])}): slow, or stuck",
                     "switch ACS off in the firmware, or with setpci; see NCCL's troubleshooting page")  # fmt: skip
    elif place.names("sys/kernel/iommu_groups"):
        unknown = "" if bridges is not None else "; ACS could not be read (only root may)"
        section.warn(f"the IOMMU is on and GPUs communicate over PCIe: that can be slow, or hang{unknown}",
                     "boot with iommu=pt, or switch it off where no virtual machine needs it")  # fmt: skip
