"""A machine's agent as the leader holds it: started here, or dialed in from elsewhere; one interface for both."""

from __future__ import annotations

import contextlib
import os
import secrets
import socket
import subprocess
import sys
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable
from typing import Any

from ryzanstein_jax.errors import ProcessGroupError
from ryzanstein_jax.orchestrator.frames import Channel, ChannelClosedError, FrameError, Kind, parse_json
from ryzanstein_jax.orchestrator.secret import SECRET_VARIABLE
from ryzanstein_jax.orchestrator.status import RankSpec

_END_SECONDS = 3.0
#: An agent tells of each rank twice; more than this, of one generation, nobody reads.
_MOST_NEWS = 8192

#: What an agent told.
News = tuple[Kind, dict[str, Any]]

#: Takes a rank's channel: its name ("control", "steps", "log") and the channel. From any thread.
Arrived = Callable[[str, Channel], None]


class HostAgent(ABC):
    """What the leader knows of a machine.

    Attributes:
        name: of the machine; one of a kind.
        num_slots: devices that it offers.
        is_local: whether it is the leader's own.
        channel: to its agent.
        is_up: False once the agent is gone, and its ranks with it.
    """

    def __init__(self, name: str, num_slots: int, channel: Channel, *, is_local: bool):
        self.name, self.num_slots, self.channel, self.is_local = name, num_slots, channel, is_local
        self.is_up = True
        self._news: dict[int, deque[News]] = {}  # of those generations that somebody listens for

    def listen_for(self, generation: int) -> None:
        """Keeps what it tells of a generation, until `read`; what it tells of others is thrown away."""
        self._news.setdefault(generation, deque(maxlen=_MOST_NEWS))

    def stop_listening(self, generation: int) -> None:
        self._news.pop(generation, None)

    def has_news(self, generation: int) -> bool:
        """Whether `read` has something to tell without the agent saying more."""
        return bool(self._news.get(generation)) or not self.is_up

    def read(self, generation: int | None = None) -> list[News]:
        """What it said of a generation since; `is_up` is False afterwards where it is gone."""
        if self.is_up:
            try:
                for kind, payload in self.channel.pending():
                    value = parse_json(payload)
                    of = value.get("generation")
                    if type(of) is int and of in self._news:
                        self._news[of].append((kind, value))
            except (ChannelClosedError, FrameError):
                self.lose()
        if generation not in self._news:
            return []
        said = list(self._news[generation])
        self._news[generation].clear()
        return said

    @abstractmethod
    def spawn(self, spec: RankSpec, log_fd: int, arrived: Arrived) -> None:
        """Has it start a rank, whose channels come through `arrived`: at once, or when the rank has dialed.

        Args:
            spec: of the rank.
            log_fd: where the output of a local rank goes; a remote one brings a channel "log" instead.
            arrived: takes the channels.

        Raises:
            ChannelClosedError: the agent is gone.
        """

    def lose(self) -> None:
        """Has nothing to do with it any more; without a leader its ranks end."""
        self.is_up = False
        self.channel.close()

    def close(self) -> None:
        """Says that this is the end."""
        with contextlib.suppress(ChannelClosedError):
            self.channel.send(Kind.STOP)
        self.lose()


class LocalAgent(HostAgent):
    """This machine's agent. Start it from a thread that lives as long as it shall.

    Args:
        num_slots: devices to use.
    """

    def __init__(self, num_slots: int = 1) -> None:
        channel, theirs = Channel.pair()
        command = [sys.executable, "-m", "ryzanstein_jax.orchestrator.agent", str(theirs.fileno()), str(os.getpid())]
        # A session of its own: Ctrl-C in the leader's terminal is for the leader to handle.
        self.process = subprocess.Popen(
            command,
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            start_new_session=True,
            env={name: value for name, value in os.environ.items() if name != SECRET_VARIABLE},
        )
        theirs.close()
        super().__init__("this machine", num_slots, channel, is_local=True)
        self._is_ready = False

    def wait(self, deadline: float) -> None:
        """Until it has imported all.

        Raises:
            ProcessGroupError: it ended, or took too long.
        """
        if self._is_ready:
            return
        try:
            frame = self.channel.receive(max(0.0, deadline - time.monotonic()))
        except (ChannelClosedError, FrameError) as error:
            code = self.process.wait(_END_SECONDS)
            raise ProcessGroupError(f"the agent of this machine ended with {code} while it started: {error}") from error
        if frame is None or frame[0] is not Kind.HELLO:
            raise ProcessGroupError("the agent of this machine did not start in time")
        self._is_ready = True

    def spawn(self, spec: RankSpec, log_fd: int, arrived: Arrived) -> None:
        (control, control_child), (steps, steps_child) = Channel.pair(), Channel.pair()
        arrived("steps", steps)
        arrived("control", control)
        try:
            fds = (control_child.fileno(), steps_child.fileno(), log_fd)
            self.channel.send_json(Kind.SPAWN, vars(spec), fds=fds)
        finally:
            control_child.close()
            steps_child.close()

    def close(self) -> None:
        super().close()
        try:
            self.process.wait(_END_SECONDS)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


class RemoteAgent(HostAgent):
    """The agent of another machine, which dialed the leader and proved the secret.

    Args:
        name: that it gave.
        num_slots: devices that it offers.
        channel: to it.
        peer: its address.
        local_address: of this machine, as it is reached from there.
        tickets: the ranks that are awaited, whoever awaits them.
    """

    def __init__(
        self, name: str, num_slots: int, channel: Channel, peer: str, local_address: str, tickets: dict[str, Arrived]
    ):
        super().__init__(name, num_slots, channel, is_local=False)
        self.peer, self.local_address, self._tickets = peer, local_address, tickets

    def spawn(self, spec: RankSpec, log_fd: int, arrived: Arrived) -> None:
        self._tickets[spec.ticket] = arrived
        self.channel.send_json(Kind.SPAWN, vars(spec))

    def forget(self, ticket: str) -> None:
        """A rank that comes with this ticket comes too late."""
        self._tickets.pop(ticket, None)

    def kill(self, generation: int) -> None:
        """Has it kill the ranks of a generation; it tells how each ended."""
        with contextlib.suppress(ChannelClosedError):
            self.channel.send_json(Kind.KILL, {"generation": generation})

    def looks_gone(self) -> bool:
        """Whether its connection has ended, although nobody has read that yet. From any thread."""
        return self.channel.looks_closed()


def new_ticket() -> str:
    """What one rank shows to be let in as that rank, once."""
    return secrets.token_hex(16)


def closed_channel() -> Channel:
    """Stands for a channel that has not come yet."""
    sock = socket.socket(socket.AF_UNIX)
    channel = Channel(sock)
    sock.close()
    return channel
