"""What the kernels for CPUs gain, by kind of step: an engine with them and one without, in turns."""

from __future__ import annotations

import statistics
import sys
from contextlib import ExitStack, closing
from typing import Any

import pytest
from rich.table import Table

from bench.conftest import start_settings
from bench.harness import MODULES, OURS, Bench, Figures, Side, draw
from bench.protocol import Worker
from ryzanstein_jax import native

SIDES = {"kernels": "", "portable": "portable"}


def test_kernels(bench: Bench, request: pytest.FixtureRequest) -> None:
    """Milliseconds of a step of each kind, in the precision of the run."""
    smoke = request.config.getoption("--smoke")
    length, outs = (16, (2, 4)) if smoke else (512, (16, 48))
    with ExitStack() as stack:
        sides = []
        for name, setting in SIDES.items():
            worker = Worker(sys.executable, MODULES[OURS], {native.KERNELS_VARIABLE: setting})
            stack.enter_context(closing(worker))
            worker.call("start", **start_settings(bench, OURS, length + max(outs)))
            sides.append(Side(name, worker, worker.call("describe")))
        compare(bench, sides, length, outs)


def compare(bench: Bench, sides: list[Side], length: int, outs: tuple[int, int]) -> None:
    """Measures each side in turn, after one unmeasured, and writes medians and medians of the ratios of pairs.

    Raises:
        WrongResult: a completion is not as long as it has to be.
    """
    runs: dict[str, list[Figures]] = {side.name: [] for side in sides}
    for run in range(bench.runs + 1):
        for side in sides:
            found = steps(bench, side, 1000 * run, length, outs)
            if run:
                runs[side.name].append(found)
    pairs = list(zip(*(runs[name] for name in SIDES), strict=True))
    names = list(pairs[0][0])
    figures = {side: {name: statistics.median(one[name] for one in of) for name in names} for side, of in runs.items()}
    gains = {name: statistics.median(portable[name] / own[name] for own, portable in pairs) for name in names}
    table = Table("milliseconds", *SIDES, "times faster", title="kernels")
    for name in names:
        table.add_row(name, *(f"{figures[side][name]:.3g}" for side in SIDES), f"{gains[name]:.2f}")
    content: dict[str, Any] = {
        "benchmark": "kernels", "milliseconds": figures, "times_faster": gains, "runs": runs,
        "versions": sides[0].description["versions"],
    }  # fmt: skip
    bench.write("kernels", content, table)


def steps(bench: Bench, side: Side, seed: int, length: int, outs: tuple[int, int]) -> Figures:
    """Milliseconds of each kind of step, of prompts that were never seen.

    Args:
        bench: of the run.
        side: measured.
        seed: of the prompts; the next five are taken too.
        length: of a prompt that fills a step.
        outs: tokens of two completions: how much longer the longer one takes is all decode steps.
    """

    def seconds(lengths: list[int], out: int) -> float:
        nonlocal seed
        seed += 1
        return float(side.generate(draw(lengths, bench.vocab_size, seed), out)["seconds"])

    def decode(count: int, before: int) -> float:
        short, long = (seconds([before] * count, out) for out in outs)
        return (long - short) / (outs[1] - outs[0])

    sizes = bench.sizes
    found = {
        "one decode token": decode(1, sizes.single_in),
        f"{sizes.requests} decode tokens": decode(sizes.requests, length // 16),
        f"a prompt of {sizes.single_in} tokens": seconds([sizes.single_in], 1),
        f"{length} prompt tokens": seconds([length] * 4, 1) / 4,
    }
    return {name: 1000 * value for name, value in found.items()}
