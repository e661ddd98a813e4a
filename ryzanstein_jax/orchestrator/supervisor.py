"""The leader's supervisor: a thread that starts groups, watches them, and does what the recovery policy says."""

from __future__ import annotations

import dataclasses
import threading
import time
from typing import Any

from ryzanstein_jax.config import EngineConfig
from ryzanstein_jax.engine.executor import ExecutorLimits
from ryzanstein_jax.errors import ConfigError, RecoveryExhaustedError, RyzansteinError, remote_error
from ryzanstein_jax.model.spec import ModelSpec
from ryzanstein_jax.orchestrator.capacity import Capacity
from ryzanstein_jax.orchestrator.events import EventKind
from ryzanstein_jax.orchestrator.fault import Fault, FaultKind, GroupFault
from ryzanstein_jax.orchestrator.frames import FrameError, Kind
from ryzanstein_jax.orchestrator.gpu_watch import GpuWatch
from ryzanstein_jax.orchestrator.group_manager import ProcessGroupManager
from ryzanstein_jax.orchestrator.health import HealthMonitor
from ryzanstein_jax.orchestrator.launch import TICK, Launch, Progress, Ready, cause_of, fault_if_error
from ryzanstein_jax.orchestrator.logs import RunLogs
from ryzanstein_jax.orchestrator.owner import Owner
from ryzanstein_jax.orchestrator.process_group import ProcessGroup
from ryzanstein_jax.orchestrator.recovery import Action, Decision, FailureRecoveryManager
from ryzanstein_jax.orchestrator.rehearsal import Rehearsal
from ryzanstein_jax.orchestrator.standby import Standby
from ryzanstein_jax.orchestrator.telemetry import GpuSample, GpuTelemetry

_INSPECT_SECONDS = 60.0


class Supervisor:
    """Owns the group of ranks. All but `start`, `load`, `suspect`, `inspect` and `close` is its thread's.

    Args:
        owner: the orchestrator that it serves.
        config, spec: the model.
        progress: of loading.
        replica: which of `data_parallel_size` this is.
    """

    def __init__(self, owner: Owner, config: EngineConfig, spec: ModelSpec, progress: Progress, replica: int = 0):
        self._owner, self._config, self._progress, self._replica = owner, config, progress, replica
        self._options, self._events = owner.options, owner.events
        self.monitor = HealthMonitor(self._options)
        self.recovery = FailureRecoveryManager(self._options)
        self._capacity = Capacity(spec, config, self._options)
        self._gpus: GpuWatch | None = None
        self._lost_slots: set[int] = set()  # of GPUs that fell off the bus; of the thread that watches them
        self._logs: RunLogs | None = None
        self._manager: ProcessGroupManager | None = None
        self._group: ProcessGroup | None = None
        self._thread = threading.Thread(target=self._run, name="supervisor", daemon=True)
        self.is_alive = self._thread.is_alive
        self._may_load, self._closing = threading.Event(), threading.Event()
        self._suspected: list[tuple[ProcessGroup, Fault]] = []  # by the engine's thread
        self._inspected: tuple[threading.Event, list[dict[str, Any]]] | None = None
        self._standby = Standby(self._options, self._events, self._launch, self._capacity.rank_config)
        self._rehearsal = Rehearsal(self._options, self._events, self._launch, self._capacity)
        self._wants_standby = False
        self._launches = 0
        self._delay_until = 0.0
        self.joined = False
        self.ready: Ready | None = None
        self.last_fault: Fault | None = None
        self.generation = self.width = 0
        self.slots: tuple[int, ...] = ()
        self.parts: dict[str, Any] = {}
        self.communication: dict[str, list[list[str | None]]] = {}

    # --- from other threads

    def start(self) -> None:
        self._thread.start()

    def load(self) -> None:
        self._may_load.set()
        group = self._group
        if group is not None:
            group.wake()

    def suspect(self, group: ProcessGroup, fault: Fault) -> None:
        """The engine's thread met a fault of a group; the supervisor may know better what it was."""
        self._suspected.append((group, fault))
        group.wake()

    def inspect(self, group: ProcessGroup) -> dict[str, Any]:
        """What rank 0's programs communicate."""
        done, answers = threading.Event(), list[dict[str, Any]]()
        self._inspected = (done, answers)
        group.tell(Kind.INSPECT, {}, rank=0)
        if not done.wait(_INSPECT_SECONDS):
            raise RyzansteinError(f"rank 0 did not answer within {_INSPECT_SECONDS:g} s")
        return answers[0]

    def close(self, *, failed: bool) -> None:
        """Ends the group and the thread."""
        self._closing.set()
        self._may_load.set()
        group = self._group
        if group is not None:
            group.wake()
        if self._thread.is_alive():
            self._thread.join()
        if self._gpus is not None:
            self._gpus.close()
        if self._manager is not None:
            self._manager.close()
        if self._logs is not None:
            self._logs.close(failed=failed)
        self._events.record(EventKind.CLOSED, "all processes have ended", generation=self.generation)

    @property
    def limits(self) -> ExecutorLimits:
        """What the group offers, less what was taken back after the device ran out of memory."""
        assert self.ready is not None
        return self._capacity.limits(self.ready.limits)

    @property
    def excluded(self) -> dict[int, str]:
        return self._capacity.excluded

    def standby(self) -> dict[str, Any] | None:
        """Where the standby stands; None without one."""
        return self._standby.summary()

    def hosts(self) -> dict[str, int]:
        """Devices of each machine that is here, by its name."""
        return self._manager.hosts.names() if self._manager is not None else {}

    # --- the thread

    def _run(self) -> None:
        try:
            self._logs = RunLogs(self._options.log_dir, max_file_bytes=max(1 << 16, self._options.log_bytes // 2))
            width, replicas = self._config.tensor_parallel_size, self._config.data_parallel_size
            self._manager = ProcessGroupManager(
                self._options, self._logs, width, self._events, replica=self._replica, num_replicas=replicas
            )
            self._gpus = GpuWatch(
                GpuTelemetry(),
                self._options.health_check_interval_sec,
                self._events,
                self._pids,
                self._note_unusable,
                self._note_back,
            )
            while not self._closing.is_set():
                try:
                    self._bring_up()
                    self._watch()
                    self._widen()
                except GroupFault as failure:
                    if not self._closing.is_set() and not self._answer(failure.fault):
                        break
            self._drain()
        except RyzansteinError as error:
            self._owner.fail(error)
        except Exception as error:  # noqa: BLE001 - whoever waits must learn of it
            own = RyzansteinError(f"the supervisor failed: {error!r}")
            own.__cause__ = error
            self._owner.fail(own)
        finally:
            self._standby.drop()
            self._kill()

    def _launch(self, slots: tuple[int, ...]) -> ProcessGroup:
        """Starts the ranks of a new group."""
        assert self._manager is not None
        self._launches += 1
        places = slots if self._options.process_per_device else (-1,)
        return self._manager.launch(places, generation=self._launches, width=len(slots))

    def _bring_up(self) -> None:
        """A new generation, from processes to serving."""
        assert self._manager is not None
        while (left := self._delay_until - time.monotonic()) > 0 and not self._closing.wait(min(left, TICK)):
            pass
        self.slots = self._capacity.choose(self._manager.slots(self._closing.is_set))
        width, before = len(self.slots), self.generation
        launch = self._standby.take(self.slots)
        if launch is not None:
            self._group = group = launch.group
            launch.hand_over(self.monitor, self._closing.is_set)
        else:
            self._group = group = self._launch(self.slots)
            launch = Launch(group, self.monitor, self._options, self._closing.is_set)
        self.generation = group.generation
        self.monitor.watch(group)
        self._events.record(
            EventKind.RESPAWNED if before else EventKind.STARTED,
            f"{width} {'ranks start' if launch.prepared_for is None else 'ranks of the standby take over'}",
            generation=self.generation,
            slots=list(self.slots),
        )
        devices = launch.join()
        self.communication = launch.communication
        if len(devices) != width:
            remedy = f"{len(devices)} devices were found"
            raise ConfigError("tensor_parallel_size", width, remedy)
        self._capacity.check_fit(self.slots, devices)
        self._standby.check(devices)
        self.joined = True
        self._owner.tell_joined()
        launch.wait(self._may_load)
        self.ready = ready = launch.load(self._capacity.rank_config(devices), self._progress)
        self._capacity.learn(width, ready)
        for name, count in ready.counters.items():
            self._owner.metrics.count(name, count)
        self.width = width
        self.parts |= {"join_seconds": round(ready.join_seconds, 3), "load_seconds": round(ready.load_seconds, 3)}
        degraded = self._capacity.is_reduced(width)
        self._wants_standby = self._standby.wanted(devices, self._config)
        self._events.record(
            EventKind.DEGRADED if degraded else EventKind.READY,
            f"{width} of {self._config.tensor_parallel_size} devices serve",
            generation=self.generation,
            pages=ready.limits.num_pages,
            **self.parts,
        )
        self.recovery.note_ready()
        self._owner.serve(group, degraded=degraded)

    def _watch(self) -> None:
        """Until something goes wrong, which is raised as GroupFault, a wider group can serve, or all closes."""
        group, since = self._group, time.monotonic()
        assert group is not None
        self._standby.begin()
        while not self._closing.is_set() and not self._may_widen(since):
            if self._wants_standby:
                self._standby.tend(self.slots, idle := self.monitor.clock.idle_seconds())
                if self._standby.is_prepared:
                    self._rehearsal.tend(self.slots, idle)
            for notice in group.poll(TICK):
                fault_if_error(group, notice, serving=True)
                if notice.kind is Kind.PROBED:
                    problems = notice.json().get("problems")
                    if not isinstance(problems, list):
                        problems = ["it tells no list of problems"]
                    fault = self.monitor.note_probed(notice.rank, list(map(str, problems)))
                    if fault is not None:
                        raise GroupFault(fault)
                elif notice.kind is Kind.INSPECTED and self._inspected is not None:
                    done, answers = self._inspected
                    answers.append(notice.json())
                    done.set()
            fault = self.monitor.check()
            if fault is not None:
                raise GroupFault(fault)
            self._check_suspected(group)
            self.recovery.settle()
            if self.monitor.probe_due():
                group.tell(Kind.PROBE, {})
                self.monitor.note_probe_sent()

    def _may_widen(self, since: float) -> bool:
        """Whether machines have come back, and the narrower group has served for a while."""
        if (
            self.width >= self._config.tensor_parallel_size
            or time.monotonic() - since < self._options.restore_after_sec
        ):
            return False
        assert self._manager is not None
        return self._capacity.widest(self._manager.hosts.here()) > self.width

    def _widen(self) -> None:
        """Ends a group that is well, for a wider one; its requests are replayed as after a fault."""
        if not self._closing.is_set():
            self._events.record(EventKind.RESTORED, "devices have come back", generation=self.generation)
            self.last_fault = None
            self._owner.lose()
            self._kill()

    def _check_suspected(self, group: ProcessGroup) -> None:
        """Acts on what another thread met."""
        if self._suspected:
            (of, fault), self._suspected = self._suspected[0], []
            if of is group:
                raise GroupFault(fault)

    # --- GPUs seen from outside

    def gpus(self) -> list[dict[str, Any]]:
        """The last look at each GPU; none where NVML is not there."""
        return self._gpus.summary() if self._gpus is not None else []

    def _pids(self) -> list[int]:
        group = self._group
        own = [rank.pid for rank in group.ranks] if group is not None else []
        return own + self._standby.pids()

    def _slot_of(self, gpu: GpuSample) -> int | None:
        if self._manager is None:
            return None
        return self._capacity.slot_of(gpu.pci_bus_id, gpu.index, self._manager.hosts.num_local)

    def _note_unusable(self, gpu: GpuSample, text: str) -> None:
        """A GPU that only a reset mends is left out from the next start on, which comes at once if a rank uses it."""
        slot = self._slot_of(gpu)
        if slot is None:
            return
        self._capacity.exclude(slot, text)
        if gpu.lost:
            self._lost_slots.add(slot)
        group = self._group
        if group is not None and (hit := [rank.rank for rank in group.ranks if rank.slot == slot]):
            self.suspect(group, Fault(FaultKind.DEVICE, text, tuple(hit)))

    def _note_back(self, gpu: GpuSample) -> None:
        """A GPU that was left out because it was lost may be used again; `_may_widen` sees to it."""
        slot = self._slot_of(gpu)
        if slot in self._lost_slots:
            self._lost_slots.discard(slot)
            self._capacity.restore(slot)

    # --- faults

    def _answer(self, fault: Fault) -> bool:
        """Kills the group and decides how to go on; False gives up."""
        group = self._group  # None where an agent went away while ranks were asked for
        fault = cause_of(group, fault) if group is not None else fault
        fault = dataclasses.replace(fault, serving=self._owner.is_serving)
        by_rank = {rank.rank: rank.slot for rank in group.ranks} if group is not None else {}
        # The device of a rank that merely suffered is not to blame.
        slots = tuple(by_rank[rank] for rank in fault.ranks if by_rank.get(rank, -1) >= 0 and not fault.is_effect)
        self.last_fault, self._suspected = fault, []
        self._owner.lose()
        self._events.record(
            EventKind.PROBE_FAILED if "probe" in fault.message else EventKind.FAULT,
            str(fault),
            generation=self.generation,
            rank=fault.ranks[0] if len(fault.ranks) == 1 else None,
            fault=fault.kind.value,
            slots=list(slots),
        )
        self._owner.metrics.count("faults")
        began = time.monotonic()
        self._kill()
        self.parts = {"kill_seconds": round(time.monotonic() - began, 3)}
        self._events.record(EventKind.KILLED, "the group was killed", generation=self.generation, **self.parts)
        decision = self.recovery.decide(fault, slots, can_exclude=self._capacity.can_exclude(slots, self.width))
        if decision.action is Action.FAIL:
            self._give_up(fault, decision)
            return False
        self._apply(decision)
        self._owner.metrics.count("restarts")
        self._delay_until = time.monotonic() + decision.delay
        return True

    def _apply(self, decision: Decision) -> None:
        if decision.action is Action.SHRINK_BATCH:
            self._capacity.shrink_batch()
        elif decision.action is Action.SHRINK_PAGES:
            self._capacity.shrink_pages()
        elif decision.action is Action.EXCLUDE:
            for slot in decision.slots:
                self._capacity.exclude(slot, decision.reason)
                self.recovery.forget_slot(slot)
        if decision.action is not Action.RESTART:
            message = f"{decision.action}: {decision.reason}"
            self._events.record(EventKind.DEGRADED, message, generation=self.generation)

    def _give_up(self, fault: Fault, decision: Decision) -> None:
        self._events.record(EventKind.EXHAUSTED, decision.reason, generation=self.generation)
        if fault.kind is FaultKind.REFUSED and fault.error_type:
            self._owner.fail(remote_error(fault.error_type, fault.message))
            return
        self._owner.fail(RecoveryExhaustedError(f"gave up: {decision.reason}. The last fault was {fault}"))

    # --- ends

    def _drain(self) -> None:
        """Lets the ranks end by themselves."""
        self._standby.drop()
        group = self._group
        if group is None or not self._closing.is_set():
            return
        self._events.record(EventKind.DRAINING, "the ranks are told to end", generation=self.generation)
        with self._owner.sockets_at_rest():
            group.close_steps()
        group.wait_ended(self._options.drain_timeout_sec)

    def _kill(self) -> None:
        group, self._group = self._group, None
        self.monitor.watch(None)
        self._rehearsal.drop()
        if group is None:
            return
        try:
            group.kill_processes()
            with self._owner.sockets_at_rest():
                group.release()
        except (GroupFault, FrameError, OSError) as error:
            self._events.record(EventKind.KILLED, f"killing the group: {error!r}", severity="error")
