"""Alive, ready and progressing: each endpoint tells its own truth, whatever the engine does."""

import asyncio
import json
import logging
import re
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from ryzanstein_jax.server.health import Health, Status
from ryzanstein_jax.server.settings import ServerConfig
from tests.server.serving import Served, serving, wait_until

ROOT = Path(__file__).resolve().parents[2]


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def orchestrator(state: str) -> SimpleNamespace:
    return SimpleNamespace(state=state, is_watched=True, width=2)


def statuses(served: Served) -> tuple[int, int]:
    return served.request("GET", "/health")[0], served.request("GET", "/ready")[0]


def test_a_model_that_is_served_is_ready(served):
    assert served.request("GET", "/ready")[2] == {"status": "ready", "ready": True}
    assert served.request("GET", "/health")[2] == {"status": "ready"}


def test_while_it_starts_it_lives_and_is_not_ready(fake):
    with serving(fake, start=False) as served:
        assert statuses(served) == (200, 503)
        status, headers, body = served.complete()
        assert (status, body["error"]["code"]) == (503, "starting") and int(headers["retry-after"]) > 0
        assert served.metric('ryzanstein_status{status="starting"}') == 1
        assert served.request("GET", "/v1/models")[0] == 200


def test_a_probe_needs_a_real_token(fake):
    async def never(step: int) -> None:
        await asyncio.sleep(60)

    async def fails(step: int) -> None:
        raise ValueError("no device")

    with serving(fake, probe_seconds=0.2, fresh_seconds=0.01) as served:
        assert statuses(served) == (200, 200) and fake.num_streams == 1
        for act in (never, fails):
            fake.act = act
            time.sleep(0.05)  # until the last token is no longer fresh
            assert statuses(served) == (200, 503)
        wait_until(lambda: not fake.active)  # the probe took its request back
        fake.act = None
        assert statuses(served) == (200, 200)
        assert max(fake.priorities) < -1000, "before all that waits"


def test_tokens_of_requests_make_probes_needless(fake):
    with serving(fake) as served:
        assert served.complete(max_tokens=2)[0] == 200
        assert statuses(served) == (200, 200)
        assert fake.num_streams == 1


def test_steps_for_a_request_are_progress_before_its_first_token(fake):
    """As while a long prompt is read: a probe would only wait behind it."""

    async def never(step: int) -> None:
        await asyncio.sleep(60)

    fake.act = never
    with serving(fake, probe_seconds=0.1, fresh_seconds=0.5) as served, served.open("/v1/completions", prompt="long"):
        wait_until(lambda: fake.active == 1)
        fake.num_steps = 5
        assert served.request("GET", "/ready")[0] == 200 and fake.num_streams == 1
        time.sleep(0.6)
        assert served.request("GET", "/ready")[0] == 503, "steps stopped"


def test_those_who_ask_at_once_share_a_probe(fake):
    async def slow(step: int) -> None:
        await asyncio.sleep(0.3)

    fake.act = slow
    with serving(fake) as served:
        found: list[int] = []
        threads = [threading.Thread(target=lambda: found.append(served.request("GET", "/ready")[0])) for _ in range(5)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert found == [200] * 5 and fake.num_streams == 1


@pytest.mark.parametrize(
    ("state", "found"),
    [("ready", (200, 200)), ("degraded", (200, 200)), ("recovering", (200, 503)), ("failed", (503, 503)),
     ("closed", (503, 503)), ("starting", (200, 503)), ("a state of later", (503, 503))],
)  # fmt: skip
def test_the_orchestrator_s_state_counts(fake, state, found):
    fake.orchestrator = orchestrator(state)
    with serving(fake) as served:
        assert statuses(served) == found


def test_a_dead_thread_is_a_dead_server(fake):
    fake.orchestrator = orchestrator("ready")
    with serving(fake) as served:
        fake.orchestrator.is_watched = False
        assert statuses(served) == (503, 503)
        fake.orchestrator, fake.is_alive = None, False
        assert statuses(served) == (503, 503)
        assert served.complete()[2]["error"]["code"] == "failed"


def test_no_step_for_long_while_requests_run_is_a_stall(fake):
    clock = Clock()
    health = Health(ServerConfig(stall_seconds=60), clock)
    health.backend = fake
    health.poll()
    clock.now += 1000
    health.poll()  # idle: nothing had to run
    assert health.status is Status.READY and health.progress_age == 0
    fake.active = 1
    health.poll()
    clock.now += 59
    assert health.status is Status.READY
    clock.now += 2
    health.poll()
    assert health.status is Status.STALLED
    assert not asyncio.run(health.is_ready())
    fake.num_steps += 1
    health.poll()
    assert health.status is Status.READY and asyncio.run(health.is_ready()), "a step is progress, also without a token"


def test_draining_is_alive_and_not_ready(fake, caplog):
    with serving(fake) as served, caplog.at_level(logging.INFO, "ryzanstein_jax.server"):
        served.service.health.draining = True
        assert statuses(served) == (200, 503)
        status, headers, body = served.complete()
        assert (status, body["error"]["code"], "retry-after" in headers) == (503, "draining", True)
        wait_until(lambda: any(getattr(record, "fields", {}).get("status") == "draining" for record in caplog.records))


def test_metrics_count_what_happened(served):
    def read(name: str) -> float:
        return served.metric(name)

    names = [
        "ryzanstein_prompt_tokens_total", "ryzanstein_generation_tokens_total", "ryzanstein_steps_total",
        "ryzanstein_time_to_first_token_seconds_count", "ryzanstein_inter_token_seconds_count",
        "ryzanstein_request_seconds_count", 'ryzanstein_requests_finished_total{finish_reason="length"}',
        "ryzanstein_step_seconds_count",
    ]  # fmt: skip
    before = [read(name) for name in names]
    asked = dict(max_tokens=6, ignore_eos=True, n=2)
    assert served.complete("Hello, metrics", **asked)[0] == 200
    wait_until(lambda: read(names[2]) > before[2] + 5)
    grown = [read(name) - old for name, old in zip(names, before, strict=True)]
    assert grown[:2] == [14, 12] and grown[3:7] == [1, 10, 1, 2] and grown[7] >= 6
    assert served.complete("x", max_tokens=0, n=200)[0] == 400
    assert read('ryzanstein_requests_refused_total{code="invalid_value"}') >= 1
    assert read('ryzanstein_kv_pages{state="used"}') == 0 and read('ryzanstein_sequences{state="waiting"}') == 0
    assert read("ryzanstein_compiles_total") > 0 and read("ryzanstein_last_progress_age_seconds") < 5
    assert read('ryzanstein_requests{state="running"}') == read('ryzanstein_requests{state="waiting"}') == 0
    hits = read("ryzanstein_prefix_cache_hits_total")
    for _ in range(2):
        served.complete("a prompt that is longer than a page of the cache", max_tokens=1)
    assert read("ryzanstein_prefix_cache_hits_total") >= hits + 32


def test_recoveries_show_in_the_metrics(fake):
    fake.orchestrator = orchestrator("ready")
    for name in ("restarts", "faults"):
        fake.metrics.count(name)
    fake.metrics.count("requests_replayed", 16)
    fake.metrics.observe("recovery_seconds", 1.5)
    with serving(fake) as served:
        assert served.metric("ryzanstein_restarts_total") == served.metric("ryzanstein_faults_total") == 1
        assert served.metric("ryzanstein_requests_replayed_total") == 16
        assert served.metric("ryzanstein_recovery_seconds_sum") == 1.5
        assert served.metric("ryzanstein_devices") == 2


def test_the_dashboard_names_metrics_that_exist(fake):
    dashboard = json.loads((ROOT / "deploy" / "grafana" / "ryzanstein.json").read_text())
    fake.orchestrator = orchestrator("ready")
    with serving(fake) as served:
        served.complete(max_tokens=2)
        served.complete(n=0)
        _, _, text = served.request("GET", "/metrics")
    exist = {re.split(r"[{ ]", line)[0] for line in text.splitlines() if not line.startswith("#")}
    expressions = [target["expr"] for panel in dashboard["panels"] for target in panel.get("targets", [])]
    named = {name for expression in expressions for name in re.findall(r"\bryzanstein_\w+", expression)}
    assert len(named) > 20 and named <= exist, named - exist
    assert {panel["id"] for panel in dashboard["panels"]} == set(range(1, len(dashboard["panels"]) + 1))
    labels = set(re.findall(r"by \(([^)]*)\)", " ".join(expressions)))
    assert labels <= {
        "le",
        "state",
        "status",
        "finish_reason",
        "code",
        "route, status",
        "replica, rank",
        "part",
        "thread",
    }
