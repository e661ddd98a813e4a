"""How many devices a machine offers; asked without JAX, which would take them."""

from __future__ import annotations

import os


def is_cpu_wanted() -> bool:
    """Whether the environment asks for CPU devices."""
    return os.environ.get("JAX_PLATFORMS", "").startswith("cpu")


def visible_gpus() -> int:
    """NVIDIA GPUs that a process of this machine may take."""
    if is_cpu_wanted():
        return 0
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    if chosen is not None:
        return len([name for name in chosen.split(",") if name.strip()])
    try:
        return len(os.listdir("/proc/driver/nvidia/gpus"))
    except OSError:
        return 0


def visible_slots(width: int) -> int:
    """Devices of this machine that ranks may take: all GPUs, or as many CPU devices as are asked for."""
    return width if is_cpu_wanted() else max(visible_gpus(), width)
