"""`MultiGPUOrchestrator`: an `Executor` whose devices may die.

Two threads meet here. The engine's calls `submit` and `collect`; when the group is lost, these raise
`DeviceStateLostError`, and the engine calls `restart` until a new group is there, then replays its requests. The
supervisor starts groups, watches them and answers faults, also while nothing runs:

    created -> starting -> ready <-> recovering -> degraded        any of them -> draining -> closed
                                         `-> failed
"""

from __future__ import annotations

import atexit
import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import Any, Self

from ryzanstein_jax.communication import Collective
from ryzanstein_jax.config import EngineConfig, OrchestratorConfig
from ryzanstein_jax.engine.executor import ExecutorLimits
from ryzanstein_jax.engine.report import RankUsage, SetupReport
from ryzanstein_jax.errors import (
    DeviceStateLostError,
    EngineClosedError,
    RyzansteinError,
    counted,
)
from ryzanstein_jax.metrics import Metrics
from ryzanstein_jax.model.spec import ModelSpec
from ryzanstein_jax.orchestrator.events import EventKind, EventLog
from ryzanstein_jax.orchestrator.fault import Fault, FaultKind, GroupFault
from ryzanstein_jax.orchestrator.frames import ChannelClosedError, FrameError, Kind
from ryzanstein_jax.orchestrator.launch import Progress
from ryzanstein_jax.orchestrator.process_group import ProcessGroup
from ryzanstein_jax.orchestrator.states import SERVING, State, check_transition
from ryzanstein_jax.orchestrator.supervisor import Supervisor
from ryzanstein_jax.plan import StepPlan, StepResult

#: `collect` looks up so often, in seconds, in case a rank that can't be killed keeps its socket open.
_GLANCE = 0.5


class MultiGPUOrchestrator:
    """Runs steps on a group of worker processes, and replaces the group when it fails.

    Use it as a context manager, or call `cleanup`.

    Args:
        config: the model and the engine's settings.
        spec: what the model computes.
        options: how processes are started, watched and replaced.
        replica: which of `data_parallel_size` replicas this is: it takes devices of its own.
        progress: called with what is going on, how much is done, and of how much; from another thread.
    """

    def __init__(
        self,
        config: EngineConfig,
        spec: ModelSpec,
        options: OrchestratorConfig | None = None,
        *,
        replica: int = 0,
        progress: Progress = lambda what, done, total: None,
    ):
        self.config, self.options, self.metrics = config, options or OrchestratorConfig(), Metrics()
        self.events = EventLog(replica=replica if config.data_parallel_size > 1 else None)
        self._lock = threading.Condition()
        self._state = State.CREATED
        self._failure: RyzansteinError | None = None
        self._stale = False  # the group that the engine knows is gone
        self._num_lost = self._num_lost_known = 0  # groups: as the supervisor knows, and as the engine does
        self._in_flight = 0  # steps
        self._was_idle = False  # when the last group was lost and replaced
        self._replaying: tuple[int, Fault | None] | None = None
        self._io = threading.Lock()  # held while a group's sockets are in use, so that none is closed under a reader
        self._group: ProcessGroup | None = None
        self._supervisor = Supervisor(self, config, spec, progress, replica)
        self.monitor, self.recovery = self._supervisor.monitor, self._supervisor.recovery
        atexit.register(self.cleanup)

    # --- starting and ending

    def initialize(self) -> None:
        """Starts the processes and waits until all have joined.

        Raises:
            ProcessGroupError, MemoryBudgetError, ConfigError: they can't be started, or the model can't fit.
        """
        self.change(State.STARTING)
        self._supervisor.start()
        self._wait(lambda: self._supervisor.joined)

    def load_distributed_model(self) -> SetupReport:
        """Has all ranks load their shards and compile; waits until they serve.

        Raises:
            UnsupportedModelError, WeightsError, MemoryBudgetError, ConfigError: what the ranks met.
            RecoveryExhaustedError: they could not be started.
        """
        if self._state is State.CREATED:
            self.initialize()
        self._supervisor.load()
        self._wait(lambda: self._group is not None)
        return self.report

    def _wait(self, done: Callable[[], object]) -> None:
        with self._lock:
            while not done():
                if self._failure is not None:
                    error = self._failure
                    break
                self._lock.wait(1.0)
            else:
                return
        self.cleanup()
        raise error

    def cleanup(self) -> None:
        """Ends all processes, orderly where they let it. May be called again."""
        with self._lock:
            if self._state in (State.DRAINING, State.CLOSED):
                return
            failed = self._state is State.FAILED
            self.change(State.DRAINING)
            self._failure = self._failure or EngineClosedError("the orchestrator is closed")
        atexit.unregister(self.cleanup)
        self._supervisor.close(failed=failed)
        with self._lock:
            self._group = None
            self.change(State.CLOSED)

    close = cleanup

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.cleanup()

    # --- the executor

    @property
    def limits(self) -> ExecutorLimits:
        """Of the group that serves, or did last."""
        return self._supervisor.limits

    @property
    def report(self) -> SetupReport:
        """What the last start cost; of rank 0."""
        assert self._supervisor.ready is not None
        return self._supervisor.ready.report

    @property
    def width(self) -> int:
        """Devices that serve."""
        return self._supervisor.width

    def submit(self, plan: StepPlan) -> None:
        """Sends a step to all ranks and returns while it runs.

        Raises:
            DeviceStateLostError: the group is gone; call `restart`.
            RecoveryExhaustedError: and no other will come.
        """
        group = self._serving()
        self.monitor.clock.begin(len(plan.token_ids))
        with self.metrics.span("step_broadcast_seconds"), self._using(group):
            group.broadcast(plan.to_bytes())
        self._in_flight += 1
        self.metrics.count("steps")

    def collect(self) -> StepResult:
        """Waits for the oldest step; raises as `submit`."""
        group = self._serving()
        frame = None
        with self.metrics.span("step_wait_seconds"):
            while frame is None:
                with self._using(group):
                    frame = group.ranks[0].steps.receive(_GLANCE)
                group = self._serving()
        with self._using(group):
            kind, payload = frame
            if kind is not Kind.RESULT:
                raise FrameError(f"a frame {kind.name} where results come")
            result = StepResult.from_bytes(payload)
        self._in_flight -= 1
        self.monitor.clock.end()
        if self._replaying is not None:
            self._note_recovered()
        return result

    def run_inference_step(self, plan: StepPlan) -> StepResult:
        """`submit` and `collect` of one step."""
        self.submit(plan)
        return self.collect()

    def restart(self, timeout: float, num_requests: int) -> bool:
        """Waits for a new group after a loss.

        Args:
            timeout: seconds; the caller may have other things to do.
            num_requests: how many requests will be replayed.

        Returns:
            Whether one serves; steps are numbered from 0 again.

        Raises:
            RecoveryExhaustedError: none will come.
        """
        with self._lock:
            self._lock.wait_for(lambda: self._failure is not None or self._group is not None, timeout)
            if self._failure is not None:
                raise self._failure
            if self._group is None:
                return False
            if self._was_idle:
                num_requests = 0
            self._stale, self._num_lost_known, self._in_flight, self._was_idle = False, self._num_lost, 0, False
            # Without a request nothing had to wait.
            self._replaying = (num_requests, self._supervisor.last_fault if num_requests else None)
            generation = self._group.generation
        if num_requests:
            message = f"replaying {counted(num_requests, 'request')}"
            self.events.record(EventKind.REPLAYED, message, generation=generation, requests=num_requests)
        return True

    def await_verdict(self, timeout: float) -> None:
        """After a loss that the engine met, waits until the supervisor has looked into it, or so many seconds."""
        with self._lock:
            self._lock.wait_for(lambda: self._failure is not None or self._num_lost > self._num_lost_known, timeout)

    @property
    def blames_requests(self) -> bool:
        """Whether what ran may be the reason of the last loss."""
        fault = self._supervisor.last_fault
        return fault is not None and not (fault.is_external or fault.is_effect)

    def _serving(self) -> ProcessGroup:
        with self._lock:
            if self._failure is not None:
                raise self._failure
            if self._stale or self._group is None:
                self._was_idle = self._group is not None and not self._in_flight
                raise DeviceStateLostError("the worker processes were lost; they are being replaced")
            return self._group

    @contextlib.contextmanager
    def _using(self, group: ProcessGroup) -> Iterator[None]:
        """What goes wrong with a group's sockets is a fault of the group, whoever notices."""
        with self._io:
            try:
                yield
            except GroupFault as failure:
                fault = failure.fault
            except ChannelClosedError as error:
                # Its process has ended, which the supervisor sees too, and can say more about.
                text = f"it left the steps' channel: {error}"
                fault = Fault(FaultKind.PROCESS_DEATH, text, (0,), is_effect=True)
            except (FrameError, ValueError) as error:
                fault = Fault(FaultKind.EXCEPTION, f"it sent what is no result: {error}", (0,))
            else:
                return
        with self._lock:
            if self._group is group:  # nobody shall use it again, also before the supervisor has seen it for itself
                self._group, self._stale = None, True
        self._supervisor.suspect(group, fault)
        raise DeviceStateLostError(str(fault))

    def _note_recovered(self) -> None:
        assert self._replaying is not None
        (requests, fault), self._replaying = self._replaying, None
        self.recovery.note_progress()
        if fault is None:
            return
        seconds = time.monotonic() - fault.seen
        self.metrics.observe("recovery_seconds", seconds)
        self.metrics.count("requests_replayed", requests)
        self.events.record(
            EventKind.RECOVERED,
            f"the first token after the fault came {seconds:.2f} s after it was seen",
            generation=self._supervisor.generation,
            seconds=round(seconds, 3),
            requests=requests,
            **self._supervisor.parts,
        )

    # --- what the supervisor tells

    def serve(self, group: ProcessGroup, *, degraded: bool) -> None:
        """A group is ready."""
        with self._lock:
            if self._state is State.DRAINING:
                return
            self._group = group
            self.change(State.DEGRADED if degraded else State.READY)

    def lose(self) -> None:
        """The group is gone; what the engine has in flight will never come."""
        with self._lock:
            self._stale = True
            self._group = None
            self._num_lost += 1
            if self._state is not State.DRAINING:
                self.change(State.RECOVERING)

    def fail(self, error: RyzansteinError) -> None:
        """Nothing more will run."""
        with self._lock:
            self._group = None
            if self._state in (State.DRAINING, State.CLOSED):
                return
            self._failure = error
            self.change(State.FAILED)

    @contextlib.contextmanager
    def sockets_at_rest(self) -> Iterator[None]:
        """Nobody reads from the group's sockets meanwhile; its processes are dead, so nobody can wait there long."""
        taken = self._io.acquire(timeout=4 * _GLANCE)
        try:
            yield
        finally:
            if taken:
                self._io.release()

    def change(self, state: State) -> None:
        """Goes to another state; wakes all that wait for it."""
        with self._lock:
            check_transition(self._state, state)
            self._state = state
            self._lock.notify_all()

    def tell_joined(self) -> None:
        with self._lock:
            self._lock.notify_all()

    # --- for people

    @property
    def state(self) -> State:
        return self._state

    @property
    def is_serving(self) -> bool:
        """Whether steps run now."""
        return self._state in SERVING

    @property
    def is_watched(self) -> bool:
        """Whether the supervisor's thread lives, without which no fault would be answered."""
        return self._supervisor.is_alive()

    def collectives(self) -> dict[str, list[Collective]]:
        """What each compiled program communicates, by program; asked of rank 0.

        Raises:
            DeviceStateLostError: the group is gone.
        """
        found = self._supervisor.inspect(self._serving())
        return {name: [Collective(**entry) for entry in program] for name, program in found.items()}

    def usage(self) -> list[RankUsage]:
        """What each rank's device holds and has communicated, as it told last; none while there is no group."""
        return [
            RankUsage(rank["rank"], rank["memory_bytes"], rank["collective_bytes"])
            for rank in self.monitor.get_health_summary()["ranks"]
        ]

    def status(self) -> dict[str, Any]:
        """State, ranks, faults and the last events, as plain values."""
        supervisor = self._supervisor
        return {
            "state": self._state.value,
            "generation": supervisor.generation,
            "width": supervisor.width,
            "configured_width": self.config.tensor_parallel_size,
            "slots": list(supervisor.slots),
            "excluded": {str(slot): reason for slot, reason in supervisor.excluded.items()},
            "faults": self.recovery.num_faults,
            "restarts": self.recovery.num_restarts,
            "failure": None if self._failure is None else str(self._failure),
            "communication": supervisor.communication,
            "health": self.monitor.get_health_summary(),
            "hosts": supervisor.hosts(),
            "standby": supervisor.standby(),
            "gpus": supervisor.gpus(),
            "events": [vars_of(event) for event in self.events.list(last=100)],
        }


def vars_of(event: Any) -> dict[str, Any]:
    """An event as plain values."""
    import json

    value: dict[str, Any] = json.loads(event.to_json())
    return value
