"""Deadlines of steps and probes, and what a pause of the leader changes in them."""

import threading

import pytest

from ryzanstein_jax.orchestrator import health
from ryzanstein_jax.orchestrator.fault import FaultKind
from ryzanstein_jax.orchestrator.health import StepClock
from tests.orchestrator.watch import Clock, Watch


def measured(clock: Clock, *steps: tuple[int, float], least: float = 1.0, first: float = 60.0) -> StepClock:
    """After steps of so many (tokens, seconds)."""
    times = StepClock(least, first)
    for tokens, seconds in steps:
        times.begin(tokens)
        clock.now += seconds
        times.end()
    return times


# -- Deadlines


@pytest.mark.parametrize(("least", "first", "allowed"), [(8.0, 60.0, 60.0), (8.0, 2.0, 8.0)])
def test_before_anything_is_measured_a_step_gets_the_first_timeout(clock, least, first, allowed):
    times = StepClock(least, first)
    assert times.allowed(1) == times.allowed(4096) == allowed
    times.begin(1)
    clock.now += allowed
    assert times.overdue(clock.now) is None
    clock.now += 0.5
    assert times.overdue(clock.now) == pytest.approx(allowed + 0.5)


def test_a_step_gets_ten_times_the_slowest_of_its_size(clock):
    times = measured(clock, (4, 0.5), (5, 2.0), (7, 0.1))
    assert times.allowed(6) == pytest.approx(20.0, rel=0.05)
    assert times.allowed(6) < 20.0, "it fades"
    assert measured(clock, (4, 0.001)).allowed(4) == 1.0, "but never less than the least"


def test_one_slow_moment_is_forgotten(clock):
    times = measured(clock, (4, 10.0), *[(4, 0.1)] * 300)
    assert times.allowed(4) == pytest.approx(1.0, rel=0.1)


def test_sizes_that_were_never_measured_scale_up_and_not_down(clock):
    times = measured(clock, (4, 1.0), (64, 3.0))
    assert times.allowed(64) == pytest.approx(30)
    assert times.allowed(127) == pytest.approx(30), "the same power of two"
    assert times.allowed(512) == pytest.approx(8 * 30)
    assert times.allowed(32) == pytest.approx(8 * 10), "from the next smaller one"
    assert times.allowed(1) == pytest.approx(10), "the smallest that is known"


def test_of_two_in_flight_the_second_one_s_time_begins_when_the_first_is_done(clock):
    times = measured(clock, (1, 0.5))
    times.begin(1)
    clock.now += 1.0
    times.begin(1)
    clock.now += 3.5
    times.end()
    assert times.overdue(clock.now) is None
    clock.now += 44.0
    assert times.overdue(clock.now) is None
    assert times.summary()["oldest_step_seconds"] == pytest.approx(44.0)
    clock.now += 2.0
    assert times.overdue(clock.now) == pytest.approx(46.0), "ten times 4.5, which the one before it took"
    times.end()
    assert times.overdue(clock.now) is None


def test_an_idle_clock_is_never_overdue(clock):
    times = measured(clock, (1, 0.5))
    clock.now += 1e6
    assert times.overdue(clock.now) is None
    assert times.summary()["oldest_step_seconds"] is None


def test_a_lost_group_s_steps_end_without_a_trace(clock):
    times = measured(clock, (1, 0.5))
    times.begin(1)
    times.begin(1)
    times.clear()
    times.end()  # the engine had its result when the supervisor noticed the loss
    clock.now += 1e6
    assert times.overdue(clock.now) is None
    assert times.allowed(1) == pytest.approx(5.0), "what was measured stays"
    times.begin(1)
    assert times.summary()["steps_running"] == 1


def test_the_clock_takes_two_threads():
    times, stop = StepClock(1.0, 1.0), threading.Event()
    errors: list[Exception] = []

    def look() -> None:
        try:
            while not stop.is_set():
                times.overdue(0.0)
                times.forgive(0.001)
                times.summary()
                times.clear()
        except Exception as error:  # noqa: BLE001 - the test fails with it
            errors.append(error)

    thread = threading.Thread(target=look)
    thread.start()
    for _ in range(3000):
        times.begin(1)
        times.end()
    stop.set()
    thread.join()
    assert errors == []


def test_percentiles(clock):
    times = measured(clock, *[(1, 0.1)] * 98, (1, 5.0), (1, 7.0))
    summary = times.summary()
    assert summary["step_seconds_p50"] == pytest.approx(0.1)
    assert summary["step_seconds_p99"] == pytest.approx(7.0)


def test_a_step_that_outlasts_its_deadline_is_a_hang_though_all_beat(clock):
    watch = Watch(clock, step_timeout_sec=2.0)
    for _ in range(3):
        watch.monitor.clock.begin(8)
        assert watch.pass_time(0.4) is None
        watch.monitor.clock.end()
    watch.monitor.clock.begin(8)
    assert watch.pass_time(3.9) is None
    assert watch.pass_time(0.2).kind is FaultKind.HANG


# -- Probes


def test_probes_are_due_after_the_interval_and_one_at_a_time(clock):
    watch = Watch(clock, health_check_interval_sec=5.0)
    monitor = watch.monitor
    assert not monitor.probe_due()
    watch.pass_time(4.9)
    assert not monitor.probe_due()
    watch.pass_time(0.2)
    assert monitor.probe_due()
    monitor.note_probe_sent()
    watch.pass_time(5.5)
    assert not monitor.probe_due(), "the last one is still out"
    assert monitor.note_probed(0, []) is None
    assert not monitor.probe_due()
    assert monitor.note_probed(1, []) is None
    watch.pass_time(4.9)
    assert not monitor.probe_due()
    watch.pass_time(0.2)
    assert monitor.probe_due()
    monitor.watch(None)
    assert not monitor.probe_due()


def test_what_a_probe_finds_is_a_fault_of_the_device(clock):
    watch = Watch(clock)
    watch.monitor.note_probe_sent()
    fault = watch.monitor.note_probed(1, ["computed 3, expected 140", "x" * 10_000])
    assert (fault.kind, fault.ranks) == (FaultKind.DEVICE, (1,))
    assert "computed 3" in fault.message and len(fault.message) < 2100


def test_a_probe_that_is_not_answered_is_one_too(clock):
    watch = Watch(clock, [0] * 3, [0] * 3, [0] * 3, probe_timeout_sec=10.0)
    watch.monitor.note_probe_sent()
    watch.monitor.note_probed(1, [])
    assert watch.pass_time(9.9) is None
    fault = watch.pass_time(0.2)
    assert (fault.kind, fault.ranks) == (FaultKind.DEVICE, (0, 2))
    assert "within 10 s" in fault.message


def test_a_step_on_the_device_holds_up_its_probe(clock):
    """It answers right after the step, so nobody may judge it in between."""
    watch = Watch(clock, probe_timeout_sec=1.0)
    watch.monitor.note_probe_sent()
    watch.monitor.clock.begin(4096)
    assert watch.pass_time(30.0) is None
    watch.monitor.clock.end()
    assert watch.pass_time(0.9) is None
    assert watch.pass_time(0.2).kind is FaultKind.DEVICE


def test_a_new_group_owes_no_answer(clock):
    watch = Watch(clock, probe_timeout_sec=1.0, health_check_interval_sec=2.0)
    watch.monitor.note_probe_sent()
    watch.monitor.clock.begin(1)
    assert watch.pass_time(0.9) is None
    watch.monitor.watch(watch.group)
    assert watch.pass_time(1.9) is None
    assert not watch.monitor.probe_due()
    watch.pass_time(0.2)
    assert watch.monitor.probe_due()


# -- The leader's own pauses


def test_a_pause_of_the_leader_is_nobody_s_silence(clock):
    watch = Watch(clock, heartbeat_timeout_sec=5.0, first_step_timeout_sec=10.0, probe_timeout_sec=4.0)
    watch.monitor.clock.begin(1)
    watch.monitor.note_probe_sent()
    assert watch.pass_time(3.0, silent={0, 1}) is None
    clock.now += 500.0
    assert watch.monitor.check() is None
    assert watch.pass_time(1.8, silent={0, 1}) is None, "nor a probe's, a step's or a heartbeat's"
    fault = watch.pass_time(0.5, silent={0, 1})
    assert "no heartbeat for 5." in fault.message, "but what was missed before counts"
    watch.monitor.clock.end()


def test_steps_and_probes_go_on_after_a_pause(clock):
    watch = Watch(clock, first_step_timeout_sec=10.0)
    watch.monitor.clock.begin(1)
    watch.pass_time(4.0)
    clock.now += 500.0
    assert watch.monitor.check() is None
    assert watch.pass_time(5.8) is None
    assert "a step has run for 10." in watch.pass_time(0.5).message
    watch = Watch(clock, probe_timeout_sec=10.0)
    watch.monitor.note_probe_sent()
    watch.pass_time(4.0)
    clock.now += 500.0
    assert watch.monitor.check() is None
    assert watch.pass_time(5.8) is None
    assert watch.pass_time(0.5).kind is FaultKind.DEVICE


def test_a_step_that_began_within_the_pause_took_no_less_than_nothing(clock):
    watch = Watch(clock)
    clock.now += 50.0
    watch.monitor.clock.begin(1)
    watch.monitor.check()
    clock.now += 0.5
    assert watch.monitor.clock.summary()["oldest_step_seconds"] == pytest.approx(0.5)


def test_a_short_delay_of_the_leader_is_no_pause(clock):
    watch = Watch(clock, heartbeat_timeout_sec=5.0)
    assert watch.pass_time(30.0, silent={0}, tick=0.9) is not None


def test_who_was_busy_before_a_pause_is_looked_at_anew(clock, cpu):
    """The whole machine may have stood still, the rank with it."""
    watch = Watch(clock, heartbeat_timeout_sec=5.0)
    rank = watch.group.ranks[0]
    rank.pid, cpu[1] = 1, 5.0

    def work(seconds: float) -> None:
        for _ in range(round(seconds / 0.05)):
            cpu[1] += 0.05
            assert watch.pass_time(0.05, silent={0}) is None

    work(7.5)
    clock.now += 100.0
    assert watch.monitor.check() is None
    work(5.0)
    assert health._BUSY_TIMEOUTS * 5.0 > 12.5
