"""256 streams for a minute against `ryzanstein serve`: nothing fails, the leader does not grow, and what a token
costs it."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import pytest
from rich.table import Table

from bench.harness import Bench
from bench.load import LONGEST, press, serving
from bench.machine import num_cores, other_cpu_seconds

#: Of the leader's memory, from ten seconds on: what an allocator may still add. A leak shows as more.
_MOST_GROWTH = 1.1


def test_load(bench: Bench, request: pytest.FixtureRequest) -> None:
    """Random prompts of 16 tokens, completions of 16 to 32, each client asking again as soon as it has its answer."""
    smoke = request.config.getoption("--smoke")
    streams, seconds = (16, 1.0) if smoke else (256, 60.0)
    options = [
        "--tp", str(bench.settings["tensor_parallel_size"]), "--dtype", bench.settings["dtype"],
        "--max-model-len", str(LONGEST), "--max-num-seqs", str(streams), "--max-num-batched-tokens", "512",
    ]  # fmt: skip
    if bench.settings["quantization"] is not None:
        options += ["--quantization", bench.settings["quantization"]]
    with serving(bench.settings["model"], *options) as server:
        press(server, streams // 8, 0.0, bench.vocab_size, first_turn=1000)  # loads what a first request needs
        before, began, others = server.metrics(), time.perf_counter(), other_cpu_seconds()
        load = press(server, streams, seconds, bench.vocab_size)
        after, took, others = server.metrics(), time.perf_counter() - began, other_cpu_seconds() - others
    assert load.errors == [], (len(load.errors), load.errors[:3])

    def grown(name: str) -> float:
        return after[name] - before[name]

    assert grown("ryzanstein_generation_tokens_total") == load.num_tokens, "each token came once"
    assert after['ryzanstein_kv_pages{state="used"}'] == 0
    early, late = load.memory_at(seconds / 6), load.memory[-1][1]
    leader = {
        thread: grown(f'ryzanstein_leader_cpu_seconds_total{{thread="{thread}"}}') for thread in ("server", "engine")
    }
    figures: dict[str, Any] = {
        "tokens_per_s": load.num_tokens / took,
        **{f"{name}_p{share}_seconds": float(np.percentile(values, share))
           for name, values in (("first_token", load.first_tokens), ("inter_token", load.gaps)) for share in (50, 99)},
        "leader_memory_bytes_at_10_s": early,
        "leader_memory_bytes_at_end": late,
        **{f"{thread}_cpu_microseconds_per_token": 1e6 * used / load.num_tokens for thread, used in leader.items()},
        "leader_share_of_a_core": sum(leader.values()) / took,
    }  # fmt: skip
    table = Table("figure", "value", title=f"load: {streams} streams, {took:.0f} s")
    for name, value in {"requests": load.num_requests, "errors": 0, **figures}.items():
        table.add_row(name, f"{value:.5g}")
    result = {
        "benchmark": "load",
        "streams": streams,
        "seconds": took,
        "requests": load.num_requests,
        "tokens": load.num_tokens,
        "errors": 0,
        "figures": figures,
        "leader_memory_bytes": [(round(at, 1), size) for at, size in load.memory],
        "cpu_share_of_others": round(max(others / took / num_cores(), 0.0), 3),
    }
    bench.write("load", result, table)
    assert late <= _MOST_GROWTH * early, "the leader grows"
