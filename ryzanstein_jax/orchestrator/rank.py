"""A rank as the leader sees it, and what it says."""

from __future__ import annotations

import select
import time
from dataclasses import dataclass, field
from typing import Any

from ryzanstein_jax.orchestrator.fault import Fault, FaultKind, GroupFault
from ryzanstein_jax.orchestrator.frames import Channel, FrameError, Kind, parse_json
from ryzanstein_jax.orchestrator.host import HostAgent
from ryzanstein_jax.orchestrator.logs import RankLogs
from ryzanstein_jax.orchestrator.status import Heartbeat


@dataclass(eq=False)
class Rank:
    """One rank as the leader sees it.

    Attributes:
        rank, slot: its number in the group, and its device among those of all machines.
        control, steps: channels to it.
        logs: what it writes.
        pid, pidfd: its process, once the agent has told; -1 before, and of another machine.
        exit_code: how it ended (negative: by that signal); None while it lives, or where only its end is known.
        beat, beat_time: the last heartbeat, and when it came.
        agent: of its machine.
        remote_pid: its process on another machine; -1 as long as it is not known.
        ticket: with which it may come; "" on this machine.
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
    agent: HostAgent | None = None
    remote_pid: int = -1
    ticket: str = ""

    @property
    def is_gone(self) -> bool:
        """Whether its process has ended, or nothing can be known of it."""
        if self.pidfd >= 0:
            poller = select.poll()
            poller.register(self.pidfd, select.POLLIN)
            return bool(poller.poll(0))
        return self.exit_code is not None or self.agent is None or self.agent.is_local or not self.agent.is_up


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
