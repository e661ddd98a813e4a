"""What the ways to shard communicate and take, measured and predicted; as JSON values and a table."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from typing import Any

from rich.table import Table

from bench.scaling import Rounds, Workload, communication_seconds
from bench.scaling_calibration import predicted
from ryzanstein_jax.model.spec import ModelSpec
from ryzanstein_jax.planner.devices import Device


def entries(
    workload: Workload,
    rounds: Rounds,
    fits: Mapping[str, Mapping[str, float]],
    device: Device | None,
    spec: ModelSpec,
    width: int,
    dtype: str,
) -> list[dict[str, Any]]:
    """One entry for each way; ratios are over the first one, above 1 where it takes longer.

    `collectives` are those of the first step that counts, with the bytes of one result; `sent_bytes` is what a device
    sends in it around a ring.
    """
    found: list[dict[str, Any]] = []
    for name, runs in rounds.steps[workload.name].items():
        steps = [step for run in runs for step in run]
        seconds = statistics.median(rounds.seconds(workload.name, name))
        ratios = [1 / speedup for speedup in rounds.speedups(workload.name, name)]
        entry: dict[str, Any] = {
            "sharding": name,
            "collectives": [
                {"kind": kind, "bytes": size, "count": count} for kind, size, _, count in steps[0]["collectives"]
            ],
            "sent_bytes": sum(count * _sent(kind, size, group) for kind, size, group, count in steps[0]["collectives"]),
            "measured": {
                "seconds_per_step": seconds,
                "ratio": statistics.median(ratios),
                "ratio_least": min(ratios),
                "ratio_most": max(ratios),
            },
            "estimated": {"communication_seconds_per_step": communication_seconds(steps, fits)},
        }
        if device is not None:
            entry["predicted"] = predicted(spec, device, steps, width, dtype, str(name))
            first = found[0]["predicted"] if found else entry["predicted"]
            entry["predicted"]["ratio"] = entry["predicted"]["seconds_per_step"] / first["seconds_per_step"]
            entry["predicted"]["of_measured"] = entry["predicted"]["seconds_per_step"] / seconds
        found.append(entry)
    return found


def _sent(kind: str, size: int, group: int) -> float:
    """Bytes that a device sends around a ring, for a result of `size` bytes on it."""
    whole = size * group if kind == "reduce-scatter" else size
    return (2 if kind == "all-reduce" else 1) * (group - 1) / group * whole


def table_of(result: Mapping[str, Any]) -> Table:
    """All figures, for the end of the run."""
    table = Table(
        "workload", "sharding", "collectives", "sent, MB", "step, ms", "ratio", "predicted, ms", "ratio",
        title=result["benchmark"],
    )  # fmt: skip
    for workload, found in result["workloads"].items():
        for entry in found:
            counts: dict[str, int] = {}
            for one in entry["collectives"]:
                counts[one["kind"]] = counts.get(one["kind"], 0) + one["count"]
            said = entry.get("predicted")
            table.add_row(
                workload if entry is found[0] else "", entry["sharding"],
                ", ".join(f"{count} {kind}" for kind, count in counts.items()), f"{entry['sent_bytes'] / 1e6:.2f}",
                f"{1e3 * entry['measured']['seconds_per_step']:.2f}", f"{entry['measured']['ratio']:.3f}",
                f"{1e3 * said['seconds_per_step']:.2f}" if said else "", f"{said['ratio']:.3f}" if said else "",
            )  # fmt: skip
        table.add_section()
    return table
