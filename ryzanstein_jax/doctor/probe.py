"""A short real use of JAX: backend, devices, a matrix product on each, a sum over all. `devices` runs it in a process.

It writes a JSON line after each stage, so that whoever reads them knows where it hangs or dies.
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any

from ryzanstein_jax.orchestrator import runtime
from ryzanstein_jax.orchestrator.agent import die_with_parent

_SIDE = 256  # of the matrices


def cuda_versions() -> dict[str, int]:
    """What the loaded libraries of NVIDIA say of themselves, as their own numbers; empty without the plugin."""
    try:
        from jax._src.lib import cuda_versions as versions
    except ImportError:
        return {}
    found = {}
    for name in ("cuda_runtime", "cuda_driver", "cudnn", "cublas"):
        try:
            found[name] = int(getattr(versions, f"{name}_get_version")())
        except Exception:  # noqa: BLE001 - what does not tell is left out
            continue
    return found


def probe() -> None:
    """Goes through the stages; an exception is the caller's to tell of."""
    import jax
    import jaxlib

    say("imported", jax=jax.__version__, jaxlib=jaxlib.__version__)
    runtime.prepare(-1, 2, 0, 1, {})
    devices = jax.devices()
    say(
        "backend",
        platform=devices[0].platform,
        devices=[{"kind": device.device_kind, "memory": memory_of(device)} for device in devices],
        cuda=cuda_versions(),
    )
    import numpy as np
    from jax.sharding import Mesh, NamedSharding, PartitionSpec

    left = (np.arange(_SIDE * _SIDE) % 7).reshape(_SIDE, _SIDE).astype(np.float32)
    right = (np.arange(_SIDE * _SIDE) % 5).reshape(_SIDE, _SIDE).astype(np.float32)
    product = jax.jit(lambda a, b: a @ b)
    for device in devices:
        result = np.asarray(product(jax.device_put(left, device), jax.device_put(right, device)))
        if not np.array_equal(result, left @ right):  # whole numbers below 2^24: exact, in whatever order
            raise ArithmeticError(f"{device} multiplies wrongly: {result[0, :3]}, expected {(left @ right)[0, :3]}")
    say("computed")
    mesh = Mesh(np.array(devices), ("devices",))
    total = jax.jit(
        jax.shard_map(
            lambda part: jax.lax.psum(part, "devices"), mesh=mesh, in_specs=PartitionSpec("devices"),
            out_specs=PartitionSpec(), check_vma=False,
        )
    )  # fmt: skip
    values = np.arange(len(devices) * 1024, dtype=np.float32).reshape(len(devices), 1024)
    placed = jax.device_put(values, NamedSharding(mesh, PartitionSpec("devices")))
    if not np.array_equal(np.asarray(total(placed))[0], values.sum(0)):
        raise ArithmeticError(f"an all-reduce over {len(devices)} devices adds wrongly")
    say("communicated", devices=len(devices))


def memory_of(device: Any) -> int | None:
    """Bytes that JAX may take of a device; None where it does not tell, as for a CPU."""
    stats = device.memory_stats() if device.platform != "cpu" else None
    return int(stats["bytes_limit"]) if stats and "bytes_limit" in stats else None


def say(stage: str, **fields: Any) -> None:
    """One line for the process that started this one."""
    sys.stdout.write(json.dumps({"stage": stage, **fields}) + "\n")
    sys.stdout.flush()


def main() -> None:
    """Of the process that `devices` starts."""
    die_with_parent(int(sys.argv[1]))
    try:
        probe()
    except Exception as error:  # noqa: BLE001 - it is what was looked for
        say("failed", message=f"{type(error).__name__}: {error}"[:2000])
    sys.stdout.flush()
    os._exit(0)  # a runtime that is unwell may not come to an end by itself


if __name__ == "__main__":
    main()
