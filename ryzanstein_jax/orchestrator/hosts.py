"""The machines that ranks may run on: this one, and those whose agents dialed in.

Devices have numbers, the *slots*, that stay with their machine while it is away: what the leader learnt about a device
holds when the machine comes back. Agents are read by the supervisor's thread alone; they are let in by the listener's.
"""

from __future__ import annotations

import secrets
import threading
import time
from collections.abc import Callable
from typing import Any

from ryzanstein_jax.config import OrchestratorConfig
from ryzanstein_jax.errors import ProcessGroupError, counted
from ryzanstein_jax.orchestrator.dial import software
from ryzanstein_jax.orchestrator.events import EventKind, EventLog
from ryzanstein_jax.orchestrator.frames import Channel, ChannelClosedError, FrameError, Kind
from ryzanstein_jax.orchestrator.host import Arrived, HostAgent, LocalAgent, RemoteAgent
from ryzanstein_jax.orchestrator.listener import Listener
from ryzanstein_jax.orchestrator.ray_hosts import RayHosts
from ryzanstein_jax.orchestrator.secret import read_secret
from ryzanstein_jax.orchestrator.slots import visible_gpus, visible_slots

#: A machine may offer so many devices, and so many machines may be known.
MOST_DEVICES, MOST_HOSTS = 1024, 4096
_CHANNELS = ("control", "steps", "log")
_TICK = 0.2


class Hosts:
    """Knows who is here, and where each slot is.

    Attributes:
        num_local: devices of this machine; they are the first slots, and those of other replicas are not used.
        is_remote: whether other machines may take part.

    Args:
        options: where to listen, the secret, and what this machine contributes.
        width: devices that are asked for.
        events: told of machines that come and go.
        replica, num_replicas: which of how many replicas of this width on this machine: it has devices of its own.

    Raises:
        ConfigError: the secret can't be read, or the address not be listened at.
    """

    def __init__(
        self,
        options: OrchestratorConfig,
        width: int,
        events: EventLog | None = None,
        *,
        replica: int = 0,
        num_replicas: int = 1,
    ):
        self._options, self._events = options, events
        self.is_remote = options.listen is not None or options.cluster is not None
        local = options.local_devices
        if local is None:
            local = visible_gpus() if self.is_remote else visible_slots(width)
        self._first_local = 0
        if num_replicas > 1:
            self._first_local, local = replica * width, (replica + 1) * width
        self.num_local = local
        self._local: LocalAgent | None = None
        self._joined = threading.Condition()  # guards what follows
        self._agents: dict[str, RemoteAgent] = {}
        self._replaced: list[RemoteAgent] = []
        self._tickets: dict[str, Arrived] = {}
        self._places: list[tuple[str | None, int]] = [(None, slot) for slot in range(local)]  # by slot; None: here
        self._secret = b""
        self._is_closed = False
        self.listener: Listener | None = None
        self._ray: RayHosts | None = None
        try:
            if self.is_remote:
                path = options.secret_file
                self._secret = secrets.token_hex(32).encode() if path is None else read_secret(str(path))
                self.listener = Listener(options.listen or "0.0.0.0:0", self._secret, self._admit)
                if options.cluster == "ray":
                    self._ray = RayHosts(self.listener.address, self._secret, options.num_hosts, self.expel)
            if local:
                self._local = LocalAgent(local)
        except BaseException:
            self.close()
            raise

    # --- who is here

    def wait(self, least: int, deadline: float, is_closing: Callable[[], bool]) -> tuple[int, ...]:
        """The slots of the machines that are here, once there are `least`, the deadline has passed or all ends.

        To be called between groups: what agents said meanwhile is thrown away.
        """
        self._sweep()
        with self._joined:
            while len(slots := self._slots()) < least and not is_closing() and time.monotonic() < deadline:
                self._joined.wait(_TICK)
        return slots

    def wait_for_all(self, width: int, deadline: float, is_closing: Callable[[], bool]) -> None:
        """Waits for the first start's machines: as many as configured, and with so many devices.

        Raises:
            ProcessGroupError: they did not all come.
        """
        if not self.is_remote:
            return
        wanted = self._options.num_hosts
        with self._joined:
            while (len(self._agents) < wanted or len(self._slots()) < width) and not is_closing():
                if time.monotonic() > deadline:
                    raise ProcessGroupError(
                        f"{len(self._agents)} of num_hosts={wanted} agents have joined, with {len(self._slots())} of "
                        f"{width} devices ({', '.join(sorted(self._agents)) or 'none'}); "
                        "start `ryzanstein worker` on the other machines"
                    )
                self._joined.wait(_TICK)

    def here(self) -> tuple[int, ...]:
        """The slots of the machines that are here, as far as that is known."""
        with self._joined:
            return self._slots()

    def names(self) -> dict[str, int]:
        """Devices of each machine that is here, by its name."""
        with self._joined:
            local = {} if self._local is None else {self._local.name: self.num_local - self._first_local}
            return local | {name: agent.num_slots for name, agent in sorted(self._agents.items())}

    def locate(self, slot: int) -> tuple[HostAgent, int]:
        """Whose device a slot of those that are here is, and which of that machine.

        -1, which stands for all devices, is this machine's.
        """
        with self._joined:
            name, number = self._places[slot] if slot >= 0 else (None, slot)
            agent = self._local if name is None else self._agents[name]
            assert agent is not None
            return agent, number

    def _slots(self) -> tuple[int, ...]:
        """Numbers those that are new, machines by name; with the lock held."""
        for name, agent in sorted(self._agents.items()):
            known = sum(place[0] == name for place in self._places)
            self._places += [(name, number) for number in range(known, agent.num_slots)]
        here = {None: self.num_local} | {name: agent.num_slots for name, agent in self._agents.items()}
        return tuple(
            slot
            for slot, (name, number) in enumerate(self._places)
            if number < here.get(name, 0) and (name is not None or number >= self._first_local)
        )

    def _sweep(self) -> None:
        """Sorts out agents that are gone."""
        with self._joined:
            agents, replaced, self._replaced = list(self._agents.values()), self._replaced, []
        for agent in replaced:
            agent.lose()
        for agent in agents:
            agent.read()
            if not agent.is_up:
                self.drop(agent)

    def drop(self, agent: HostAgent) -> None:
        """Forgets a machine that is gone, until its agent dials again."""
        with self._joined:
            if not isinstance(agent, RemoteAgent) or self._agents.get(agent.name) is not agent:
                return
            del self._agents[agent.name]
        self._note(EventKind.HOST_LOST, f"the agent of {agent.name} is gone", host=agent.name)

    def expel(self, name: str) -> None:
        """A machine is known to be gone: its connection need not tell. From any thread."""
        with self._joined:
            agent = self._agents.get(name)
        if agent is not None:
            agent.channel.hang_up()

    def prepare(self) -> LocalAgent | None:
        """Starts this machine's agent anew where it died, and returns while it imports; None where it takes no part."""
        if self._local is not None and (self._local.process.poll() is not None or not self._local.is_up):
            self._local.close()
            self._local = LocalAgent(self.num_local)
        return self._local

    # --- who comes, in the listener's threads

    def _admit(self, channel: Channel, hello: dict[str, Any], peer: str) -> None:
        role = hello.get("role")
        if role == "agent":
            self._admit_agent(channel, hello, peer)
        elif role == "rank":
            self._admit_rank(channel, hello)
        else:
            raise FrameError("neither an agent nor a rank")

    def _admit_agent(self, channel: Channel, hello: dict[str, Any], peer: str) -> None:
        name, devices = hello.get("name"), hello.get("devices")
        if not (isinstance(name, str) and 0 < len(name) <= 255 and name.isprintable()):
            raise FrameError("an agent without a name")
        if type(devices) is not int or not 1 <= devices <= MOST_DEVICES:
            raise FrameError("an agent without devices")
        if hello.get("software") != software():
            raise self._refusal(channel, f"it runs {str(hello.get('software'))[:200]}, the leader {software()}", True)
        agent = RemoteAgent(name, devices, channel, peer, channel.address(), self._tickets)
        with self._joined:
            if self._is_closed:
                raise ChannelClosedError("the leader is closing")
            earlier = self._agents.get(name)
            if earlier is not None and not earlier.looks_gone():
                # Perhaps it is the same one, and the end of its last connection is still on its way.
                raise self._refusal(channel, f"an agent named {name} is here already; see --name", False)
            if len(self._agents) >= MOST_HOSTS:
                raise self._refusal(channel, f"there are {MOST_HOSTS} agents already", True)
            channel.send_json(Kind.HELLO, {})
            if earlier is not None:
                self._replaced.append(earlier)
            self._agents[name] = agent
            self._joined.notify_all()
        self._note(
            EventKind.HOST_JOINED, f"{name} offers {counted(devices, 'device')}", host=name, devices=devices, peer=peer
        )

    def _refusal(self, channel: Channel, message: str, is_final: bool) -> FrameError:
        channel.send_json(Kind.ERROR, {"message": message, "is_final": is_final})
        return FrameError(message)

    def _admit_rank(self, channel: Channel, hello: dict[str, Any]) -> None:
        name = hello.get("channel")
        arrived = self._tickets.get(str(hello.get("ticket")))
        if arrived is None or name not in _CHANNELS:
            raise self._refusal(channel, "nobody waits for this rank", True)
        if name == "log":  # from here on it carries no frames
            channel.send_json(Kind.HELLO, {})
            arrived(name, channel)
        else:  # it has to be in place before the rank makes use of it
            arrived(name, channel)
            channel.send_json(Kind.HELLO, {})

    # --- the end

    def _note(self, kind: EventKind, message: str, **extra: Any) -> None:
        if self._events is not None:
            self._events.record(kind, message, **extra)

    def close(self) -> None:
        """Tells all agents that this is the end. May be called again."""
        if self._ray is not None:
            self._ray.stop_placing()
        if self.listener is not None:
            self.listener.close()
        with self._joined:
            self._is_closed = True
            agents = [*self._agents.values(), *self._replaced]
            self._agents, self._replaced = {}, []
        for agent in agents:
            agent.close()
        if self._local is not None:
            self._local.close()
            self._local = None
        if self._ray is not None:
            self._ray.close()
            self._ray = None
