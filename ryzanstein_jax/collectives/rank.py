"""One process of a measurement: `job` starts as many as it takes. Reads what to do from its standard input, as JSON.

It writes JSON lines: what it runs on, each point as it is measured, and the end. Only rank 0 writes points.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from typing import Any

from ryzanstein_jax.orchestrator import runtime
from ryzanstein_jax.orchestrator.agent import die_with_parent


def describe(settings: list[Any]) -> dict[str, Any]:
    """What the runtime of this process is: backend, devices, versions."""
    import jax
    import jaxlib

    device = jax.devices()[0]
    on_cpu = device.platform == "cpu"
    return {
        "backend": "NCCL" if not on_cpu else "Gloo" if jax.process_count() > 1 else "XLA, within the process",
        "platform": device.platform,
        "platform_version": jax.extend.backend.get_backend().platform_version.splitlines()[0],
        "device": device.device_kind,
        "devices": jax.device_count(),
        "processes": jax.process_count(),
        "versions": {
            "python": sys.version.split()[0],
            "jax": jax.__version__,
            "jaxlib": jaxlib.__version__,
        },
        "settings": [dataclasses.asdict(setting) for setting in settings],
    }


def run(order: dict[str, Any]) -> None:
    """Joins the runtime and measures; the order's fields are those that `job` writes."""
    import jax
    import jax.extend  # `describe` asks it

    from ryzanstein_jax.collectives.measure import has_broadcast, measure

    rank, processes = order["rank"], order["processes"]
    slot = rank if processes > 1 else -1
    settings = runtime.prepare(slot, order["devices"], rank, processes, order["given"])
    if processes == 1 and not runtime.platform_is_cpu():  # the first of however many GPUs there are
        jax.config.update("jax_cuda_visible_devices", ",".join(map(str, range(order["devices"]))))
    if processes > 1:
        runtime.join(order["address"], rank, processes, hosted=order["hosted"])
    found = jax.device_count()
    wanted = processes * order["devices"]
    if found != wanted:
        say("failed", message=f"{found} devices were found, not {wanted}")
        return
    say("start", **describe(settings), broadcast="collective" if has_broadcast(jax.devices()[0].platform) else "sum")
    for point in measure(order["points"], order["dtype"], order["budget"]):
        say("point", **dataclasses.asdict(point))
    say("end")


def say(event: str, **fields: Any) -> None:
    """One line for the process that started this one."""
    sys.stdout.write(json.dumps({"event": event, **fields}) + "\n")
    sys.stdout.flush()


def main() -> None:
    """Of the process that `job` starts."""
    die_with_parent(int(sys.argv[1]))
    order = json.load(sys.stdin)
    os.environ.update(order["given"])
    try:
        run(order)
    except Exception as error:  # noqa: BLE001 - the process that started this one tells of it
        say("failed", message=f"{type(error).__name__}: {error}"[:2000])
        sys.stdout.flush()
        os._exit(1)  # a runtime that has failed may wait for others when it is torn down
    os._exit(0)


if __name__ == "__main__":
    main()
