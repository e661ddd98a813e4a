"""`ProcessGroupManager`: starts ranks, hears them, sends to them and kills them.

Each machine has an agent (see `agent`), which the manager keeps between generations: a new rank is a fork of it, with
all imports done. Ranks and agent are apart from the leader's terminal, and end with the leader, however it ends.
"""

from __future__ import annotations

import contextlib
import os
import select
import selectors
import signal
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from ryzanstein_jax.config import OrchestratorConfig
from ryzanstein_jax.orchestrator.coordinator import Coordinator
from ryzanstein_jax.orchestrator.fault import Fault, FaultKind, GroupFault
from ryzanstein_jax.orchestrator.frames import Channel, ChannelClosedError, FrameError, Kind, parse_json
from ryzanstein_jax.orchestrator.host import LocalAgent
from ryzanstein_jax.orchestrator.logs import RankLogs, RunLogs
from ryzanstein_jax.orchestrator.status import FAULT_VARIABLE, Heartbeat, RankSpec

_AGENT_START_SECONDS = 120.0
_KILL_SECONDS = 10.0


@dataclass(eq=False)
class Rank:
    """One rank as the leader sees it.

    Attributes:
        rank, slot: its number in the group, and its device.
        control, steps: channels to it.
        logs: what it writes.
        pid, pidfd: its process, once the agent has told; -1 before.
        exit_code: how it ended (negative: by that signal); None while it lives, or where only its end is known.
        beat, beat_time: the last heartbeat, and when it came.
    """

    rank: int
    slot: int
    control: Channel
    steps: Channel
    logs: RankLogs
    pid: int = -1
    pidfd: int = -1
    exit_code: int | None = None
    ended: bool = False
    beat: Heartbeat = field(default_factory=Heartbeat)
    beat_time: float = field(default_factory=time.monotonic)


@dataclass(frozen=True)
class Notice:
    """A frame that a rank sent on its control channel; heartbeats are taken note of and not passed on."""

    rank: int
    kind: Kind
    payload: bytes

    def json(self) -> dict[str, Any]:
        """Raises GroupFault where it is no JSON object."""
        try:
            return parse_json(self.payload)
        except FrameError as error:
            fault = Fault(FaultKind.EXCEPTION, f"it sent what no rank sends: {error}", (self.rank,))
            raise GroupFault(fault) from error


class ProcessGroup:
    """The ranks of one generation.

    Attributes:
        generation: counted from 1.
        ranks: in order.
    """

    def __init__(self, generation: int, agent: LocalAgent, coordinator: Coordinator | None):
        self.generation, self.ranks = generation, list[Rank]()
        self._agent, self._coordinator = agent, coordinator
        self._selector = selectors.DefaultSelector()
        self._selector.register(agent.channel, selectors.EVENT_READ, self._read_agent)
        self._wake = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._selector.register(self._wake, selectors.EVENT_READ, lambda: os.eventfd_read(self._wake) and [])

    def add(self, spec: RankSpec, logs: RankLogs) -> None:
        """Asks the agent for one more rank."""
        (control, control_child), (steps, steps_child) = Channel.pair(), Channel.pair()
        rank = Rank(spec.rank, spec.slot, control, steps, logs)
        fds = (control_child.fileno(), steps_child.fileno(), logs.writer_fd)
        try:
            self._agent.channel.send_json(Kind.SPAWN, vars(spec), fds=fds)
        except ChannelClosedError as error:
            raise GroupFault(self._agent_gone()) from error
        finally:
            control_child.close()
            steps_child.close()
            logs.started()
            self.ranks.append(rank)
        self._selector.register(control, selectors.EVENT_READ, lambda: self._read_control(rank))

    # --- hearing

    def poll(self, timeout: float) -> list[Notice]:
        """What ranks said; waits up to `timeout` seconds for the first of it, or for `wake`.

        Raises:
            GroupFault: a rank, or the agent, has ended or talks nonsense.
        """
        notices: list[Notice] = []
        for key, _ in self._selector.select(timeout):
            notices += key.data() or ()
        return notices

    def wake(self) -> None:
        """Has `poll` return, from another thread."""
        if self._wake >= 0:
            with contextlib.suppress(OSError):
                os.eventfd_write(self._wake, 1)

    def _read_agent(self) -> list[Notice]:
        try:
            frames = self._agent.channel.pending()
        except (ChannelClosedError, FrameError) as error:
            raise GroupFault(self._agent_gone()) from error
        for kind, payload in frames:
            value = parse_json(payload)
            rank = next((r for r in self.ranks if r.rank == value.get("rank")), None)
            if rank is None or value.get("generation") != self.generation:
                continue  # of a generation that is gone
            if kind is Kind.SPAWNED:
                rank.pid = int(value["pid"])
                with contextlib.suppress(ProcessLookupError):  # it has ended, and the agent will tell how
                    rank.pidfd = os.pidfd_open(rank.pid)
                    self._selector.register(rank.pidfd, selectors.EVENT_READ, lambda rank=rank: self._note_end(rank))
            elif kind is Kind.EXITED:
                rank.exit_code = int(value["code"])
                if not rank.ended:
                    self._note_end(rank)
        return []

    def _agent_gone(self) -> Fault:
        return Fault(FaultKind.PROCESS_DEATH, "the agent of this machine has ended, and its ranks with it")

    def _note_end(self, rank: Rank) -> list[Notice]:
        """A rank's process has ended: that is a fault, whatever its channels still hold."""
        rank.ended = True
        self._forget(rank)
        if rank.exit_code is None:  # only its parent can know, and tells in a moment
            with contextlib.suppress(ChannelClosedError, FrameError, GroupFault):
                poller = select.poll()
                poller.register(self._agent.channel, select.POLLIN)
                if poller.poll(100):
                    self._read_agent()
        raise GroupFault(self.fault_of_end(rank))

    def fault_of_end(self, rank: Rank) -> Fault:
        code = rank.exit_code
        how = "ended" if code is None else f"was killed by {_signal_name(-code)}" if code < 0 else f"exited with {code}"
        return Fault(
            FaultKind.PROCESS_DEATH, f"its process {rank.pid} {how}", (rank.rank,), log=tuple(rank.logs.tail(10))
        )

    def _read_control(self, rank: Rank) -> list[Notice]:
        try:
            frames = rank.control.pending()
            notices = []
            for kind, payload in frames:
                if kind is Kind.HEARTBEAT:
                    rank.beat, rank.beat_time = Heartbeat.from_bytes(payload), time.monotonic()
                else:
                    notices.append(Notice(rank.rank, kind, payload))
            return notices
        except ChannelClosedError:
            self._selector.unregister(rank.control)  # its process is about to end, which tells more
            return []
        except FrameError as error:
            fault = Fault(FaultKind.EXCEPTION, f"it sent what no rank sends: {error}", (rank.rank,))
            raise GroupFault(fault) from error

    def _forget(self, rank: Rank) -> None:
        for fileobj in (rank.control, rank.pidfd):
            with contextlib.suppress(KeyError, ValueError):
                self._selector.unregister(fileobj)

    # --- telling

    def tell(self, kind: Kind, value: Any, rank: int | None = None) -> None:
        """Sends an order to one rank, or to all.

        Raises:
            GroupFault: one does not take it.
        """
        for receiver in self.ranks if rank is None else [self.ranks[rank]]:
            try:
                receiver.control.send_json(kind, value)
            except ChannelClosedError as error:
                raise GroupFault(self._fault_of_silence(receiver, error)) from error

    def broadcast(self, plan: bytes) -> None:
        """Sends a step's plan to all ranks; raises as `tell`."""
        for receiver in self.ranks:
            try:
                receiver.steps.send(Kind.PLAN, plan)
            except ChannelClosedError as error:
                raise GroupFault(self._fault_of_silence(receiver, error)) from error

    def _fault_of_silence(self, rank: Rank, error: Exception) -> Fault:
        return Fault(FaultKind.PROCESS_DEATH, f"it takes nothing any more: {error}", (rank.rank,))

    def barrier(self, timeout: float) -> list[Notice]:
        """Waits until every rank has read and answered all that it was told before; returns what else they said.

        Raises:
            GroupFault: one has failed, or did not answer within `timeout` seconds.
        """
        self.tell(Kind.PING, {})
        missing, others = {rank.rank for rank in self.ranks}, []
        deadline = time.monotonic() + timeout
        while missing:
            for notice in self.poll(max(0.0, deadline - time.monotonic())):
                if notice.kind is Kind.PONG:
                    missing.discard(notice.rank)
                else:
                    others.append(notice)
            if missing and time.monotonic() >= deadline:
                message = f"no answer within {timeout:g} s"
                raise GroupFault(Fault(FaultKind.HANG, message, tuple(sorted(missing))))
        return others

    # --- ending

    def close_steps(self) -> None:
        """Lets the ranks end by themselves: there are no more steps."""
        for rank in self.ranks:
            rank.steps.close()

    def wait_ended(self, timeout: float) -> bool:
        """Whether all processes ended within so many seconds."""
        deadline = time.monotonic() + timeout
        with contextlib.suppress(GroupFault, FrameError):
            self._read_agent()  # a rank that was just spawned has its pid only there
        for rank in self.ranks:
            if rank.pidfd >= 0:
                poller = select.poll()
                poller.register(rank.pidfd, select.POLLIN)
                if not poller.poll(max(0.0, deadline - time.monotonic()) * 1000):
                    return False
        return True

    def kill(self) -> None:
        """`kill_processes`, then `release`."""
        self.kill_processes()
        self.release()

    def kill_processes(self) -> None:
        """Kills all ranks by their pids and waits until they are gone."""
        with contextlib.suppress(ChannelClosedError, FrameError, GroupFault):
            self._await_pids(1.0)
        for rank in self.ranks:
            if rank.pidfd >= 0:
                with contextlib.suppress(ProcessLookupError):
                    signal.pidfd_send_signal(rank.pidfd, signal.SIGKILL)
        self.wait_ended(_KILL_SECONDS)

    def _await_pids(self, timeout: float) -> None:
        """Of a rank that was only just asked for, the pid is still on its way."""
        deadline = time.monotonic() + timeout
        poller = select.poll()
        poller.register(self._agent.channel, select.POLLIN)
        while any(rank.pid < 0 for rank in self.ranks) and time.monotonic() < deadline:
            if poller.poll(100):
                with contextlib.suppress(GroupFault):
                    self._read_agent()
                if self._agent.process.poll() is not None:
                    return

    def release(self) -> None:
        """Closes channels, descriptors and the coordination service."""
        self._selector.close()
        wake, self._wake = self._wake, -1  # another thread may still call `wake`, and the number will be another file's
        os.close(wake)
        for rank in self.ranks:
            rank.control.close()
            rank.steps.close()
            rank.logs.close()
            if rank.pidfd >= 0:
                os.close(rank.pidfd)
                rank.pidfd = -1
        if self._coordinator is not None:
            self._coordinator.close()


class ProcessGroupManager:
    """Makes groups of ranks on this machine.

    Args:
        config: times and limits.
        logs: where ranks' output goes.
    """

    def __init__(self, config: OrchestratorConfig, logs: RunLogs):
        self._config, self._logs = config, logs
        self._agent: LocalAgent | None = None

    def prepare(self) -> None:
        """Starts the agent, where none lives, and returns while it imports."""
        if self._agent is not None and self._agent.process.poll() is None:
            return
        if self._agent is not None:
            self._agent.close()
        self._agent = LocalAgent()

    def launch(
        self, slots: Sequence[int], *, generation: int, width: int, environment: dict[str, str] | None = None
    ) -> ProcessGroup:
        """Starts one rank on each slot (-1: one rank on all devices), and returns while they join.

        Raises:
            ProcessGroupError: the agent can't be started.
            GroupFault: it went away.
        """
        self.prepare()
        assert self._agent is not None
        self._agent.wait(time.monotonic() + min(_AGENT_START_SECONDS, self._config.timeout_sec))
        count = len(slots)
        coordinator = Coordinator(count) if count > 1 else None
        group = ProcessGroup(generation, self._agent, coordinator)
        try:
            for rank, slot in enumerate(slots):
                spec = RankSpec(
                    rank=rank,
                    num_processes=count,
                    generation=generation,
                    slot=slot,
                    local_index=rank,
                    local_count=count,
                    width=width,
                    address=coordinator.address if coordinator else "",
                    hosted=coordinator.hosted if coordinator else False,
                    heartbeat_interval_sec=self._config.heartbeat_interval_sec,
                    environment=environment or {},
                    fault=os.environ.get(FAULT_VARIABLE, ""),
                )
                group.add(spec, self._logs.open(rank, generation))
        except BaseException:
            group.kill()
            raise
        return group

    def close(self) -> None:
        """Ends the agent; all groups are gone by then, or go with it."""
        if self._agent is not None:
            self._agent.close()
            self._agent = None


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
