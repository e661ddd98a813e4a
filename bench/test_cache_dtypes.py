"""What a KV cache of 8 bits brings: tokens in the same memory, and batches in turns with the activations' dtype."""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Mapping
from contextlib import ExitStack, closing
from typing import Any

import pytest
from rich.table import Table

from bench.harness import MODULES, OURS, Bench, Side, draw
from bench.machine import num_cores, other_cpu_seconds
from bench.protocol import Worker
from ryzanstein_jax.config import KV_CACHE_DTYPES

#: Share of the host's memory that each engine may take: so little that pages run out before sequences do.
SHARE = 0.06
#: Requests by (how many, tokens of the shortest and the longest prompt, tokens of a completion).
WORKLOADS = {"batch": (32, 32, 256, 64), "long prompts": (8, 1000, 1000, 64)}
_SMOKE_WORKLOADS = {"batch": (2, 8, 16, 8)}


def test_cache_dtypes(bench: Bench, request: pytest.FixtureRequest) -> None:
    """Three engines, alike but for their caches."""
    smoke = request.config.getoption("--smoke")
    longest = 64 if smoke else 4096  # or all sequences could not fill the larger caches
    with ExitStack() as stack:
        sides = []
        for name in KV_CACHE_DTYPES:
            worker = stack.enter_context(closing(Worker(sys.executable, MODULES[OURS])))
            worker.call(
                "start", **bench.settings, kv_cache_dtype=name, max_model_len=longest, memory_fraction=SHARE,
                max_num_seqs=2 if smoke else 32,
                max_num_batched_tokens=16 if smoke else bench.sizes.max_num_batched_tokens,
            )  # fmt: skip
            sides.append(Side(name, worker, worker.call("describe")))
        compare(bench, sides, _SMOKE_WORKLOADS if smoke else WORKLOADS)


def compare(bench: Bench, sides: list[Side], workloads: Mapping[str, tuple[int, int, int, int]]) -> None:
    """Runs the workloads, each side in turn after one unmeasured, and writes medians and ratios of pairs to the first.

    Raises:
        WrongResult: a completion is not as long as it has to be.
    """
    table = Table("KV cache", "bytes a token", "tokens", *workloads, title="cache_dtypes")
    speeds: dict[str, dict[str, list[float]]] = {name: {side.name: [] for side in sides} for name in workloads}
    began, others = time.perf_counter(), other_cpu_seconds()
    for number, (name, (count, low, high, out)) in enumerate(workloads.items()):
        lengths = [low + round((high - low) * i / (count - 1)) for i in range(count)]
        for run in range(bench.runs + 1):
            prompts = draw(lengths, bench.vocab_size, 700 + 50 * number + run)
            for side in sides:
                reply = side.generate(prompts, out)
                if run:
                    speeds[name][side.name].append(count * out / reply["seconds"])
    share = (other_cpu_seconds() - others) / (time.perf_counter() - began) / num_cores()
    figures: dict[str, dict[str, Any]] = {}
    for side in sides:
        about = side.description
        figures[side.name] = {name: about[name] for name in ("kv_bytes_per_token", "num_pages", "cache_tokens")}
        cells = []
        for name, of in speeds.items():
            pairs = zip(of[side.name], of[sides[0].name], strict=True)
            ratio, speed = statistics.median(one / plain for one, plain in pairs), statistics.median(of[side.name])
            figures[side.name][name] = {"tokens_per_s": speed, "ratio": ratio}
            cells.append(f"{speed:.4g} tokens/s, {ratio:.2f}")
        table.add_row(side.name, f"{about['kv_bytes_per_token']:.0f}", str(about["cache_tokens"]), *cells)
    content = {
        "benchmark": "cache_dtypes", "memory_fraction": SHARE, "figures": figures, "runs": speeds,
        "cpu_share_of_others": round(max(share, 0.0), 3), "versions": sides[0].description["versions"],
    }  # fmt: skip
    bench.write("cache_dtypes", content, table)
