"""GPUs as XLA's compiler wants them described: a `GpuTargetConfigProto` in text form, made of published figures.

Multiprocessors, clocks, caches and shared memory are those of NVIDIA's architecture papers and of the table of compute
capabilities in the CUDA programming guide. On a GPU, JAX tells the true ones: `get_topology_for_devices`.
"""

from __future__ import annotations

from dataclasses import dataclass

from ryzanstein_jax.errors import ConfigError
from ryzanstein_jax.planner.devices import DEVICES


@dataclass(frozen=True)
class GpuTarget:
    """What the compiler asks of a GPU beyond `Device`.

    Attributes:
        product: its name as the driver tells it; some kernels go by it.
        capability: compute capability, major and minor.
        multiprocessors: how many the product has switched on.
        float32_units: of one multiprocessor.
        threads, shared_memory: most that a multiprocessor holds at a time, threads and bytes.
        shared_memory_of_block: most bytes of it that a block may ask for.
        clock_ghz: highest clock.
        l2_cache: bytes.
        nvlinks: links to peers.
    """

    product: str
    capability: tuple[int, int]
    multiprocessors: int
    float32_units: int
    threads: int
    shared_memory: int
    shared_memory_of_block: int
    clock_ghz: float
    l2_cache: int
    nvlinks: int


_KIB, _MIB = 1 << 10, 1 << 20

TARGETS: dict[str, GpuTarget] = {
    "a100": GpuTarget("NVIDIA A100-SXM4-80GB", (8, 0), 108, 64, 2048, 164 * _KIB, 163 * _KIB, 1.41, 40 * _MIB, 12),
    "h100": GpuTarget("NVIDIA H100 80GB HBM3", (9, 0), 132, 128, 2048, 228 * _KIB, 227 * _KIB, 1.98, 50 * _MIB, 18),
    "h200": GpuTarget("NVIDIA H200", (9, 0), 132, 128, 2048, 228 * _KIB, 227 * _KIB, 1.98, 50 * _MIB, 18),
    "b200": GpuTarget("NVIDIA B200", (10, 0), 148, 128, 2048, 228 * _KIB, 227 * _KIB, 1.965, 126 * _MIB, 18),
    "l40s": GpuTarget("NVIDIA L40S", (8, 9), 142, 128, 1536, 100 * _KIB, 99 * _KIB, 2.52, 96 * _MIB, 0),
    "rtx4090": GpuTarget("NVIDIA GeForce RTX 4090", (8, 9), 128, 128, 1536, 100 * _KIB, 99 * _KIB, 2.52, 72 * _MIB, 0),
}


def target_config(name: str) -> str:
    """The description of a GPU of the table, as `jax.experimental.topologies` takes it.

    Raises:
        ConfigError: there is none for this device.
    """
    if name not in TARGETS:
        raise ConfigError("device", name, f"programs can be compiled for {', '.join(TARGETS)}")
    gpu, device = TARGETS[name], DEVICES[name]
    major, minor = gpu.capability
    info = {
        "name": f'"{gpu.product}"',
        "threads_per_block_limit": 1024,
        "threads_per_warp": 32,
        "threads_per_core_limit": gpu.threads,
        "shared_memory_per_block": 48 * _KIB,
        "shared_memory_per_block_optin": gpu.shared_memory_of_block,
        "shared_memory_per_core": gpu.shared_memory,
        "registers_per_core_limit": 1 << 16,
        "registers_per_block_limit": 1 << 16,
        "core_count": gpu.multiprocessors,
        "fpus_per_core": gpu.float32_units,
        "clock_rate_ghz": gpu.clock_ghz,
        "block_dim_limit_x": (1 << 31) - 1,
        "block_dim_limit_y": (1 << 16) - 1,
        "block_dim_limit_z": (1 << 16) - 1,
        "thread_dim_limit_x": 1024,
        "thread_dim_limit_y": 1024,
        "thread_dim_limit_z": 64,
        "device_memory_size": device.memory,
        "memory_bandwidth": int(device.memory_bandwidth),
        "l2_cache_size": gpu.l2_cache,
        "device_address_bits": 64,
        "driver_version": '"13.0.0"',
        "runtime_version": '"13.0.0"',
        "compile_time_toolkit_version": '"13.0.0"',
        "dnn_version": '"9.10.0"',
    }
    lines = [f"  {field}: {value}" for field, value in info.items()]
    lines.append(f"  cuda_compute_capability {{ major: {major} minor: {minor} }}")
    if gpu.nvlinks:
        lines.append(f"  device_interconnect_info {{ active_links: {gpu.nvlinks} }}")
    return "\n".join(
        [
            "gpu_device_info {", *lines, "}", 'platform_name: "CUDA"', "dnn_version_info { major: 9 minor: 10 }",
            f'device_description_str: "{gpu.product}"',
        ]
    )  # fmt: skip
