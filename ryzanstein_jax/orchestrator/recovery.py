"""`FailureRecoveryManager`: what to do about a fault, as a policy; the orchestrator does it.

The group is never mended in place: a collective that broke off leaves no state that could be trusted. It is killed and
started anew, and the engine replays every unfinished request from its prompt and the tokens already sent.
"""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass, replace
from enum import StrEnum

from ryzanstein_jax.config import OrchestratorConfig
from ryzanstein_jax.errors import counted
from ryzanstein_jax.orchestrator.fault import Fault, FaultKind

_MOST_BACKOFF = 30.0


class Action(StrEnum):
    """What follows a fault."""

    RESTART = "restart"  # the same again
    SHRINK_BATCH = "shrink_batch"  # fewer tokens and sequences in a step
    SHRINK_PAGES = "shrink_pages"  # a smaller KV cache
    EXCLUDE = "exclude"  # without the device that failed, on a narrower mesh
    FAIL = "fail"  # give up


@dataclass(frozen=True)
class Decision:
    """The answer to a fault.

    Attributes:
        action: what to do.
        delay: seconds to wait before it.
        slots: devices to go on without, for EXCLUDE.
        reason: for people.
        attempt: which restart within the window it is, from 1.
    """

    action: Action
    delay: float = 0.0
    slots: tuple[int, ...] = ()
    reason: str = ""
    attempt: int = 0


class FailureRecoveryManager:
    """Counts faults and answers each with a `Decision`.

    Args:
        config: limits of attempts, windows and delays.
        clock: monotonic seconds; for tests.
    """

    def __init__(self, config: OrchestratorConfig, clock: Callable[[], float] = time.monotonic):
        self._config, self._clock = config, clock
        self._attempts: deque[float] = deque()
        self._in_a_row = 0
        self._by_slot: Counter[int] = Counter()
        self._out_of_memory = 0
        self._well_since: float | None = None
        self.num_faults = self.num_restarts = 0

    def decide(self, fault: Fault, slots: tuple[int, ...], *, can_exclude: bool) -> Decision:
        """The answer to a fault.

        Args:
            fault: what happened.
            slots: the devices of `fault.ranks`.
            can_exclude: whether the model would run without them.
        """
        now = self._clock()
        self.settle()
        self._well_since = None
        self.num_faults += 1
        if fault.kind is FaultKind.REFUSED:
            return Decision(Action.FAIL, reason="a restart would meet the same error")
        if not self._config.enable_auto_restart:
            return Decision(Action.FAIL, reason="enable_auto_restart is off")
        while self._attempts and now - self._attempts[0] > self._config.restart_window_sec:
            self._attempts.popleft()
        if len(self._attempts) >= self._config.max_restart_attempts:
            return Decision(
                Action.FAIL,
                reason=f"{counted(len(self._attempts), 'restart')} within {self._config.restart_window_sec:g} s, which "
                "is all that max_restart_attempts allows",
            )
        if self._in_a_row >= self._config.max_restart_attempts:  # a start may take longer than the window
            return Decision(
                Action.FAIL,
                reason=f"{counted(self._in_a_row, 'restart')} in a row, which is all that max_restart_attempts allows",
            )
        self._attempts.append(now)
        decision = self._answer(fault, slots, can_exclude)
        delay = 0.0
        if self._in_a_row:
            delay = min(_MOST_BACKOFF, self._config.restart_backoff_sec * 2.0 ** min(self._in_a_row - 1, 64))
        self._in_a_row += 1
        self.num_restarts += 1
        return replace(decision, delay=delay, attempt=len(self._attempts))

    def _answer(self, fault: Fault, slots: tuple[int, ...], can_exclude: bool) -> Decision:
        if fault.kind is FaultKind.OUT_OF_MEMORY:
            # Fewer tokens in a step need no new programs; a smaller cache does, so it comes second. Nothing was
            # allocated for steps yet where the group was still loading.
            self._out_of_memory += 1
            first = fault.serving and self._out_of_memory == 1
            return Decision(
                Action.SHRINK_BATCH if first else Action.SHRINK_PAGES, reason="the device ran out of memory"
            )
        if len(slots) == 1:  # blame that several share is no reason to drop a device
            self._by_slot[slots[0]] += 1
            count = self._by_slot[slots[0]]
            if count >= self._config.max_device_failures and can_exclude:
                return Decision(
                    Action.EXCLUDE, slots=slots, reason=f"device {slots[0]} failed {counted(count, 'time')}"
                )
        return Decision(Action.RESTART, reason="it may work this time")

    def note_ready(self) -> None:
        """A group serves: from here on it is well. The time that starting took does not count."""
        self._well_since = self._clock()

    def note_progress(self) -> None:
        """Steps run again: the next fault is a first one, as far as waiting goes."""
        self._in_a_row = 0

    def settle(self) -> None:
        """Forgets earlier faults once the group has been well for long enough."""
        if self._well_since is not None and self._clock() - self._well_since >= self._config.healthy_period_sec:
            self._attempts.clear()
            self._by_slot.clear()
            self._in_a_row = self._out_of_memory = 0

    def forget_slot(self, slot: int) -> None:
        self._by_slot.pop(slot, None)
