"""A picture of a measurement: time and bus bandwidth by size. Needs matplotlib, of the extra `bench`."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ryzanstein_jax.errors import ConfigError, counted


def plot(result: Mapping[str, Any], path: Path) -> None:
    """Draws what `run_job` returned, as the kind of picture that the file's ending says.

    Raises:
        ConfigError: matplotlib is not installed, or does not write such files.
    """
    try:
        figures = importlib.import_module("matplotlib.figure")
    except ImportError as error:
        raise ConfigError("plot", str(path), "pip install 'ryzanstein-jax[bench]'") from error
    figure = figures.Figure(figsize=(10, 4), layout="constrained")
    times, bandwidths = figure.subplots(1, 2)
    for operation in dict.fromkeys(point["operation"] for point in result["points"]):
        points = [point for point in result["points"] if point["operation"] == operation]
        sizes = [point["bytes"] for point in points]
        (line,) = times.plot(sizes, [point["seconds"] * 1e6 for point in points], marker=".", label=operation)
        bandwidths.plot(sizes, [point["bus_bandwidth"] / 1e9 for point in points], marker=".", label=operation)
        fit = result["fits"].get(operation)
        if fit is not None:
            fitted = [(fit["alpha"] + fit["beta"] * size) * 1e6 for size in sizes]
            times.plot(sizes, fitted, linestyle=":", linewidth=1, color=line.get_color())
    if result.get("link_gb_per_s"):
        bandwidths.axhline(result["link_gb_per_s"], color="black", linewidth=1, linestyle="--", label="link")
    for axes, label in ((times, "loop, us (dotted: fit)"), (bandwidths, "bus, GB/s")):
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xlabel("bytes")
        axes.set_ylabel(label)
        axes.grid(alpha=0.3)
    bandwidths.legend(fontsize="small")
    how = counted(result["processes"], "process")
    figure.suptitle(f"{counted(result['devices'], 'device')} ({result['device']}), {how}: {result['backend']}")
    try:
        figure.savefig(path, dpi=70)
    except ValueError as error:
        raise ConfigError("plot", str(path), "use a name that ends in .png, .svg or .pdf") from error
