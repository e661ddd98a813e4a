"""What follows each kind of fault, how often, how soon, and when it is forgotten."""

import pytest

from ryzanstein_jax.config import OrchestratorConfig
from ryzanstein_jax.orchestrator.fault import Fault, FaultKind
from ryzanstein_jax.orchestrator.recovery import Action, Decision, FailureRecoveryManager

#: No wait, no end, nothing forgotten, unless a test says so.
CALM = dict(max_restart_attempts=1000, restart_window_sec=1e6, healthy_period_sec=1e6, max_device_failures=3)
RESTARTED = sorted(set(FaultKind) - {FaultKind.OUT_OF_MEMORY, FaultKind.REFUSED})


class Manager(FailureRecoveryManager):
    """With a clock that stands still until it is told."""

    def __init__(self, **config):
        self.now = 1000.0
        super().__init__(OrchestratorConfig(**{**CALM, **config}), clock=lambda: self.now)

    def meet(self, kind=FaultKind.PROCESS_DEATH, slots=(), *, can_exclude=True, serving=True) -> Decision:
        return self.decide(Fault(kind, "x", serving=serving), tuple(slots), can_exclude=can_exclude)

    def actions(self, kind, count, *slots, **more) -> list[Action]:
        return [self.meet(kind, slots, **more).action for _ in range(count)]


@pytest.mark.parametrize("kind", RESTARTED)
@pytest.mark.parametrize("serving", [True, False])
def test_most_faults_are_answered_with_a_restart(kind, serving):
    manager = Manager()
    decision = manager.meet(kind, serving=serving)
    assert (decision.action, decision.delay, decision.attempt, decision.slots) == (Action.RESTART, 0.0, 1, ())
    assert decision.reason
    assert (manager.num_faults, manager.num_restarts) == (1, 1)


@pytest.mark.parametrize("auto", [True, False])
def test_what_no_restart_can_mend_ends_it(auto):
    manager = Manager(enable_auto_restart=auto)
    decision = manager.meet(FaultKind.REFUSED, (0,))
    assert decision.action is Action.FAIL and "same error" in decision.reason
    assert (manager.num_faults, manager.num_restarts) == (1, 0)


@pytest.mark.parametrize("kind", sorted(set(FaultKind) - {FaultKind.REFUSED}))
def test_without_auto_restart_every_fault_ends_it(kind):
    decision = Manager(enable_auto_restart=False).meet(kind)
    assert decision.action is Action.FAIL and "enable_auto_restart" in decision.reason


def test_no_attempts_are_no_restarts():
    assert Manager(max_restart_attempts=0).meet().action is Action.FAIL


# -- Memory


def test_out_of_memory_shrinks_the_batch_then_the_pages():
    shrinking = [Action.SHRINK_BATCH, Action.SHRINK_PAGES, Action.SHRINK_PAGES]
    assert Manager().actions(FaultKind.OUT_OF_MEMORY, 3) == shrinking


def test_out_of_memory_while_loading_shrinks_the_pages():
    assert Manager().meet(FaultKind.OUT_OF_MEMORY, serving=False).action is Action.SHRINK_PAGES


def test_out_of_memory_is_no_fault_of_the_device():
    manager = Manager(max_device_failures=1)
    assert Action.EXCLUDE not in manager.actions(FaultKind.OUT_OF_MEMORY, 5, 0)
    assert manager.meet(FaultKind.PROCESS_DEATH, (1,)).action is Action.EXCLUDE


# -- Devices


@pytest.mark.parametrize("kind", RESTARTED)
def test_a_device_that_fails_again_and_again_is_left_out(kind):
    manager = Manager(max_device_failures=3)
    assert manager.actions(kind, 2, 5) == [Action.RESTART] * 2
    decision = manager.meet(kind, (5,))
    assert (decision.action, decision.slots) == (Action.EXCLUDE, (5,))
    assert "device 5 failed 3 times" in decision.reason


def test_each_device_has_a_count_of_its_own():
    manager = Manager(max_device_failures=2)
    assert [manager.meet(slots=(slot,)).action for slot in (0, 1, 2)] == [Action.RESTART] * 3
    assert manager.meet(slots=(1,)).slots == (1,)


def test_shared_blame_leaves_nobody_out():
    manager = Manager(max_device_failures=1)
    assert manager.actions(FaultKind.HANG, 5, 0, 1) == [Action.RESTART] * 5
    assert manager.actions(FaultKind.HANG, 5) == [Action.RESTART] * 5


def test_a_device_that_is_needed_stays_until_it_can_go():
    manager = Manager(max_device_failures=2)
    assert manager.actions(FaultKind.DEVICE, 4, 0, can_exclude=False) == [Action.RESTART] * 4
    assert manager.meet(FaultKind.DEVICE, (0,)).action is Action.EXCLUDE


def test_a_forgotten_device_starts_over():
    manager = Manager(max_device_failures=2)
    manager.meet(slots=(0,))
    manager.forget_slot(0)
    manager.forget_slot(7)
    assert manager.actions(FaultKind.DEVICE, 2, 0) == [Action.RESTART, Action.EXCLUDE]


# -- Exhaustion


def test_too_many_restarts_within_the_window_end_it():
    manager = Manager(max_restart_attempts=3, restart_window_sec=100.0)
    decisions = []
    for _ in range(4):
        decisions.append(manager.meet())
        manager.note_progress()
        manager.now += 10
    assert [decision.action for decision in decisions] == [Action.RESTART] * 3 + [Action.FAIL]
    assert [decision.attempt for decision in decisions[:3]] == [1, 2, 3]
    assert "max_restart_attempts" in decisions[-1].reason and "100 s" in decisions[-1].reason
    assert (manager.num_faults, manager.num_restarts) == (4, 3)


def test_the_window_slides():
    manager = Manager(max_restart_attempts=3, restart_window_sec=100.0)
    attempts = []
    for _ in range(20):
        decision = manager.meet()
        assert decision.action is Action.RESTART
        attempts.append(decision.attempt)
        manager.note_progress()
        manager.now += 40
    assert attempts == [1, 2, *[3] * 18]
    manager.now -= 40
    assert manager.meet().action is Action.FAIL


def test_starts_that_fail_slowly_end_it_too():
    """A start may take longer than the window, so that no two attempts are within it."""
    manager = Manager(max_restart_attempts=3, restart_window_sec=100.0, healthy_period_sec=60.0)
    manager.note_ready()
    answers = []
    for _ in range(4):
        answers.append(manager.meet(FaultKind.START, serving=False).action)
        manager.now += 500
    assert answers == [Action.RESTART] * 3 + [Action.FAIL]


def test_the_limit_holds_for_all_kinds_together():
    manager = Manager(max_restart_attempts=3, max_device_failures=1)
    answers = [
        manager.meet(FaultKind.OUT_OF_MEMORY).action,
        manager.meet(FaultKind.DEVICE, (0,)).action,
        manager.meet(FaultKind.HANG).action,
        manager.meet(FaultKind.OUT_OF_MEMORY).action,
    ]
    assert answers == [Action.SHRINK_BATCH, Action.EXCLUDE, Action.RESTART, Action.FAIL]


# -- Forgetting


def unwell(**config) -> Manager:
    """After a fault of a device, out of memory once, and a start that worked."""
    manager = Manager(healthy_period_sec=60.0, restart_backoff_sec=1.0, max_device_failures=2, **config)
    manager.meet(slots=(0,))
    manager.meet(FaultKind.OUT_OF_MEMORY)
    manager.note_ready()
    return manager


@pytest.mark.parametrize("asks", [True, False], ids=["asked meanwhile", "not asked"])
def test_a_healthy_period_forgets(asks):
    manager = unwell()
    manager.now += 60
    if asks:
        manager.settle()
    decision = manager.meet(slots=(0,))
    assert (decision.action, decision.delay, decision.attempt) == (Action.RESTART, 0.0, 1)
    manager = unwell()
    manager.now += 60
    assert manager.meet(FaultKind.OUT_OF_MEMORY).action is Action.SHRINK_BATCH


def test_a_shorter_one_does_not():
    manager = unwell()
    manager.now += 59
    manager.settle()
    decision = manager.meet(slots=(0,))
    assert (decision.action, decision.delay, decision.attempt) == (Action.EXCLUDE, 2.0, 3)
    assert manager.meet(FaultKind.OUT_OF_MEMORY).action is Action.SHRINK_PAGES


def test_time_that_a_start_takes_is_no_time_of_health():
    manager = unwell()
    manager.meet()
    manager.now += 1000
    manager.settle()
    manager.note_ready()
    manager.now += 59
    manager.settle()
    assert manager.meet().attempt == 4


# -- Waiting


def test_the_wait_doubles_to_its_cap():
    manager = Manager(restart_backoff_sec=0.5)
    assert [manager.meet().delay for _ in range(10)] == [0, 0.5, 1, 2, 4, 8, 16, 30, 30, 30]


@pytest.mark.parametrize("backoff", [0.0, 100.0])
def test_the_wait_is_bounded(backoff):
    manager = Manager(restart_backoff_sec=backoff)
    assert [manager.meet().delay for _ in range(3)] == [0, min(backoff, 30), min(backoff, 30)]


def test_progress_ends_the_waiting_and_nothing_else():
    manager = Manager(restart_backoff_sec=1.0, max_restart_attempts=5, max_device_failures=4)
    assert [manager.meet(slots=(0,)).delay for _ in range(3)] == [0, 1, 2]
    manager.note_progress()
    decision = manager.meet(slots=(0,))
    assert (decision.delay, decision.attempt, decision.action) == (0, 4, Action.EXCLUDE)
    assert manager.meet().delay == 1
    assert manager.meet().action is Action.FAIL


def test_a_thousand_faults_in_a_row_overflow_nothing():
    manager = Manager(restart_backoff_sec=1.0, max_restart_attempts=1 << 20)
    assert [manager.meet() for _ in range(2000)][-1].delay == 30
