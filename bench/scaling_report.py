"""What scaling measured, beside predictions, targets and an earlier result; as JSON values, a table and a picture."""

from __future__ import annotations

import importlib
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.table import Table

from bench.scaling import Rounds, Steps, Workload, communication_seconds
from bench.scaling_calibration import predicted
from ryzanstein_jax.model.spec import ModelSpec
from ryzanstein_jax.planner.devices import Device
from ryzanstein_jax.planner.targets import TARGETS

#: A ratio that has fallen below this share of the earlier one is a regression; rounds scatter by a few percent.
REGRESSION = 0.9

#: Title -> figure, how it is written, and in how many of the unit one of it is.
_COLUMNS = {
    "step, ms": ("seconds_per_step", "{:.2f}", 1e3),
    "tokens/s": ("tokens_per_s", "{:.0f}", 1.0),
    "speedup": ("speedup", "{:.2f}x", 1.0),
    "efficiency": ("efficiency", "{:.0%}", 1.0),
    "communication": ("communication_share", "{:.1%}", 1.0),
    "of measured": ("of_measured", "{:.0%}", 1.0),
}

Fits = Mapping[str, Mapping[str, float]]


def targets_of(width: int) -> dict[str, float]:
    """The original design's targets at a width, by the name of the figure that they are for."""
    speedups = [target.speedup for target in TARGETS if target.width == width and target.speedup is not None]
    shares = [t.communication_share for t in TARGETS if t.communication_share is not None and t.width in (None, width)]
    found = {"speedup": max(speedups)} if speedups else {}
    return found | ({"communication_share": min(shares)} if shares else {})


def entries(
    workload: Workload,
    rounds: Rounds,
    fits: Mapping[int, Fits],
    devices: Mapping[int, Device],
    spec: ModelSpec,
    dtype: str,
) -> list[dict[str, Any]]:
    """One entry a width, in which each figure stands under what it is: measured, estimated, predicted, target.

    Args:
        fits: by width above 1.
        devices: by width; none leaves predictions out.
    """
    found = []
    for width, runs in rounds.steps[workload.name].items():
        steps: Steps = [step for run in runs for step in run]
        seconds = statistics.median(rounds.seconds(workload.name, width))
        tokens = statistics.fmean(step["asked_decodes"] + step["asked_prefill"] for step in steps)
        measured = {"seconds_per_step": seconds, "tokens_per_s": tokens / seconds}
        entry: dict[str, Any] = {"width": width, "steps_per_round": len(runs[0]), "measured": measured}
        if width > 1:
            speedups = rounds.speedups(workload.name, width)
            speedup = statistics.median(speedups)
            measured |= {
                "speedup": speedup,
                "efficiency": speedup / width,
                "speedup_least": min(speedups),
                "speedup_most": max(speedups),
            }
            communication = communication_seconds(steps, fits[width])
            entry["estimated"] = {
                "communication_seconds_per_step": communication,
                "communication_share": communication / seconds,
            }
            entry["target"] = targets_of(width)
        if devices:
            entry["predicted"] = predicted(spec, devices[width], steps, width, dtype)
            entry["predicted"]["of_measured"] = entry["predicted"]["seconds_per_step"] / seconds
            if width > 1:
                alone = found[0]["predicted"]["seconds_per_step"]
                speedup = alone / entry["predicted"]["seconds_per_step"]
                entry["predicted"] |= {"speedup": speedup, "efficiency": speedup / width}
            else:
                del entry["predicted"]["communication_share"]
        found.append(entry)
    return found


def regressions(result: Mapping[str, Any], earlier: Mapping[str, Any] | None) -> dict[str, Any]:
    """Ratios of this result over those of an earlier one: 1 is the same, below `REGRESSION` it is flagged.

    Compared are only figures that a slower machine does not change: speedup, and the predicted time over the measured
    one ("speed against prediction"), since the prediction was calibrated in the same run.
    """
    if earlier is None:
        return {"with": None, "ratios": {}, "regressions": [], "note": "there is no earlier result"}
    named = {"commit": earlier.get("commit"), "date": earlier.get("date")}
    different = [name for name in ("shape", "dtype", "requests") if result.get(name) != earlier.get(name)]
    if different:
        note = f"not comparable: another {', '.join(different)}"
        return {"with": named, "ratios": {}, "regressions": [], "note": note}
    ratios = {}
    for name, now in result["workloads"].items():
        before = {entry["width"]: entry for entry in earlier["workloads"].get(name, [])}
        for entry in now:
            if entry["width"] in before:
                figures, old = _comparable(entry), _comparable(before[entry["width"]])
                for figure in figures.keys() & old.keys():
                    ratios[f"{name}, width {entry['width']}, {figure}"] = figures[figure] / old[figure]
    fallen = sorted(name for name, ratio in ratios.items() if ratio < REGRESSION)
    return {"with": named, "ratios": dict(sorted(ratios.items())), "regressions": fallen, "note": ""}


def _comparable(entry: Mapping[str, Any]) -> dict[str, float]:
    found = {}
    if "speedup" in entry["measured"]:
        found["speedup"] = entry["measured"]["speedup"]
    if "predicted" in entry:
        ratio = entry["predicted"]["seconds_per_step"] / entry["measured"]["seconds_per_step"]
        found["speed against prediction"] = ratio
    return found


def table_of(name: str, result: Mapping[str, Any]) -> Table:
    """All figures, for the end of the run."""
    compared = result["compared"]
    fallen = compared["regressions"]
    caption = f"slower than {compared['with']}: {'; '.join(fallen)}" if fallen else compared["note"] or "no regression"
    table = Table("workload", "devices", "", *_COLUMNS, title=name, caption=caption)
    for workload, found in result["workloads"].items():
        for entry in found:
            for kind in ("measured", "estimated", "predicted", "target"):
                cells = [
                    form.format(scale * entry[kind][figure]) if figure in entry.get(kind, {}) else ""
                    for figure, form, scale in _COLUMNS.values()
                ]
                if any(cells):
                    first = kind == "measured"
                    place = (workload if entry is found[0] else "", str(entry["width"])) if first else ("", "")
                    table.add_row(*place, kind, *cells)
        table.add_section()
    return table


def plot(name: str, result: Mapping[str, Any], path: Path) -> None:
    """Draws speedup by width and share of communication, for each workload. Needs matplotlib, of the extra `bench`."""
    workloads = result["workloads"]
    figure = importlib.import_module("matplotlib.figure").Figure(figsize=(10, 4), layout="constrained")
    speedups, shares = figure.subplots(1, 2)
    widths = [entry["width"] for entry in next(iter(workloads.values()))]
    wider = [width for width in widths if width > 1]
    bar = 0.8 / max(1, len(wider))
    for place, width in enumerate(wider):
        found = {w: next(e for e in entries_ if e["width"] == width) for w, entries_ in workloads.items()}
        at = [index + (place - (len(wider) - 1) / 2) * bar for index in range(len(found))]
        for axes, measured, figure_name, label in (
            (speedups, "measured", "speedup", f"{width} devices, measured"),
            (shares, "estimated", "communication_share", f"{width} devices, estimated"),
        ):
            values = [entry[measured][figure_name] for entry in found.values()]
            bars = axes.bar(at, values, 0.9 * bar, label=label)
            color = bars.patches[0].get_facecolor()
            known = [
                (x, e["predicted"][figure_name]) for x, e in zip(at, found.values(), strict=True) if "predicted" in e
            ]
            if known:
                axes.plot(*zip(*known, strict=True), "kD", markersize=5, label="predicted" if place == 0 else None)
            target = next(iter(found.values()))["target"].get(figure_name)
            if target is not None and (figure_name == "speedup" or place == 0):
                line_color = color if figure_name == "speedup" else "black"
                axes.axhline(target, linestyle="--", linewidth=1, color=line_color, label=f"target {target:g}")
    speedups.set_ylabel("speedup over one device")
    shares.set_ylabel("share of communication")
    for axes in (speedups, shares):
        axes.set_xticks(range(len(workloads)), [w.replace(", ", "\n") for w in workloads])
        axes.grid(alpha=0.3, axis="y")
        axes.legend(fontsize="small")
    figure.suptitle(f"{name}: one core per device, {result['machine']['cpu']}")
    figure.savefig(path, dpi=70)
