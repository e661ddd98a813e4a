"""`ryzanstein serve --data-parallel-size 2`: one replica is killed under streaming clients, then all is told to end."""

import json
import re
import signal
from pathlib import Path
from typing import Any

import psutil

from tests.server.serving import FakeBackend, serving, wait_until
from tests.server.test_serve import NUM_CLIENTS, NUM_TOKENS, run_clients, started
from tests.support import is_running

#: As `tests/faults/test_replica_faults.py` has them, so that the programs are the same.
SETTINGS = ("--max-model-len", "64", "--max-num-seqs", "4", "--max-num-batched-tokens", "16")


def test_clients_of_a_killed_replica_notice_nothing_and_a_drain_is_for_all(tiny: Path, tmp_path: Path):
    arguments = ("--executor", "processes", "--data-parallel-size", "2", "-O", "standby=false", *SETTINGS)
    with started(tiny, tmp_path, *arguments) as process:
        process.await_line("status", status="ready")

        def status() -> dict[str, Any]:
            return json.loads(process.get("/status")[1])

        def metric(name: str, replica: int) -> float:
            found = re.findall(rf'^ryzanstein_{name}{{replica="{replica}"}} (\S+)$', process.get("/metrics")[1], re.M)
            assert len(found) == 1, name
            return float(found[0])

        undisturbed = run_clients(process)
        assert all(len(tokens) == NUM_TOKENS and reason == "length" for _, tokens, reason in undisturbed)
        first = status()
        assert [one["state"] for one in first["engine"]["replicas"]] == ["ready", "ready"]
        assert all(one["steps"] > NUM_TOKENS for one in first["engine"]["replicas"])
        ranks = first["orchestrator"]["health"]["ranks"]
        assert [(rank["replica"], rank["slot"]) for rank in ranks] == [(0, 0), (1, 1)]

        victim = psutil.Process(ranks[0]["pid"])
        assert run_clients(process, victim.kill, after=NUM_CLIENTS * NUM_TOKENS // 4) == undisturbed
        process.await_line("status", status="degraded")
        wait_until(lambda: [one["state"] for one in status()["engine"]["replicas"]] == ["ready", "ready"], 60)
        moved = metric("requests_moved_total", 0)
        assert 0 < moved <= NUM_CLIENTS and metric("requests_moved_total", 1) == 0
        assert metric("engine_move_seconds_count", 1) == moved and metric("restarts_total", 0) == 1
        assert metric("restarts_total", 1) == 0 and metric("devices", 0) == metric("devices", 1) == 1
        assert "moved" in [event["kind"] for event in status()["events"]]
        assert not any(line.get("status") == "recovering" for line in process.lines), "some replica always served"

        children = psutil.Process(process.popen.pid).children(recursive=True)
        assert len(children) == 4, "an agent and a rank for each"

        def end() -> None:
            process.popen.send_signal(signal.SIGTERM)
            process.await_line("draining")

        assert run_clients(process, end, after=NUM_CLIENTS * NUM_TOKENS // 2) == undisturbed
        assert process.wait() == 0
        assert not [child for child in children if is_running(child)]


class Two(FakeBackend):
    """A backend of two replicas."""

    @property
    def replicas(self) -> list[FakeBackend]:
        return self.both

    both: list[FakeBackend]


def test_metrics_and_status_tell_replicas_apart(fake: FakeBackend):
    made = Two(fake.tokenizer)
    made.both = [FakeBackend(fake.tokenizer), FakeBackend(fake.tokenizer)]
    for number, one in enumerate(made.both):
        one.num_steps = 10 + number
        one.metrics.count("restarts", number)
        one.metrics.observe("recovery_seconds", 1.0 + number)
    with serving(made) as served:
        for number in range(2):
            assert served.metric(f'ryzanstein_steps_total{{replica="{number}"}}') == 10 + number
            assert served.metric(f'ryzanstein_restarts_total{{replica="{number}"}}') == number
            assert served.metric(f'ryzanstein_recovery_seconds_sum{{replica="{number}"}}') == 1 + number
            assert served.metric(f'ryzanstein_device_memory_bytes{{rank="1",replica="{number}"}}') == 101
        assert served.metric('ryzanstein_leader_cpu_seconds_total{thread="engine"}') == 3.0
        text = served.request("GET", "/metrics")[2]
        assert text.count("# TYPE ryzanstein_steps_total counter") == 1
        engine = served.request("GET", "/status")[2]["engine"]
        assert [one["steps"] for one in engine["replicas"]] == [10, 11]
        assert [(rank["replica"], rank["rank"]) for rank in engine["ranks"]] == [(0, 0), (0, 1), (1, 0), (1, 1)]
