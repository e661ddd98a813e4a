"""`ProcessGroupManager`: places ranks on the devices of all machines and has their agents start them."""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Callable, Sequence

from ryzanstein_jax.config import OrchestratorConfig
from ryzanstein_jax.orchestrator.coordinator import Coordinator
from ryzanstein_jax.orchestrator.events import EventLog
from ryzanstein_jax.orchestrator.host import HostAgent, RemoteAgent, new_ticket
from ryzanstein_jax.orchestrator.hosts import Hosts
from ryzanstein_jax.orchestrator.logs import RunLogs
from ryzanstein_jax.orchestrator.process_group import ProcessGroup
from ryzanstein_jax.orchestrator.status import FAULT_VARIABLE, RankSpec

_AGENT_START_SECONDS = 120.0


class ProcessGroupManager:
    """Makes groups of ranks on the machines that are here.

    Args:
        config: times and limits, and which machines.
        logs: where ranks' output goes.
        width: devices that are asked for.
        events: told of machines that come and go.
        replica, num_replicas: of groups of this width that share this machine, each with devices of its own.

    Raises:
        ConfigError: the leader's address or secret is no good.
    """

    def __init__(
        self,
        config: OrchestratorConfig,
        logs: RunLogs,
        width: int = 1,
        events: EventLog | None = None,
        *,
        replica: int = 0,
        num_replicas: int = 1,
    ):
        self._config, self._logs, self._width = config, logs, width
        self._replica, self._num_replicas = replica, num_replicas
        self.hosts = Hosts(config, width, events, replica=replica, num_replicas=num_replicas)
        self._has_started = False

    def slots(self, is_closing: Callable[[], bool]) -> tuple[int, ...]:
        """The devices of all machines that are here. To be called between groups.

        The first time it waits for `num_hosts` machines and for all devices that are asked for; later for no more than
        `min_tensor_parallel_size` devices. It waits for `timeout_sec` at most.

        Raises:
            ProcessGroupError: not all machines came the first time.
        """
        deadline = time.monotonic() + self._config.timeout_sec
        if not self._has_started:
            self.hosts.wait_for_all(self._width, deadline, is_closing)
            self._has_started = True
        return self.hosts.wait(self._config.min_tensor_parallel_size, deadline, is_closing)

    def launch(
        self, slots: Sequence[int], *, generation: int, width: int, environment: dict[str, str] | None = None
    ) -> ProcessGroup:
        """Starts one rank on each slot (-1: one rank on all devices of this machine), and returns while they join.

        Raises:
            ProcessGroupError: an agent can't be started.
            GroupFault: one went away.
        """
        here = self.hosts.prepare()
        places = [self.hosts.locate(slot) for slot in slots]
        if here is not None and any(agent is here for agent, _ in places):
            here.wait(time.monotonic() + min(_AGENT_START_SECONDS, self._config.timeout_sec))
        count, by_host = len(slots), Counter(agent.name for agent, _ in places)
        coordinator = self._coordinator([agent for agent, _ in places]) if count > 1 else None
        group = ProcessGroup(generation, coordinator)
        indices: Counter[str] = Counter()
        try:
            for rank, (slot, (agent, number)) in enumerate(zip(slots, places, strict=True)):
                spec = RankSpec(
                    rank=rank,
                    num_processes=count,
                    generation=generation,
                    slot=number,
                    local_index=self._replica * self._width + indices[agent.name],
                    local_count=self._num_replicas * self._width if self._num_replicas > 1 else by_host[agent.name],
                    width=width,
                    address=coordinator.address if coordinator else "",
                    hosted=coordinator.hosted if coordinator else False,
                    heartbeat_interval_sec=self._config.heartbeat_interval_sec,
                    environment=self._config.communication_environment() | (environment or {}),
                    fault=os.environ.get(FAULT_VARIABLE, ""),
                    ticket="" if agent.is_local else new_ticket(),
                )
                indices[agent.name] += 1
                group.add(spec, slot, agent, self._logs.open(rank, generation))
        except BaseException:
            group.kill()
            raise
        return group

    @staticmethod
    def _coordinator(agents: list[HostAgent]) -> Coordinator:
        """At the address at which the first other machine reaches the leader; else no other one gets to see it."""
        remote = [agent for agent in agents if isinstance(agent, RemoteAgent)]
        coordinator = Coordinator(len(agents), remote[0].local_address if remote else "127.0.0.1")
        if not coordinator.hosted and isinstance(agents[0], RemoteAgent):
            coordinator.move_to(agents[0].peer)  # rank 0 hosts it
        return coordinator

    def close(self) -> None:
        """Ends the agents; all groups are gone by then, or go with them."""
        self.hosts.close()
