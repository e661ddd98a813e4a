"""A plan for people: tables and a plot."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from pathlib import Path

from rich.table import Table

from ryzanstein_jax.communication import Collective
from ryzanstein_jax.errors import ConfigError
from ryzanstein_jax.planner.calibration import NO_LINK
from ryzanstein_jax.planner.compiled import Compiled, Expected
from ryzanstein_jax.planner.estimate import Estimate, Plan
from ryzanstein_jax.planner.targets import verdicts

_GIB = 1 << 30
_LIMITS = {
    "weights": "reading weights", "kv": "reading the KV cache", "compute": "arithmetic",
    "communication": "communication", "host": "the host", "other": "attention, norms",
}  # fmt: skip


def plan_table(plan: Plan, device: str) -> Table:
    """One row for each width and batch on one device of the plan."""
    setting, kind = plan.setting, plan.devices[device]
    title = f"{plan.model} on {kind.title}: {setting.context} tokens each, prompt {setting.prompt}"
    if setting.sharding != "megatron":
        title += f", sharding {setting.sharding}"
    table = Table(title=title, title_justify="left", box=None, pad_edge=False)
    for heading in (
        "tp", "batch", "weights", "KV", "temp", "GiB in all", "largest batch", "first token", "token", "tokens/s",
        "speedup", "efficiency", "comm.", "limit",
    ):  # fmt: skip
        table.add_column(heading, justify="left" if heading == "limit" else "right")
    for row in plan.rows:
        if row.device == device:
            table.add_row(*_cells(row))
    return table


def _cells(row: Estimate) -> list[str]:
    memory = row.memory
    return [
        str(row.width), str(row.batch), _gib(memory.weights), _gib(memory.kv_cache),
        _gib(memory.temporaries + memory.logits), f"{_gib(memory.total)}{'' if memory.fits else ' too much'}",
        str(row.largest_batch) if row.largest_batch else "none", _time(row.first_token), _time(row.step.total),
        f"{row.tokens_per_second:,.0f}", f"{row.speedup:.2f}", f"{row.efficiency:.0%}",
        f"{row.step.communication_share:.0%}", _LIMITS[row.step.limit],
    ]  # fmt: skip


def targets_table(plan: Plan) -> Table:
    """The original design's targets, each with what the plan says of it."""
    table = Table(
        "target", "device", "tp", "by this plan", title="The design's targets", title_justify="left", box=None
    )
    for verdict in verdicts(plan):
        table.add_row(verdict.target.name, verdict.device, str(verdict.width), str(verdict))
    return table


def assumptions(plan: Plan) -> list[str]:
    """What the figures rest on, a line for each device."""
    lines = []
    for device in plan.devices.values():
        link = device.link
        rate = " or ".join(f"{rate / 1e12:,.2f} ({dtype})" for dtype, rate in device.rates.items() if dtype != "float8")
        kernel = f", kernels {1e6 * link.kernel:.1f} us" if link.kernel is not None else ""
        sending = f"bus {link.bus_bandwidth / 1e9:,.0f} GB/s, all-reduce from {1e6 * link.start:.0f} us{kernel}, "
        if link.bus_bandwidth >= NO_LINK:
            sending = ""
        lines.append(
            f"{device.title}: {device.memory / _GIB:.1f} GiB, {device.memory_bandwidth / 1e9:,.0f} GB/s x "
            f"{device.memory_share:.0%}, {rate} Tflop/s x {device.compute_share:.0%}, "
            f"{sending}"
            f"host {1e3 * device.host_seconds:.2f} ms a step"
        )
    return lines


def compiled_table(found: Sequence[tuple[Compiled, Expected]]) -> Table:
    """What the compiler says of each program, beside the planner's sum."""
    table = Table(title="Compiled for", title_justify="left", box=None, pad_edge=False)
    for heading in (
        "device", "tp", "program", "arguments", "temp", "GiB in all", "planned", "cache in place", "collectives",
        "as planned", "graphs", "kernels", "loops",
    ):  # fmt: skip
        table.add_column(heading, justify="left" if heading in ("device", "program", "collectives") else "right")
    for compiled, expected in found:
        job = compiled.job
        table.add_row(
            job.device, str(job.width), job.name, _gib(compiled.arguments), _gib(compiled.temporaries),
            _gib(compiled.total), f"{expected.total / compiled.total - 1:+.2%}", _yes(compiled.cache_in_place),
            _collectives(compiled.collectives), _yes(same_collectives(compiled, expected)), str(compiled.graphs),
            str(compiled.kernels), str(compiled.loops),
        )  # fmt: skip
    return table


def same_collectives(compiled: Compiled, expected: Expected) -> bool:
    """Whether kinds, bytes, groups and counts are all as planned."""
    return sorted(compiled.collectives, key=str) == sorted(expected.collectives, key=str)


def save_plot(plan: Plan, path: Path) -> None:
    """Draws step time by part and speedup, for each device and batch, over the widths.

    Raises:
        ConfigError: matplotlib isn't installed.
    """
    try:
        figures = importlib.import_module("matplotlib.figure")  # of an extra
    except ImportError as error:
        raise ConfigError("plot", str(path), "it takes matplotlib: pip install 'ryzanstein-jax[bench]'") from error
    groups: dict[tuple[str, int], list[Estimate]] = {}
    for row in plan.rows:
        groups.setdefault((row.device, row.batch), []).append(row)
    figure = figures.Figure(figsize=(11, 4.5), layout="constrained")
    bars, lines = figure.subplots(1, 2)
    labels: list[str] = []
    for (device, batch), rows in groups.items():
        for row in rows:
            bottom = 0.0
            for number, part in enumerate(("weights", "kv", "compute", "communication", "other")):
                height = 1e3 * getattr(row.step, part)
                bars.bar(len(labels), height, bottom=bottom, color=f"C{number}", label=part if not labels else None)
                bottom += height
            labels.append(f"{device} tp {row.width}\nbatch {batch}")
        lines.plot([row.width for row in rows], [row.speedup for row in rows], "o-", label=f"{device}, batch {batch}")
    widths = sorted({row.width for row in plan.rows})
    lines.plot(widths, widths, "k:", label="ideal")
    bars.set_xticks(range(len(labels)), labels, rotation=90, fontsize=7)
    bars.set(ylabel="predicted ms of a decode step", title=plan.model)
    lines.set(xlabel="devices", ylabel="predicted speedup of a decode step", xticks=widths)
    bars.legend()
    lines.legend(fontsize=7)
    figure.savefig(path, dpi=120)


def _collectives(found: Sequence[Collective]) -> str:
    return ", ".join(f"{one.count} {one.kind} of {one.bytes / 1024:,.0f} KiB" for one in found) or "none"


def _yes(value: bool) -> str:
    return "yes" if value else "NO"


def _gib(size: float) -> str:
    return f"{size / _GIB:.2f}"


def _time(seconds: float) -> str:
    return f"{1e3 * seconds:,.2f} ms" if seconds < 1 else f"{seconds:,.2f} s"
