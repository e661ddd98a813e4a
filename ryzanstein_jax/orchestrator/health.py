"""`HealthMonitor`: tells busy, hung and dead ranks apart, and says which rank it is.

Alive is not healthy: a rank may beat and never finish a step. So there are three looks. A process that ended is seen by
its sentinel (`process_group`). One that is silent, or stopped, is hung, unless it uses its processor: then it is busy.
And a step that outlasts its deadline is hung whatever the heartbeats say; the deadline follows from measured steps.
"""

from __future__ import annotations

import dataclasses
import os
import threading
import time
from collections import deque
from dataclasses import dataclass
from typing import Any

from ryzanstein_jax.config import OrchestratorConfig
from ryzanstein_jax.orchestrator.fault import Fault, FaultKind
from ryzanstein_jax.orchestrator.process_group import ProcessGroup, Rank
from ryzanstein_jax.orchestrator.status import Phase

#: Times the slowest measured step of its kind that a step gets.
_PATIENCE = 10.0
#: A stopped process (SIGSTOP, a debugger) counts as hung after so many seconds.
_STOPPED_SECONDS = 1.0
#: A silent process that is busy counts as hung all the same after so many heartbeat timeouts.
_BUSY_TIMEOUTS = 12
#: Share of a processor that a silent process must use to count as busy.
_BUSY_SHARE = 0.1
#: A pause of the leader itself, in seconds, after which nobody else is blamed for being late.
_OWN_PAUSE = 1.0
_TICKS = os.sysconf("SC_CLK_TCK")


class StepClock:
    """Deadlines of steps, from how long steps took. `begin` and `end` come from the engine's thread.

    Args:
        least: seconds that every step gets.
        first: the same while none has been measured.
    """

    def __init__(self, least: float, first: float):
        self._least, self._first = least, first
        self._lock = threading.Lock()
        self._running: deque[tuple[int, float, float]] = deque()  # (tokens, begun, when it became the oldest)
        #: Slowest step so far, by the power of two of its tokens; it fades, so that one slow moment is forgotten.
        self._slowest: dict[int, float] = {}
        self._recent: deque[float] = deque(maxlen=256)
        self._idle_since = time.monotonic()

    def begin(self, tokens: int) -> None:
        with self._lock:
            now = time.monotonic()
            self._running.append((tokens, now, now))

    def end(self) -> None:
        """The oldest step is done."""
        with self._lock:
            if not self._running:
                return  # the group was lost just now, which the engine learns in a moment
            now = time.monotonic()
            tokens, _, oldest_since = self._running.popleft()
            seconds, size = now - oldest_since, tokens.bit_length()
            self._slowest[size] = max(seconds, 0.98 * self._slowest.get(size, 0.0))
            self._recent.append(seconds)
            if self._running:
                self._running[0] = (*self._running[0][:2], now)
            self._idle_since = now

    def clear(self) -> None:
        """No step runs any more."""
        with self._lock:
            self._running.clear()

    def allowed(self, tokens: int) -> float:
        """Seconds that a step of so many tokens gets. Of sizes never measured, the next smaller one is scaled up."""
        if not self._slowest:
            return max(self._first, self._least)
        size = tokens.bit_length()
        below = [known for known in self._slowest if known <= size]
        nearest = max(below) if below else min(self._slowest)
        expected = self._slowest[nearest] * 2.0 ** max(0, size - nearest)
        return max(self._least, _PATIENCE * expected)

    def overdue(self, now: float) -> float | None:
        """How many seconds the oldest step has run, if that is too long."""
        with self._lock:
            if not self._running:
                return None
            tokens, _, since = self._running[0]
            return now - since if now - since > self.allowed(tokens) else None

    def forgive(self, seconds: float) -> None:
        """The leader itself stood still for so long: that is nobody's fault."""
        with self._lock:
            now = time.monotonic()
            self._running = deque((tokens, begun, min(now, since + seconds)) for tokens, begun, since in self._running)

    def idle_seconds(self) -> float:
        """For how long no step has run; 0 while one does."""
        with self._lock:
            return 0.0 if self._running else time.monotonic() - self._idle_since

    def summary(self) -> dict[str, float | int | None]:
        with self._lock:
            recent = sorted(self._recent)
            oldest = time.monotonic() - self._running[0][2] if self._running else None
            return {
                "steps_running": len(self._running),
                "oldest_step_seconds": oldest,
                "step_seconds_p50": recent[len(recent) // 2] if recent else None,
                "step_seconds_p99": recent[len(recent) * 99 // 100] if recent else None,
            }


@dataclass(frozen=True)
class HealthSample:
    """One look at one rank.

    Attributes:
        time: monotonic seconds.
        rank: which.
        state: "alive", "busy", "stopped", "silent".
        silent_seconds: since its last heartbeat.
        done: steps it had done.
        cpu_seconds: processor time that it has used; None where that can't be seen.
    """

    time: float
    rank: int
    state: str
    silent_seconds: float
    done: int
    cpu_seconds: float | None


class HealthMonitor:
    """Looks at the ranks of a group; `check` is called several times a second by the leader's supervisor.

    Args:
        config: the timeouts.
    """

    def __init__(self, config: OrchestratorConfig):
        self.clock = StepClock(config.step_timeout_sec, config.first_step_timeout_sec)
        self.history: deque[HealthSample] = deque(maxlen=1024)
        self._config = config
        self._group: ProcessGroup | None = None
        self._stopped_since: dict[int, float] = {}
        self._cpu: dict[int, tuple[float, float]] = {}
        self._last_check = self._last_sample = time.monotonic()
        self._probe_sent: float | None = None
        self._probe_missing: set[int] = set()
        self._last_probe = time.monotonic()

    def watch(self, group: ProcessGroup | None) -> None:
        """Begins with a new group, or none."""
        self._group = group
        self._stopped_since, self._cpu = {}, {}
        self._probe_sent, self._probe_missing = None, set()
        self._last_check = self._last_probe = time.monotonic()
        self.clock.clear()

    def check(self) -> Fault | None:
        """The first thing found to be wrong, or None."""
        now, group = time.monotonic(), self._group
        pause, self._last_check = now - self._last_check, now
        if group is None:
            return None
        if pause > _OWN_PAUSE:
            self._forgive(group, pause)
            return None
        sampling = now - self._last_sample >= 1.0
        for rank in group.ranks:
            state = self._state(rank, now)
            if sampling:
                sample = HealthSample(
                    now, rank.rank, state, now - rank.beat_time, rank.beat.done, _cpu_seconds(rank.pid)
                )
                self.history.append(sample)
            if state == "stopped" and now - self._stopped_since[rank.rank] > _STOPPED_SECONDS:
                return dataclasses.replace(self._hang("its process is stopped", (rank,)), is_external=True)
            if state == "silent":
                return self._hang(f"no heartbeat for {now - rank.beat_time:.1f} s", (rank,))
        if sampling:
            self._last_sample = now
        return self._check_step(group, now) or self._check_probe(group, now)

    # --- silence

    def _state(self, rank: Rank, now: float) -> str:
        """What a rank is, by its process's state and its heartbeats."""
        if rank.pid > 0 and _process_state(rank.pid) in ("T", "t"):
            self._stopped_since.setdefault(rank.rank, now)
            return "stopped"
        self._stopped_since.pop(rank.rank, None)
        silence = now - rank.beat_time
        if silence <= self._config.heartbeat_timeout_sec:
            self._cpu.pop(rank.rank, None)
            return "alive"
        used = _cpu_seconds(rank.pid)
        if used is None or silence > _BUSY_TIMEOUTS * self._config.heartbeat_timeout_sec:
            return "silent"
        # Work since a while ago: Python could not take its turn, but something goes on. On a crowded machine that is
        # far less than a whole processor; who hangs uses next to nothing.
        since, before = self._cpu.setdefault(rank.rank, (now, used))
        if now - since < 1.0:
            return "busy"
        self._cpu[rank.rank] = (now, used)
        return "busy" if used - before > _BUSY_SHARE * (now - since) else "silent"

    def _check_step(self, group: ProcessGroup, now: float) -> Fault | None:
        seconds = self.clock.overdue(now)
        if seconds is None:
            return None
        return self._hang(f"a step has run for {seconds:.1f} s", suspects(group.ranks))

    def _hang(self, message: str, ranks: tuple[Rank, ...]) -> Fault:
        counts = "; ".join(
            f"rank {r.rank} received {r.beat.received}, dispatched {r.beat.dispatched}, done {r.beat.done}"
            for r in ranks
        )
        serving = all(rank.beat.phase is Phase.SERVING for rank in ranks)
        log = tuple(ranks[0].logs.tail(5)) if ranks else ()
        return Fault(FaultKind.HANG, f"{message} ({counts})", tuple(r.rank for r in ranks), serving=serving, log=log)

    def _forgive(self, group: ProcessGroup, pause: float) -> None:
        """The leader stood still: what it has not read yet is no silence."""
        for rank in group.ranks:
            rank.beat_time += pause
        self.clock.forgive(pause)
        self._stopped_since, self._cpu = {}, {}
        if self._probe_sent is not None:
            self._probe_sent += pause

    # --- probes

    def probe_due(self) -> bool:
        """Whether the devices shall be probed now; at work they answer too, behind what they are doing."""
        due = time.monotonic() - self._last_probe >= self._config.health_check_interval_sec
        return self._group is not None and self._probe_sent is None and due

    def note_probe_sent(self) -> None:
        assert self._group is not None
        self._probe_sent, self._probe_missing = time.monotonic(), {rank.rank for rank in self._group.ranks}

    def note_probed(self, rank: int, problems: list[str]) -> Fault | None:
        """Takes a rank's answer to a probe."""
        self._probe_missing.discard(rank)
        if not self._probe_missing:
            self._probe_sent, self._last_probe = None, time.monotonic()
        if problems:
            text = f"its device failed the probe: {'; '.join(problems)[:2000]}"
            return Fault(FaultKind.DEVICE, text, (rank,), is_external=True)
        return None

    def _check_probe(self, group: ProcessGroup, now: float) -> Fault | None:
        if self._probe_sent is None:
            return None
        if self.clock.summary()["steps_running"]:
            # The device is at work on a step, which has a deadline of its own; the probe's turn comes after it.
            self._probe_sent = now
        if now - self._probe_sent <= self._config.probe_timeout_sec:
            return None
        message = f"its device did not answer the probe within {self._config.probe_timeout_sec:g} s"
        return Fault(FaultKind.DEVICE, message, tuple(sorted(self._probe_missing)), is_external=True)

    # --- for people

    def get_health_summary(self) -> dict[str, Any]:
        """Where each rank and the steps stand now, as plain values."""
        now, group = time.monotonic(), self._group
        ranks = [] if group is None else [
            {
                "rank": rank.rank,
                "slot": rank.slot,
                "pid": rank.pid,
                "phase": rank.beat.phase.name.lower(),
                "silent_seconds": round(now - rank.beat_time, 3),
                "received": rank.beat.received,
                "dispatched": rank.beat.dispatched,
                "done": rank.beat.done,
                "memory_bytes": rank.beat.memory or None,
                "collective_bytes": rank.beat.communicated,
            }
            for rank in group.ranks
        ]  # fmt: skip
        return {
            "generation": group.generation if group is not None else 0,
            "ranks": ranks,
            "last_probe_seconds_ago": round(now - self._last_probe, 3),
            **self.clock.summary(),
        }


def suspects(ranks: list[Rank]) -> tuple[Rank, ...]:
    """Who holds the others up: those that took fewer steps, else that handed fewer to the device, else did fewer.

    In a collective all wait for the slowest; if their counts are equal, nobody can tell, and all are named.
    """
    for count in ("received", "dispatched", "done"):
        values = [getattr(rank.beat, count) for rank in ranks]
        if len(set(values)) > 1:
            return tuple(rank for rank, value in zip(ranks, values, strict=True) if value == min(values))
    return tuple(ranks)


def _process_state(pid: int) -> str:
    """The letter that the kernel has for what a process does; "" where there is none."""
    fields = _stat(pid)
    return fields[0] if fields else ""


def _cpu_seconds(pid: int) -> float | None:
    """Processor time that a process has used."""
    fields = _stat(pid)
    return (int(fields[11]) + int(fields[12])) / _TICKS if fields else None


def _stat(pid: int) -> list[str]:
    """Fields of /proc/PID/stat from the state on."""
    try:
        with open(f"/proc/{pid}/stat", encoding="ascii", errors="replace") as file:
            return file.read().rpartition(")")[2].split()
    except OSError:
        return []
