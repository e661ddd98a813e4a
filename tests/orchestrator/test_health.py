"""Busy, hung and dead are told apart, the right rank is named, and nobody pays for a pause of the leader's own."""

import signal
import subprocess
import sys
import time
from collections.abc import Callable

import pytest

from ryzanstein_jax.config import OrchestratorConfig
from ryzanstein_jax.orchestrator import health
from ryzanstein_jax.orchestrator.fault import Fault, FaultKind
from ryzanstein_jax.orchestrator.health import HealthMonitor, suspects
from ryzanstein_jax.orchestrator.status import Phase
from tests.orchestrator.watch import Watch, make_group

BURN, SLEEP = "print(flush=True)\nwhile True: pass", "import time; print(flush=True); time.sleep(100)"
QUICK = dict(heartbeat_interval_sec=0.05, heartbeat_timeout_sec=0.25)


def silence(fault: Fault) -> float:
    return float(fault.message.split("no heartbeat for ")[1].split()[0])


# -- Heartbeats


def test_who_beats_is_alive(clock):
    watch = Watch(clock)
    assert watch.pass_time(100.0) is None
    assert {sample.state for sample in watch.monitor.history} == {"alive"}


def test_who_is_silent_is_hung_and_named(clock):
    watch = Watch(clock, (5, 5, 4), (3, 3, 2), heartbeat_timeout_sec=5.0)
    fault = watch.pass_time(60.0, silent={1})
    assert (fault.kind, fault.ranks, fault.serving) == (FaultKind.HANG, (1,), True)
    assert 5.0 <= silence(fault) < 5.2
    assert "rank 1 received 3, dispatched 3, done 2" in fault.message
    assert fault.log == ("its last words, 5 lines",)
    assert Watch(clock, phase=Phase.LOADING).pass_time(60.0, silent={0}).serving is False


def test_who_was_silent_for_less_is_alive_again(clock):
    watch = Watch(clock, heartbeat_timeout_sec=5.0)
    for _ in range(5):
        assert watch.pass_time(4.9, silent={0, 1}) is None
        assert watch.pass_time(0.1) is None


def test_samples_tell_what_was_seen(clock):
    watch = Watch(clock, (0, 0, 0), (9, 9, 9))
    watch.pass_time(10.0)
    samples = watch.monitor.history
    assert 16 <= len(samples) <= 20 and [sample.rank for sample in samples][:4] == [0, 1, 0, 1]
    assert samples[-1].done == 9 and samples[-1].cpu_seconds is None and samples[-1].silent_seconds == 0
    watch.pass_time(2000.0, tick=0.5)
    assert len(samples) == 1024


# -- Silent, and busy or not


def busy(watch: Watch, cpu: dict[int, float], share: float, seconds: float) -> Fault | None:
    """Rank 0 is silent and uses this share of a processor."""
    for rank in watch.group.ranks:
        rank.pid = rank.rank + 1
    for _ in range(round(seconds / 0.05)):
        cpu[1], cpu[2] = cpu.get(1, 7.0) + 0.05 * share, 7.0
        fault = watch.pass_time(0.05, silent={0})
        if fault is not None:
            return fault
    return None


def test_who_is_busy_gets_more_time_but_not_for_ever(clock, cpu):
    watch = Watch(clock, heartbeat_timeout_sec=5.0)
    assert busy(watch, cpu, 0.3, 59.0) is None
    assert [sample.state for sample in watch.monitor.history if sample.rank == 0][-1] == "busy"
    fault = busy(watch, cpu, 0.3, 10.0)
    assert fault.ranks == (0,) and 60.0 <= silence(fault) < 60.2


def test_who_is_idle_does_not(clock, cpu):
    fault = busy(Watch(clock, heartbeat_timeout_sec=5.0), cpu, 0.01, 60.0)
    assert fault.ranks == (0,) and 6.0 <= silence(fault) < 6.2, "a second is watched before it is believed"


def test_who_was_busy_and_hangs_now_is_found_out(clock, cpu):
    watch = Watch(clock, heartbeat_timeout_sec=5.0)
    assert busy(watch, cpu, 1.0, 20.0) is None
    fault = busy(watch, cpu, 0.0, 60.0)
    assert 20.0 < silence(fault) < 22.3


def test_a_heartbeat_ends_the_doubt(clock, cpu):
    watch = Watch(clock, heartbeat_timeout_sec=5.0)
    for _ in range(5):
        assert busy(watch, cpu, 0.0, 5.9) is None
        assert watch.pass_time(0.1) is None


def run_until(done: Callable[[], object], seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_real_processes_that_work_and_that_sleep():
    found: dict[str, Fault] = {}
    monitors = {}
    command = [sys.executable, "-c"]
    processes = {code: subprocess.Popen([*command, code], stdout=subprocess.PIPE) for code in (BURN, SLEEP)}
    try:
        for process in processes.values():  # starting is work
            assert process.stdout is not None and process.stdout.readline()
        for code, process in processes.items():
            monitors[code] = HealthMonitor(OrchestratorConfig(**QUICK))
            monitors[code].watch(make_group((1, 1, 0), now=time.monotonic(), pid=process.pid))

        def look() -> bool:
            for code, monitor in monitors.items():
                fault = monitor.check()
                if fault is not None:
                    found.setdefault(code, fault)
            return len(found) == 2

        run_until(look)
    finally:
        for process in processes.values():
            process.kill()
            process.communicate()
    assert 0.25 < silence(found[SLEEP]) < 2.6
    assert silence(found[BURN]) >= 3.0, "twelve heartbeat timeouts"


def test_a_stopped_process_is_hung_though_it_beat_just_now():
    process = subprocess.Popen([sys.executable, "-c", SLEEP])
    try:
        monitor = HealthMonitor(OrchestratorConfig())
        group = make_group((0, 0, 0), now=time.monotonic(), pid=process.pid)
        monitor.watch(group)
        faults: list[Fault] = []

        def look() -> bool:
            group.ranks[0].beat_time = time.monotonic()
            fault = monitor.check()
            faults.extend([fault] if fault else [])
            return bool(faults)

        process.send_signal(signal.SIGSTOP)
        run_until(lambda: health._process_state(process.pid) == "T")
        began = time.monotonic()
        while time.monotonic() < began + 0.5:
            assert not look(), "a moment is nothing"
            time.sleep(0.02)
        process.send_signal(signal.SIGCONT)
        run_until(lambda: health._process_state(process.pid) != "T")
        assert not look()
        process.send_signal(signal.SIGSTOP)
        began = time.monotonic()
        run_until(look)
        assert time.monotonic() - began >= 1.0, "an earlier stop does not count"
        assert "stopped" in faults[0].message and faults[0].kind is FaultKind.HANG
    finally:
        process.kill()
        process.wait()


@pytest.mark.parametrize(("letter", "hung"), [("T", True), ("t", True), ("R", False), ("D", False), ("", False)])
def test_what_counts_as_stopped(clock, monkeypatch, letter, hung):
    monkeypatch.setattr(health, "_process_state", lambda pid: letter)
    watch = Watch(clock)
    watch.group.ranks[1].pid = 77
    fault = watch.pass_time(5.0)
    assert (fault is not None) == hung
    assert fault is None or fault.ranks == (1,)


def test_a_process_that_is_gone_has_no_state():
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    assert health._process_state(process.pid) == "" and health._cpu_seconds(process.pid) is None
    assert health._process_state(-1) == ""


# -- Who holds the others up


@pytest.mark.parametrize(
    ("beats", "named"),
    [
        ([(5, 5, 5), (5, 5, 5)], [0, 1]),
        ([(5, 5, 5), (4, 4, 4), (5, 5, 4)], [1]),
        ([(5, 4, 4), (5, 5, 4), (5, 5, 4)], [0]),
        ([(5, 5, 4), (5, 5, 5), (5, 5, 4)], [0, 2]),
        ([(4, 4, 4), (5, 3, 3), (4, 4, 4)], [0, 2]),
        ([(7, 7, 7)], [0]),
    ],
)
def test_who_is_suspected(clock, beats, named):
    group = make_group(*beats, now=clock.now)
    assert [rank.rank for rank in suspects(group.ranks)] == named
    watch = Watch(clock, *beats, step_timeout_sec=2.0, first_step_timeout_sec=3.0)
    watch.monitor.clock.begin(1)
    fault = watch.pass_time(10.0)
    assert (fault.kind, list(fault.ranks)) == (FaultKind.HANG, named)
    assert "a step has run for 3.0 s" in fault.message or "a step has run for 3.1 s" in fault.message


def test_summary_is_plain_values(clock):
    watch = Watch(clock, (7, 6, 5), (7, 7, 5))
    watch.monitor.clock.begin(4)
    watch.pass_time(0.5, silent={1})
    summary = watch.monitor.get_health_summary()
    first, second = summary.pop("ranks")
    assert first == {
        "rank": 0, "slot": 10, "pid": -1, "phase": "serving", "silent_seconds": 0.0, "received": 7, "dispatched": 6,
        "done": 5, "memory_bytes": None, "collective_bytes": 0,
    }  # fmt: skip
    assert second["silent_seconds"] == 0.5
    assert summary.pop("oldest_step_seconds") == pytest.approx(0.5)
    assert summary == {
        "generation": 3, "last_probe_seconds_ago": 0.5, "steps_running": 1, "step_seconds_p50": None,
        "step_seconds_p99": None,
    }  # fmt: skip
    watch.monitor.watch(None)
    assert watch.monitor.check() is None
    summary = watch.monitor.get_health_summary()
    assert (summary["generation"], summary["ranks"], summary["steps_running"]) == (0, [], 0)
