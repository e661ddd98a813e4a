"""A health monitor of ranks that have no process, on a clock that is told what time it is."""

from types import SimpleNamespace

from ryzanstein_jax.config import OrchestratorConfig
from ryzanstein_jax.orchestrator.fault import Fault
from ryzanstein_jax.orchestrator.health import HealthMonitor
from ryzanstein_jax.orchestrator.process_group import Rank
from ryzanstein_jax.orchestrator.status import Heartbeat, Phase


class Clock:
    """Stands in for the module `time` of `health`."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now


def make_group(*beats: tuple[int, int, int], now: float, phase=Phase.SERVING, pid: int = -1) -> SimpleNamespace:
    """Ranks with (received, dispatched, done)."""
    logs = SimpleNamespace(tail=lambda count: [f"its last words, {count} lines"])
    ranks = [
        Rank(number, number + 10, None, None, logs, pid, beat=Heartbeat(phase, *beat), beat_time=now)
        for number, beat in enumerate(beats)
    ]
    return SimpleNamespace(generation=3, ranks=ranks)


class Watch:
    """A monitor of two ranks that have no process, on a clock that is told what time it is."""

    def __init__(self, clock: Clock, *beats, phase=Phase.SERVING, **config):
        self.clock = clock
        self.monitor = HealthMonitor(OrchestratorConfig(**config))
        self.group = make_group(*(beats or [(0, 0, 0)] * 2), now=clock.now, phase=phase)
        self.monitor.watch(self.group)

    def pass_time(self, seconds: float, silent=(), tick: float = 0.05) -> Fault | None:
        """Looks at them all the time; the ranks that are not silent beat."""
        end = self.clock.now + seconds
        while self.clock.now < end - 1e-6:
            self.clock.now += tick
            for rank in self.group.ranks:
                if rank.rank not in silent:
                    rank.beat_time = self.clock.now
            fault = self.monitor.check()
            if fault is not None:
                return fault
        return None
