"""`ProcessGroup`: the ranks of one generation. Hears them, sends to them and kills them.

Each machine has an agent (see `agent`), which `hosts` keeps between generations: a new rank is a fork of it, with
all imports done. Ranks and agent are apart from the leader's terminal, and end with the leader, however it ends.
A rank of this machine has a process that can be watched and killed; of another one, its agent tells and does that.
"""

from __future__ import annotations

import contextlib
import os
import select
import selectors
import signal
import time
from collections import deque
from typing import Any

from ryzanstein_jax.orchestrator.coordinator import Coordinator
from ryzanstein_jax.orchestrator.fault import Fault, FaultKind, GroupFault
from ryzanstein_jax.orchestrator.frames import Channel, ChannelClosedError, FrameError, Kind
from ryzanstein_jax.orchestrator.host import HostAgent, LocalAgent, RemoteAgent, closed_channel
from ryzanstein_jax.orchestrator.logs import RankLogs
from ryzanstein_jax.orchestrator.rank import Notice, Rank
from ryzanstein_jax.orchestrator.status import Heartbeat, RankSpec

_KILL_SECONDS = 10.0
#: How long it may take to learn how a process ended whose end is known: its parent tells.
_EXIT_SECONDS = 1.0


class ProcessGroup:
    """The ranks of one generation.

    Attributes:
        generation: counted from 1.
        ranks: in order.
    """

    def __init__(self, generation: int, coordinator: Coordinator | None):
        self.generation, self.ranks = generation, list[Rank]()
        self._coordinator = coordinator
        self._kills_for_memory = _kills_for_memory()
        self._agents: list[HostAgent] = []
        self._arrivals: deque[tuple[Rank, str, Channel]] = deque()  # from the listener's threads
        self._selector = selectors.DefaultSelector()
        self._wake = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._selector.register(self._wake, selectors.EVENT_READ, lambda: os.eventfd_read(self._wake) and [])

    def add(self, spec: RankSpec, slot: int, agent: HostAgent, logs: RankLogs) -> None:
        """Asks an agent for one more rank."""
        rank = Rank(spec.rank, slot, closed_channel(), closed_channel(), logs, agent=agent, ticket=spec.ticket)
        self.ranks.append(rank)
        if agent not in self._agents:
            self._agents.append(agent)
            agent.listen_for(self.generation)
            self._selector.register(agent.channel, selectors.EVENT_READ, lambda: self._read_agent(agent))

        def arrived(name: str, channel: Channel) -> None:
            self._arrivals.append((rank, name, channel))
            self.wake()

        try:
            agent.spawn(spec, logs.writer_fd, arrived)
        except ChannelClosedError as error:
            raise GroupFault(self._agent_gone(agent)) from error
        finally:
            if agent.is_local:
                logs.started()
        self._take_arrivals()

    def _take_arrivals(self) -> None:
        while self._arrivals:
            rank, name, channel = self._arrivals.popleft()
            if name == "log":
                rank.logs.attach(channel.detach())
            elif getattr(rank, name).fileno() >= 0:
                channel.close()  # it came already
            elif name == "control":
                rank.control = channel
                self._selector.register(channel, selectors.EVENT_READ, lambda rank=rank: self._read_control(rank))
            else:
                rank.steps = channel

    # --- hearing

    def poll(self, timeout: float) -> list[Notice]:
        """What ranks said; waits up to `timeout` seconds for the first of it, or for `wake`.

        Raises:
            GroupFault: a rank, or an agent, has ended or talks nonsense.
        """
        notices: list[Notice] = []
        for agent in self._agents:
            if agent.has_news(self.generation):  # another group read it, and nothing would wake this one
                notices += self._read_agent(agent)
        self._take_arrivals()
        for key, _ in self._selector.select(timeout):
            notices += key.data() or ()
        self._take_arrivals()
        return notices

    def wake(self) -> None:
        """Has `poll` return, from another thread."""
        if self._wake >= 0:
            with contextlib.suppress(OSError):
                os.eventfd_write(self._wake, 1)

    def _read_agent(self, agent: HostAgent) -> list[Notice]:
        ended: Rank | None = None
        for kind, value in agent.read(self.generation):
            rank = next((r for r in self.ranks if r.agent is agent and r.rank == value.get("rank")), None)
            if rank is None:
                continue
            if kind is Kind.SPAWNED:
                self._note_pid(rank, int(value["pid"]))
            elif kind is Kind.EXITED:
                rank.exit_code = int(value["code"])
                ended = ended or (None if rank.ended else rank)
        if not agent.is_up:
            with contextlib.suppress(KeyError, ValueError):
                self._selector.unregister(agent.channel)
            raise GroupFault(self._agent_gone(agent))
        return self._note_end(ended) if ended is not None else []

    def _note_pid(self, rank: Rank, pid: int) -> None:
        if rank.agent is None or not rank.agent.is_local:
            rank.remote_pid = pid
            return
        rank.pid = pid
        with contextlib.suppress(ProcessLookupError):  # it has ended, and the agent will tell how
            rank.pidfd = os.pidfd_open(pid)
            self._selector.register(rank.pidfd, selectors.EVENT_READ, lambda: self._note_end(rank))

    def _agent_gone(self, agent: HostAgent) -> Fault:
        text = f"the agent of {agent.name} has ended, and its ranks with it"
        return Fault(FaultKind.PROCESS_DEATH, text, is_external=True)

    def _note_end(self, rank: Rank) -> list[Notice]:
        """A rank's process has ended: that is a fault, whatever its channels still hold."""
        rank.ended = True
        self._forget(rank)
        agent = rank.agent
        if rank.exit_code is None and agent is not None and agent.is_up:
            # Only its parent can know, and tells in a moment; if that is gone too, this is what has happened.
            deadline = time.monotonic() + _EXIT_SECONDS
            with contextlib.suppress(FrameError):
                poller = select.poll()
                poller.register(agent.channel, select.POLLIN)
                while rank.exit_code is None and (left := deadline - time.monotonic()) > 0:
                    if agent.has_news(self.generation) or poller.poll(left * 1000):
                        self._read_agent(agent)
        raise GroupFault(self.fault_of_end(rank))

    def fault_of_end(self, rank: Rank) -> Fault:
        code = rank.exit_code
        how = "ended" if code is None else f"was killed by {_signal_name(-code)}" if code < 0 else f"exited with {code}"
        return Fault(
            FaultKind.PROCESS_DEATH,
            f"its process {max(rank.pid, rank.remote_pid)} {how}",
            (rank.rank,),
            log=tuple(rank.logs.tail(10)),
            # The kernel kills too, for want of memory, and then what ran may well be the reason.
            is_external=code in (-signal.SIGKILL, -signal.SIGTERM) and _kills_for_memory() == self._kills_for_memory,
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
            self._selector.unregister(rank.control)
            if rank.agent is not None and not rank.agent.is_local:
                return self._note_end(rank)
            return []  # its process is about to end, which tells more
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
        """Sends a step's plan to all ranks; raises as `tell`.

        Each rank loads programs when it finds the time. Which of them a step may run is decided here, for all alike.
        """
        kind = Kind.PLAN if all(rank.beat.has_loaded for rank in self.ranks) else Kind.HASTY_PLAN
        for receiver in self.ranks:
            try:
                receiver.steps.send(kind, plan)
            except ChannelClosedError as error:
                raise GroupFault(self._fault_of_silence(receiver, error)) from error

    def _fault_of_silence(self, rank: Rank, error: Exception) -> Fault:
        text = f"it takes nothing any more: {error}"  # its sentinel may say more in a moment
        return Fault(FaultKind.PROCESS_DEATH, text, (rank.rank,), is_effect=True)

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
        while True:
            for agent in self._agents:
                with contextlib.suppress(GroupFault, FrameError):
                    self._read_agent(agent)  # a rank that was just spawned has its pid only there
            missing = [rank for rank in self.ranks if not rank.is_gone]
            left = deadline - time.monotonic()
            if not missing or left <= 0:
                return not missing
            poller = select.poll()
            for rank in missing:
                assert rank.agent is not None
                poller.register(rank.pidfd if rank.agent.is_local else rank.agent.channel, select.POLLIN)
            poller.poll(left * 1000)

    def kill(self) -> None:
        """`kill_processes`, then `release`."""
        self.kill_processes()
        self.release()

    def kill_processes(self) -> None:
        """Kills all ranks and waits until they are gone. A machine that does not do so is out."""
        for agent in self._agents:
            if isinstance(agent, RemoteAgent):
                agent.kill(self.generation)
        with contextlib.suppress(FrameError):
            self._await_pids(1.0)
        for rank in self.ranks:
            if rank.pidfd >= 0:
                with contextlib.suppress(ProcessLookupError):
                    signal.pidfd_send_signal(rank.pidfd, signal.SIGKILL)
        self.wait_ended(_KILL_SECONDS)
        for rank in self.ranks:
            if isinstance(rank.agent, RemoteAgent) and not rank.is_gone:
                rank.agent.lose()

    def _await_pids(self, timeout: float) -> None:
        """Of a rank that was only just asked for, the pid is still on its way."""
        deadline = time.monotonic() + timeout
        for agent in self._agents:
            if not isinstance(agent, LocalAgent) or not agent.is_up:
                continue
            poller = select.poll()
            poller.register(agent.channel, select.POLLIN)
            while any(rank.agent is agent and rank.pid < 0 for rank in self.ranks) and time.monotonic() < deadline:
                if agent.has_news(self.generation) or poller.poll(100):
                    with contextlib.suppress(GroupFault):
                        self._read_agent(agent)
                    if agent.process.poll() is not None or not agent.is_up:
                        return

    def release(self) -> None:
        """Closes channels, descriptors and the coordination service."""
        for agent in self._agents:
            agent.stop_listening(self.generation)
        for rank in self.ranks:
            if isinstance(rank.agent, RemoteAgent):
                rank.agent.forget(rank.ticket)
        while self._arrivals:
            self._arrivals.popleft()[2].close()
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


def _kills_for_memory() -> int:
    """Processes that the kernel has killed for want of memory since this machine started; 0 where it doesn't tell."""
    try:
        with open("/proc/vmstat", encoding="ascii") as file:
            return next((int(line.split()[1]) for line in file if line.startswith("oom_kill ")), 0)
    except OSError:
        return 0


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
