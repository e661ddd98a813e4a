"""`Fleet`: the orchestrators of several replicas, looked at as one. No JAX here."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ryzanstein_jax.orchestrator.orchestrator import MultiGPUOrchestrator
from ryzanstein_jax.orchestrator.states import SERVING, State
from ryzanstein_jax.replicas import Replica


class Fleet:
    """What people and the server ask of an orchestrator.

    Args:
        replicas: those that there are; each has an orchestrator.
    """

    def __init__(self, replicas: Sequence[Replica]):
        self._replicas = replicas

    def _orchestrators(self) -> list[MultiGPUOrchestrator]:
        found = [replica.orchestrator for replica in self._replicas]
        return [one for one in found if one is not None]

    @property
    def state(self) -> State:
        """Of all: "degraded" while some serve and others don't, or as the one that is furthest where none serves."""
        states = [State.FAILED if one.has_failed else self._state(one) for one in self._replicas]
        if any(state in SERVING for state in states):
            return State.READY if set(states) == {State.READY} else State.DEGRADED
        return next((state for state in (State.RECOVERING, State.STARTING) if state in states), State.FAILED)

    @staticmethod
    def _state(replica: Replica) -> State:
        assert replica.orchestrator is not None
        return replica.orchestrator.state

    @property
    def is_watched(self) -> bool:
        """Whether a replica is left whose faults would be answered."""
        return any(one.is_watched for one in self._orchestrators())

    @property
    def width(self) -> int:
        """Devices that serve."""
        return sum(one.width for one in self._orchestrators() if one.is_serving)

    def status(self) -> dict[str, Any]:
        """As `MultiGPUOrchestrator.status` has it: sums, the ranks and events of all, and each replica by itself."""
        each = [{"replica": number, **one.status()} for number, one in enumerate(self._orchestrators())]
        numbered = [(status["replica"], status) for status in each]
        events = [event for status in each for event in status.pop("events")]
        ranks = [{**rank, "replica": number} for number, status in numbered for rank in status["health"]["ranks"]]
        excluded = {slot: reason for status in each for slot, reason in status["excluded"].items()}
        failures = [f"replica {number}: {status['failure']}" for number, status in numbered if status["failure"]]
        sums = ("configured_width", "generation", "faults", "restarts")
        return {
            "state": self.state.value,
            "width": self.width,
            **{name: sum(status[name] for status in each) for name in sums},
            "excluded": excluded,
            "failure": "; ".join(failures) or None,
            "health": {"ranks": ranks},
            "replicas": each,
            "events": sorted(events, key=lambda event: event["time"])[-100:],
        }
