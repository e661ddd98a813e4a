"""Agents on the nodes of a Ray cluster: Ray starts them, says where, and tells when a node has died.

Nothing of a step goes through Ray: an agent dials the leader as any other does, and its ranks do too. An agent that
ends, or whose node dies, is started again, on a node that has none.
"""

from __future__ import annotations

import importlib
import logging
import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ryzanstein_jax.config import parse_address
from ryzanstein_jax.errors import ConfigError
from ryzanstein_jax.orchestrator.worker_command import WorkerCommand

logger = logging.getLogger("ryzanstein_jax.orchestrator")

_LOOK_SECONDS = 0.5
#: A node whose agent ended waits so long for the next one.
_PAUSE_SECONDS = 2.0
_END_SECONDS = 5.0


class NodeAgent:
    """The actor on a node. The agent is its child and ends with it; the actor ends with its node."""

    def run(self, leader: str, secret: bytes, name: str, devices: int) -> int:
        """Starts the agent and waits for its end; its exit status."""
        return WorkerCommand(leader, secret, name, devices, parent=os.getpid()).start().wait()


@dataclass
class _Placed:
    node: str
    name: str
    actor: Any
    ended: Any


class RayHosts:
    """Keeps an agent on so many nodes.

    Args:
        address: "host:port" that the leader listens at; of a wildcard, the address of this node is told.
        secret: that the agents shall know.
        num_hosts: nodes to use, those with GPUs first.
        expel: told the name of an agent that is known to be gone.

    Raises:
        ConfigError: Ray is not installed, or there is no cluster.
    """

    def __init__(self, address: str, secret: bytes, num_hosts: int, expel: Callable[[str], None]):
        try:
            self._ray: Any = importlib.import_module("ray")
            self._strategies: Any = importlib.import_module("ray.util.scheduling_strategies")
        except ImportError as error:
            raise ConfigError("cluster", "ray", f"install the extra `ray` ({error})") from error
        self._secret, self._num_hosts, self._expel = secret, num_hosts, expel
        self._is_ours = not self._ray.is_initialized()
        if self._is_ours:
            try:
                self._ray.init(address="auto", log_to_driver=False)
            except ConnectionError as error:
                raise ConfigError(
                    "cluster", "ray", f"start a Ray cluster, or call ray.init before ({error})"
                ) from error
        host, port = parse_address("listen", address)
        if host in ("0.0.0.0", "::"):
            host = str(self._ray.util.get_node_ip_address())
        self._leader = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        self._placed: dict[str, _Placed] = {}
        self._not_before: dict[str, float] = {}
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="ray-hosts", daemon=True)
        self._thread.start()

    def _watch(self) -> None:
        while not self._stopping.is_set():
            try:
                alive = {node["NodeID"]: node for node in self._ray.nodes() if node["Alive"]}
                self._look(alive)
                self._place(alive)
            except Exception as error:  # noqa: BLE001 - Ray may be away for a while; agents go on without it
                logger.warning("Ray does not answer: %r", error)
            self._stopping.wait(_LOOK_SECONDS)

    def _look(self, alive: dict[str, dict[str, Any]]) -> None:
        """Takes note of agents that ended, by themselves or with their nodes."""
        waiting = [placed.ended for placed in self._placed.values()]
        ended, _ = self._ray.wait(waiting, num_returns=len(waiting), timeout=0) if waiting else ([], [])
        for placed in list(self._placed.values()):
            if placed.ended in ended or placed.node not in alive:
                del self._placed[placed.node]
                self._not_before[placed.node] = time.monotonic() + _PAUSE_SECONDS
                self._ray.kill(placed.actor)
                self._expel(placed.name)

    def _place(self, alive: dict[str, dict[str, Any]]) -> None:
        def gpus(node: str) -> int:
            return int(alive[node]["Resources"].get("GPU", 0))

        now = time.monotonic()
        free = [node for node in alive if node not in self._placed and now >= self._not_before.get(node, 0.0)]
        for node in sorted(free, key=lambda node: (-gpus(node), node))[: max(0, self._num_hosts - len(self._placed))]:
            name = f"{alive[node]['NodeManagerHostname']}-{node[:8]}"
            strategy = self._strategies.NodeAffinitySchedulingStrategy(node, soft=False)
            actor_class = self._ray.remote(NodeAgent).options(
                num_cpus=0, num_gpus=gpus(node), scheduling_strategy=strategy, max_restarts=0
            )
            actor = actor_class.remote()
            ended = actor.run.remote(self._leader, self._secret, name, max(1, gpus(node)))
            self._placed[node] = _Placed(node, name, actor, ended)

    def stop_placing(self) -> None:
        """Starts no more agents. May be called again."""
        self._stopping.set()
        self._thread.join()

    def close(self) -> None:
        """Ends the actors, once their agents have ended by themselves, and what is left of those that have not."""
        self.stop_placing()
        waiting = [placed.ended for placed in self._placed.values()]
        if waiting:
            self._ray.wait(waiting, num_returns=len(waiting), timeout=_END_SECONDS)
        for placed in self._placed.values():
            self._ray.kill(placed.actor)
        self._placed.clear()
        if self._is_ours:
            self._ray.shutdown()
