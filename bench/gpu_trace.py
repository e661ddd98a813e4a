"""What a trace of some steps says: which kernels took the time, and how much of it none ran."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

#: Lines of a device's plane that repeat what its streams tell, in other groups.
_DERIVED = ("XLA Modules", "XLA Ops", "Steps", "Framework", "Source", "Launch Stats", "Async XLA Ops")
_MOST = 12


def kernels_of(profile: Any, steps: int) -> dict[str, Any]:
    """Sums over the devices' streams.

    Args:
        profile: a `jax.profiler.ProfileData`, or what looks like one.
        steps: that were traced.

    Returns:
        `kernels`: the largest by time, with launches and seconds a step and share of all kernels' time; `launches`: of
        kernels, a step; `graph_launches`: of CUDA graphs, a step, as the host made them; `busy_share`: of the time
        from the first kernel to the end of the last, that in which one ran. Empty of kernels where the trace has
        no device, as on a processor.
    """
    seconds: dict[str, float] = defaultdict(float)
    counts: dict[str, int] = defaultdict(int)
    spans, graphs = [], 0
    for plane in profile.planes:
        on_device = plane.name.startswith("/device:GPU")
        for line in plane.lines:
            if on_device and line.name.startswith(_DERIVED):
                continue
            for event in line.events:
                if on_device:
                    seconds[event.name] += event.duration_ns * 1e-9
                    counts[event.name] += 1
                    spans.append((event.start_ns, event.start_ns + event.duration_ns))
                elif event.name.lower().startswith("cugraphlaunch"):
                    graphs += 1
    total = sum(seconds.values())
    largest = sorted(seconds, key=lambda name: -seconds[name])[:_MOST]
    return {
        "kernels": [
            {
                "name": name[:120], "launches": counts[name] / steps, "seconds": seconds[name] / steps,
                "share": seconds[name] / total,
            }
            for name in largest
        ],
        "launches": sum(counts.values()) / steps,
        "kernel_seconds": total / steps,
        "graph_launches": graphs / steps,
        "busy_share": _covered(spans) / (max(end for _, end in spans) - min(begin for begin, _ in spans))
        if spans
        else None,
    }  # fmt: skip


def _covered(spans: list[tuple[float, float]]) -> float:
    """Length of the union of these intervals."""
    covered = reached = 0.0
    for begin, end in sorted(spans):
        covered += max(0.0, end - max(begin, reached))
        reached = max(reached, end)
    return covered
