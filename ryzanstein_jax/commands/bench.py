"""`ryzanstein bench`: what this machine can do."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from ryzanstein_jax.collectives.bandwidth import OPERATIONS
from ryzanstein_jax.collectives.job import AIM_BYTES, AIM_SECONDS, AIM_SHARE, DTYPES, Job, run_job
from ryzanstein_jax.commands.options import Orchestrator
from ryzanstein_jax.errors import ConfigError, counted
from ryzanstein_jax.machine import commit, describe_machine
from ryzanstein_jax.start import parse_options

bench = typer.Typer(no_args_is_help=True, help="Measures this machine.")
_WIDE = 120
_UNITS = {"": 1, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30}


@bench.callback()
def main() -> None:
    """Measures this machine."""


@bench.command()
def collectives(
    devices: Annotated[int | None, typer.Option(help="Of one process: 2, or one with --processes.")] = None,
    processes: Annotated[int, typer.Option(help="Processes with a device each.")] = 1,
    least: Annotated[str, typer.Option("--min", help="Smallest buffer, such as 1K.")] = "1K",
    most: Annotated[str, typer.Option("--max", help="Largest buffer, such as 256M.")] = "256M",
    factor: Annotated[int, typer.Option(help="From one size to the next.")] = 4,
    dtype: Annotated[str, typer.Option(help=f"One of {', '.join(DTYPES)}.")] = "float32",
    operation: Annotated[list[str] | None, typer.Option(help=f"Of {', '.join(OPERATIONS)}. May be repeated.")] = None,
    budget: Annotated[float, typer.Option(help="Seconds for the calls of a size, and as many for its loops.")] = 0.3,
    timeout: Annotated[float, typer.Option(help="Seconds for all of it.")] = 1800.0,
    link: Annotated[
        float | None,
        typer.Option(
            "--link-gb-per-s", help="What a device's link carries in one direction; asked of NVML if not given."
        ),
    ] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="File for all figures.")] = None,
    plot_file: Annotated[
        Path | None, typer.Option("--plot", help="File for a picture; needs the extra `bench`.")
    ] = None,
    orchestrator: Orchestrator = None,
) -> None:
    """Times all-reduce, all-gather, reduce-scatter, all-to-all, broadcast and send/receive, and checks their results.

    Bandwidths are those of nccl-tests. "loop" is one of many in one program, "call" one from dispatch to result.
    """
    if link is not None and not 0 < link <= 1e6:
        raise ConfigError("link-gb-per-s", link, "use a number of GB/s above 0")
    options = parse_options(orchestrator)
    job = Job(
        processes=processes,
        devices=devices if devices is not None else 1 if processes > 1 else 2,
        operations=tuple(operation or OPERATIONS),
        least=parse_size("min", least),
        most=parse_size("max", most),
        factor=factor,
        dtype=dtype,
        budget=budget,
        timeout=timeout,
        given=options.communication_environment() if options else {},
    )
    # Where the output is no terminal no column of the table is cut.
    console = Console(highlight=False, soft_wrap=True, width=None if Console().is_terminal else _WIDE)
    machine = describe_machine()  # how busy it is before this begins

    def tell(event: Mapping[str, Any]) -> None:
        if event["event"] == "point":
            console.print(
                f"{event['operation']:<15}{size_name(event['bytes']):>10}  loop {time_name(event['seconds']):>9}  "
                f"call {time_name(event['call_seconds']):>9}"
            )

    result = run_job(job, tell)
    if link is None and result["platform"] == "gpu":
        link = nvlink()
    result = {
        "benchmark": "collectives",
        **result,
        "link_gb_per_s": link,
        "budget": budget,
        "machine": machine,
        "commit": commit(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    _show(console, result)
    if json_file is not None:
        json_file.parent.mkdir(parents=True, exist_ok=True)
        json_file.write_text(json.dumps(result, indent=1) + "\n")
    if plot_file is not None:
        from ryzanstein_jax.collectives.plot import plot

        plot(result, plot_file)


def nvlink() -> float | None:
    """GB/s in one direction of the GPU with the fewest NVLinks; None without NVML or NVLink."""
    import importlib

    from ryzanstein_jax.doctor.topology import read_topology

    try:
        nvml = importlib.import_module("pynvml")
        nvml.nvmlInit()
    except Exception:  # noqa: BLE001 - not installed, or no driver: then it is unknown
        return None
    try:
        speeds = read_topology(nvml).nvlink_gb_per_s
    finally:
        nvml.nvmlShutdown()
    known = [speed for speed in speeds if speed]
    return min(known) if known and len(known) == len(speeds) else None


def parse_size(field: str, text: str) -> int:
    """Bytes of a text like "256M"; units are powers of 1024.

    Raises:
        ConfigError: it is none.
    """
    match = re.fullmatch(r"(\d{1,12})([kmg]?)i?b?", text.strip().lower())
    if match is None:
        raise ConfigError(field, text, "use a size such as 1K, 64M or 1G")
    return int(match[1]) * _UNITS[match[2]]


def size_name(size: int) -> str:
    """A size as it is asked for."""
    for unit, factor in (("G", 1 << 30), ("M", 1 << 20), ("K", 1 << 10)):
        if size >= factor and size % factor == 0:
            return f"{size // factor}{unit}"
    return str(size)


def time_name(seconds: float) -> str:
    """Seconds, with a unit that suits them."""
    return f"{seconds * 1e6:.1f} us" if seconds < 1e-3 else f"{seconds * 1e3:.2f} ms"


def _show(console: Console, result: Mapping[str, Any]) -> None:
    link = result["link_gb_per_s"]
    devices, processes = counted(result["devices"], "device"), counted(result["processes"], "process")
    console.print(
        f"\n{result['backend']}: {devices} ({result['device']}) in {processes}, "
        f"{result['dtype']}, link {f'{link:g} GB/s' if link else 'unknown'}; all results are right"
    )
    if result["broadcast"] == "sum":
        console.print("broadcast: XLA has none here; it is an all-reduce in which all but one add zeros")
    table = Table("collective", "bytes", "loop", "call", "call p99", "algorithm GB/s", "bus GB/s", "of link", box=None)
    for point in result["points"]:
        bus = point["bus_bandwidth"] / 1e9
        table.add_row(
            point["operation"],
            size_name(point["bytes"]),
            time_name(point["seconds"]),
            time_name(point["call_seconds"]),
            time_name(point["call_p99_seconds"]),
            f"{point['algorithm_bandwidth'] / 1e9:.3g}",
            f"{bus:.3g}",
            f"{bus / link:.0%}" if link else "unknown",
        )
    console.print(table)
    for name, fit in result["fits"].items():
        slope = f"{1e-9 / fit['beta']:.3g} GB/s" if fit["beta"] > 0 else "any size alike"
        console.print(f"{name}: {time_name(fit['alpha'])} + bytes / ({slope}), at most {fit['error']:.0%} off")
    _show_aim(console, result)


def _show_aim(console: Console, result: Mapping[str, Any]) -> None:
    """What the design asks for beside what was measured."""
    close = [p for p in result["points"] if p["operation"] == "all-reduce" and abs(p["bytes"] / AIM_BYTES - 1) < 0.01]
    if not close:
        return
    (point, link) = (close[0], result["link_gb_per_s"])
    share = f"{point['bus_bandwidth'] / 1e9 / link:.0%} of the link" if link else "the link is unknown"
    note = "" if result["platform"] == "gpu" else " (the aim is for GPUs on NVLink; this is no such machine)"
    console.print(
        f"10 MB all-reduce: {time_name(point['seconds'])}, {share}; "
        f"aim: under {time_name(AIM_SECONDS)} and over {AIM_SHARE:.0%}{note}"
    )
