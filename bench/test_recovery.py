"""Recovery: seconds and losses by kind of fault, and a soak of kills at random times."""

from __future__ import annotations

import random
import statistics
import threading
import time
from contextlib import closing
from pathlib import Path
from typing import Any

import psutil
import pytest
from rich.table import Table

from bench.harness import Bench
from bench.recovery import FAULTS, STREAMS, Drill, kill_all, kill_rank

SOAK_SEED = 1


def test_recovery(bench: Bench, request: pytest.FixtureRequest) -> None:
    """Each kind of fault, in the middle of sixteen streams. No request may be lost, nor a token differ."""
    smoke = request.config.getoption("--smoke")
    width, tokens = max(2, bench.settings["tensor_parallel_size"]), 16 if smoke else 48
    found: dict[str, list[dict[str, Any]]] = {}
    with closing(Drill(bench.settings["model"], width, tokens, bench.vocab_size)) as drill:
        for _ in range(bench.runs):
            # Each fault waits for a new standby, which takes seconds.
            for number, (name, act) in enumerate(list(FAULTS.items())[: 1 if smoke else None]):
                # Rounds repeat, so that each is known undisturbed; what was struck is never what was just cached.
                found.setdefault(name, []).append(drill.strike(1 + number, act, after_tokens=STREAMS * tokens // 3))
        start_seconds = drill.start_seconds
    table = Table("fault", "seen after, s", "next token of every stream after, s", "replayed", "lost", title="recovery")
    for name, runs in found.items():
        assert all(run["requests_lost"] == run["requests_with_other_tokens"] == 0 for run in runs), (name, runs)
        seen, resumed = (
            statistics.median(run[key] for run in runs)
            for key in ("seconds_to_detect", "seconds_to_next_token_of_every_stream")
        )
        table.add_row(name, f"{seen:.3f}", f"{resumed:.2f}", str(runs[0]["requests_replayed"]), "0")
    bench.write(
        "recovery", {"width": width, "streams": STREAMS, "start_seconds": start_seconds, "faults": found}, table
    )


def test_narrower(bench: Bench, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    """A device is left out at its first fault, with the programs of the width that is left compiled before, or not."""
    smoke = request.config.getoption("--smoke")
    width, tokens = max(2, bench.settings["tensor_parallel_size"]), 16 if smoke else 48
    found: dict[str, dict[str, Any]] = {}
    for name, rehearsed in (("compiled before", True), ("not compiled before", False)):
        folder = tmp_path / name
        with closing(
            Drill(bench.settings["model"], width, tokens, bench.vocab_size, programs=str(folder), max_device_failures=1)
        ) as drill:
            if rehearsed:
                began = time.monotonic()
                drill.await_narrower()
                rehearsal_seconds = time.monotonic() - began
            found[name] = drill.strike(1, kill_rank(-1), after_tokens=STREAMS * tokens // 3)
            assert drill.status()["width"] == width - 1
            found[name]["start_seconds"] = drill.start_seconds
        assert found[name]["requests_lost"] == found[name]["requests_with_other_tokens"] == 0, found
    table = Table("programs", "next token of every stream after, s", "first start, s", title="a device is left out")
    for name, run in found.items():
        table.add_row(name, f"{run['seconds_to_next_token_of_every_stream']:.2f}", f"{run['start_seconds']:.1f}")
    result = {"width": width, "narrower": width - 1, "streams": STREAMS, "rehearsal_seconds": rehearsal_seconds}
    bench.write("narrower", result | {"programs": found}, table)


@pytest.mark.slow
def test_soak(bench: Bench, request: pytest.FixtureRequest) -> None:
    """Kills at random times, one after the other, also while the group recovers: nothing is lost, nothing grows."""
    kills = 5 if request.config.getoption("--smoke") else 50
    width, draw = max(2, bench.settings["tensor_parallel_size"]), random.Random(SOAK_SEED)
    lost = different = rounds = 0
    memory: list[int] = []
    done: list[float] = []
    with closing(Drill(bench.settings["model"], width, 48, bench.vocab_size)) as drill:
        expected = [drill.expected(number) for number in range(4)]
        began = time.monotonic()
        finished = threading.Event()

        def strike() -> None:
            while len(done) < kills:
                time.sleep(draw.uniform(0.2, 6.0))
                rank = draw.randrange(width)
                try:
                    (kill_all if draw.random() < 0.2 else kill_rank(rank))(drill)
                    done.append(time.monotonic() - began)
                except (ProcessLookupError, IndexError, OSError):
                    pass  # nobody to kill just now: the group is being replaced
            finished.set()

        thread = threading.Thread(target=strike)
        thread.start()
        while not finished.is_set():
            number = rounds % len(expected)
            round_ = drill.run(number)
            lost += len(round_.errors)
            different += sum(a != b for a, b in zip(round_.tokens, expected[number], strict=True))
            rounds += 1
            memory.append(psutil.Process().memory_info().rss)
        thread.join()
        recovered = [event["seconds"] for event in drill.events("recovered")]
        status = drill.status()
    table = Table("kills", "requests", "lost", "other tokens", "recovery p50, s", "max, s", title="soak")
    median = statistics.median(recovered)
    table.add_row(
        str(len(done)), str(rounds * STREAMS), str(lost), str(different), f"{median:.2f}", f"{max(recovered):.2f}"
    )
    result = {
        "width": width,
        "seed": SOAK_SEED,
        "kills_at_seconds": done,
        "requests": rounds * STREAMS,
        "requests_lost": lost,
        "requests_with_other_tokens": different,
        "faults": status["faults"],
        "restarts": status["restarts"],
        "last_recovery_seconds": recovered,
        "leader_memory_bytes": [memory[0], memory[-1]],
        "seconds": time.monotonic() - began,
    }
    bench.write("soak", result, table)
    assert lost == different == 0
