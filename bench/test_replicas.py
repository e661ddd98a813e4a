"""A replica that is killed: how long its streams pause, beside a single engine that has to be restarted."""

from __future__ import annotations

import statistics
from contextlib import closing
from typing import Any

import pytest
from rich.table import Table

from bench.harness import Bench
from bench.recovery import STREAMS, Drill, kill_rank

MOVED, REPLACED, RESTARTED = "two replicas, one killed", "one, with a standby", "one, without a standby"


def test_replicas(bench: Bench, request: pytest.FixtureRequest) -> None:
    """SIGKILL of rank 0 in the middle of sixteen streams. No request may be lost, nor a token differ."""
    smoke = request.config.getoption("--smoke")
    width, tokens = bench.settings["tensor_parallel_size"], 16 if smoke else 24
    kinds: dict[str, dict[str, Any]] = {
        MOVED: dict(replicas=2, standby=False),
        REPLACED: dict(standby=True),
        RESTARTED: dict(standby=False),
    }
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in kinds}
    moved = 0
    for name, settings in kinds.items():
        with closing(
            Drill(bench.settings["model"], width, tokens, bench.vocab_size, caching=False, **settings)
        ) as drill:
            for _ in range(bench.runs):
                drill.await_ready()
                if settings["standby"]:
                    drill.await_standby()
                found[name].append(drill.disturb(1, kill_rank(0), STREAMS * tokens // 3))
            moved += sum(replica.metrics.counter("requests_moved") for replica in drill.llm.replicas)
    assert moved > 0
    medians = {
        name: statistics.median(run["seconds_to_next_token_of_every_stream"] for run in runs)
        for name, runs in found.items()
    }
    table = Table("SIGKILL of a rank", "next token of every stream after, s", "times that of a move", title="replicas")
    for name, runs in found.items():
        assert all(run["requests_lost"] == run["requests_with_other_tokens"] == 0 for run in runs), (name, runs)
        table.add_row(name, f"{medians[name]:.2f}", f"{medians[name] / medians[MOVED]:.1f}")
    bench.write("replicas", {"width": width, "streams": STREAMS, "requests_moved": moved, "faults": found}, table)
