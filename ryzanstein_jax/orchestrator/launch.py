"""Brings up one generation of a group: ranks join, the model is placed and loaded, all agree on what fits a step.

A standby goes half the way: its ranks join and load their programs, and take the rest when they are needed.
"""

from __future__ import annotations

import dataclasses
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from ryzanstein_jax.budget import resolve_fraction
from ryzanstein_jax.config import EngineConfig, OrchestratorConfig
from ryzanstein_jax.engine.executor import ExecutorLimits
from ryzanstein_jax.engine.report import SetupReport
from ryzanstein_jax.errors import RyzansteinError
from ryzanstein_jax.orchestrator.devices import DeviceReport
from ryzanstein_jax.orchestrator.fault import Fault, FaultKind, GroupFault
from ryzanstein_jax.orchestrator.frames import FrameError, Kind
from ryzanstein_jax.orchestrator.health import HealthMonitor
from ryzanstein_jax.orchestrator.process_group import Notice, ProcessGroup

Progress = Callable[[str, int, int], None]
#: How often the ranks are looked at, in seconds.
TICK = 0.05
#: How long the cause of a fault gets to show itself, in seconds, at most.
_CAUSE_SECONDS = 2.0
#: A rank tells of so many settings at most.
_MOST_SETTINGS = 200
#: Frames that a launch waits for, each once from every rank.
_AWAITED = (Kind.HELLO, Kind.PREPARED, Kind.READY)


@dataclass(frozen=True)
class Ready:
    """What a group that has loaded its model offers.

    Attributes:
        limits: of a step; the same on all ranks.
        report: of rank 0.
        counters: of rank 0's metrics.
        join_seconds, load_seconds: from the launch to the last HELLO, from there to the last READY.
    """

    limits: ExecutorLimits
    report: SetupReport
    counters: dict[str, int]
    join_seconds: float
    load_seconds: float


class Launch:
    """Waits for a group step by step, while the health monitor looks on.

    Attributes:
        prepared_for: with which settings its programs were loaded ahead; None where they were not.

    Args:
        group: the ranks, just launched.
        monitor: watches them already.
        options: the deadline.
        is_closing: asked all the time; ends the wait.

    Attributes:
        communication: of each rank that has joined, by its number: name, value and origin of what it communicates by.
    """

    def __init__(
        self,
        group: ProcessGroup,
        monitor: HealthMonitor,
        options: OrchestratorConfig,
        is_closing: Callable[[], bool],
    ):
        self.group, self._monitor, self._is_closing = group, monitor, is_closing
        self._timeout = options.timeout_sec
        self.communication: dict[str, list[list[str | None]]] = {}
        self._answers: dict[Kind, dict[int, dict[str, Any]]] = {kind: {} for kind in _AWAITED}
        self._progress: Progress = lambda what, done, total: None
        self.prepared_for: EngineConfig | None = None
        self._restart_clock()

    def _restart_clock(self) -> None:
        self._began = self._stage = time.monotonic()
        self._deadline = self._began + self._timeout

    def hand_over(self, monitor: HealthMonitor, is_closing: Callable[[], bool]) -> None:
        """A standby takes its place: `join` and `load` follow, as for a group just launched."""
        self._monitor, self._is_closing = monitor, is_closing
        self._restart_clock()
        for rank in self.group.ranks:  # until now nobody minded how long one was busy with a load
            rank.beat_time = self._began

    def prepare(self, config: EngineConfig) -> None:
        """Has all ranks load the model's programs, and nothing that takes memory of a device.

        Raises:
            GroupFault: one does not take the order.
        """
        self.prepared_for = config
        self.group.tell(Kind.PREPARE, {"config": dataclasses.asdict(config)})

    def join(self) -> list[DeviceReport]:
        """The devices of all ranks, in order, once all have joined.

        Raises:
            GroupFault: a rank failed, or the deadline passed.
        """
        answers = self._gather(Kind.HELLO)
        devices: list[DeviceReport] = []
        for rank in range(len(self.group.ranks)):
            value = answers[rank]
            try:
                if value["rank"] != rank or value["generation"] != self.group.generation:
                    raise FrameError("it greets as another rank")
                devices += [DeviceReport.from_json(text) for text in value["devices"]]
                self.communication[str(rank)] = [
                    [None if part is None else str(part)[:300] for part in (name, setting, origin)]
                    for name, setting, origin in value.get("communication", [])[:_MOST_SETTINGS]
                ]
            except (KeyError, TypeError, ValueError, RyzansteinError) as error:
                raise GroupFault(Fault(FaultKind.START, f"it greets wrongly: {error}", (rank,))) from error
        return devices

    def wait(self, may_load: threading.Event) -> None:
        """Until it is set; no part of the start. Ranks go on to beat meanwhile, and must find a reader.

        Raises:
            GroupFault: as `join`.
        """
        began = time.monotonic()
        while not may_load.is_set():
            self.listen(TICK)
        waited = time.monotonic() - began
        self._began, self._deadline = self._began + waited, self._deadline + waited

    def load(self, config: EngineConfig, progress: Progress) -> Ready:
        """Has all ranks load the model.

        Raises:
            GroupFault: as `join`; or the ranks do not agree.
        """
        joined, self._stage = time.monotonic() - self._began, time.monotonic()
        self._progress = progress
        self.group.tell(Kind.START, {"config": dataclasses.asdict(config)})
        answers = self._gather(Kind.READY)
        try:
            first = answers[0]
            for rank, value in answers.items():
                if value["limits"] != first["limits"]:
                    message = f"it has other limits than rank 0: {value['limits']} and {first['limits']}"
                    raise GroupFault(Fault(FaultKind.REFUSED, message, (rank,)))
            if not all(type(limit) is int and limit > 0 for limit in first["limits"].values()):
                raise ValueError(first["limits"])
            return Ready(
                limits=ExecutorLimits(**first["limits"]),
                report=SetupReport.from_json(first["report"]),
                counters={str(name): int(count) for name, count in first["counters"].items()},
                join_seconds=joined,
                load_seconds=time.monotonic() - self._stage,
            )
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
            message = f"it is ready in another language: {error!r:.500}"
            raise GroupFault(Fault(FaultKind.START, message, (0,))) from error

    def has(self, kind: Kind) -> bool:
        """Whether every rank has sent its frame of a kind: HELLO, PREPARED or READY."""
        return len(self._answers[kind]) == len(self.group.ranks)

    def listen(self, timeout: float) -> None:
        """Hears what ranks say; waits up to `timeout` seconds for the first of it.

        Raises:
            GroupFault: a rank failed.
        """
        for notice in self.group.poll(timeout):
            fault_if_error(self.group, notice, serving=False)
            if notice.kind in self._answers:
                self._answers[notice.kind][notice.rank] = notice.json()
            elif notice.kind is Kind.PROGRESS and notice.rank == 0:
                value = notice.json()
                done, total = value.get("done"), value.get("total")
                if type(done) is int and type(total) is int:
                    self._progress(str(value.get("what"))[:40], done, total)
        fault = self._monitor.check()
        if fault is not None:
            raise GroupFault(fault)

    def _gather(self, kind: Kind) -> dict[int, dict[str, Any]]:
        """One frame of a kind from every rank."""
        while not self.has(kind):
            if self._is_closing():
                raise GroupFault(Fault(FaultKind.REFUSED, "the orchestrator is closing"))
            self.listen(TICK)
            self.check_time(kind)
        return self._answers[kind]

    def check_time(self, kind: Kind) -> None:
        """Raises GroupFault where a frame is overdue."""
        if self.has(kind) or time.monotonic() <= self._deadline:
            return
        missing = tuple(rank.rank for rank in self.group.ranks if rank.rank not in self._answers[kind])
        message = f"not {kind.name.lower()} within timeout_sec={self._timeout:g}"
        log = tuple(self.group.ranks[missing[0]].logs.tail(10))
        raise GroupFault(Fault(FaultKind.START, message, missing, log=log))


def fault_if_error(group: ProcessGroup, notice: Notice, *, serving: bool) -> None:
    """Raises the GroupFault that a rank's ERROR stands for."""
    if notice.kind is not Kind.ERROR:
        return
    value = notice.json()
    try:
        kind = FaultKind(str(value.get("kind")))
    except ValueError:
        kind = FaultKind.EXCEPTION
    if kind is FaultKind.EXCEPTION and not serving:
        kind = FaultKind.START
    message = str(value.get("message"))
    log = () if kind is FaultKind.REFUSED else tuple(group.ranks[notice.rank].logs.tail(10))
    raise GroupFault(
        Fault(
            kind,
            message,
            (notice.rank,),
            serving=serving,
            error_type=str(value.get("type")),
            log=log,
            is_effect=kind is FaultKind.COLLECTIVE,
        )
    )


def cause_of(group: ProcessGroup, fault: Fault) -> Fault:
    """What lies behind a fault that may be an effect: whatever else shows itself soon, or else the fault.

    Who has died shows itself in a moment, unless the machine is busy. So it is waited for while there are ranks of
    which nothing is known yet.
    """
    if not fault.is_effect:
        return fault
    told = set(fault.ranks)
    deadline = time.monotonic() + _CAUSE_SECONDS
    while len(told) < len(group.ranks) and (left := deadline - time.monotonic()) > 0:
        try:
            notices = group.poll(left)
        except GroupFault as failure:
            if not failure.fault.ranks or not told.issuperset(failure.fault.ranks):
                return dataclasses.replace(failure.fault, seen=fault.seen)
            continue  # a rank that told of an effect ends: that is one too
        for notice in notices:
            try:
                fault_if_error(group, notice, serving=True)
            except GroupFault as failure:
                if not failure.fault.is_effect:
                    return dataclasses.replace(failure.fault, seen=fault.seen)
                told.add(notice.rank)
    return fault


def rank_config(
    config: EngineConfig, devices: Sequence[DeviceReport], num_pages: int | None, page_share: float = 1.0
) -> EngineConfig:
    """The settings that ranks load with.

    CPU devices of one host share its memory.

    Args:
        config: as the user gave it.
        devices: of the ranks; they are the mesh.
        num_pages: that an earlier generation of this width settled on, if there was one.
        page_share: where there was none, how much of the user's pages, or else of the memory, to take.
    """
    platform = devices[0].platform
    fraction = resolve_fraction(config.memory_fraction, platform)
    if platform == "cpu":
        sharing = max(sum(device.host == other.host for other in devices) for device in devices)
        fraction /= sharing * config.data_parallel_size  # replicas are on one host
    if num_pages is None and config.num_pages is not None:
        num_pages = max(2, int(config.num_pages * page_share))
    elif num_pages is None:
        fraction *= page_share
    return config.replace(tensor_parallel_size=len(devices), memory_fraction=fraction, num_pages=num_pages)
