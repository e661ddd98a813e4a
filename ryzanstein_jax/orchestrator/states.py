"""The state machine of the orchestrator: which states there are, and what may follow what."""

from __future__ import annotations

from enum import StrEnum

from ryzanstein_jax.errors import RyzansteinError


class State(StrEnum):
    """Where the orchestrator stands."""

    CREATED = "created"
    STARTING = "starting"  # ranks join and load
    READY = "ready"  # all devices that were asked for serve
    RECOVERING = "recovering"  # after a fault: a new group starts
    DEGRADED = "degraded"  # serves, on fewer devices or with smaller steps or cache
    DRAINING = "draining"  # ends
    FAILED = "failed"  # gave up; nothing runs
    CLOSED = "closed"


_NEXT: dict[State, set[State]] = {
    State.CREATED: {State.STARTING, State.DRAINING},
    State.STARTING: {State.READY, State.DEGRADED, State.RECOVERING, State.FAILED, State.DRAINING},
    State.READY: {State.RECOVERING, State.FAILED, State.DRAINING},
    State.RECOVERING: {State.READY, State.DEGRADED, State.RECOVERING, State.FAILED, State.DRAINING},
    State.DEGRADED: {State.RECOVERING, State.FAILED, State.DRAINING},
    State.DRAINING: {State.CLOSED},
    State.FAILED: {State.DRAINING},
    State.CLOSED: set(),
}

#: States in which steps run.
SERVING = frozenset({State.READY, State.DEGRADED})
#: States after which steps never run again.
ENDED = frozenset({State.DRAINING, State.FAILED, State.CLOSED})


def check_transition(before: State, after: State) -> None:
    """Raises RyzansteinError where `after` can't follow `before`: a mistake in this package, not of a user."""
    if after not in _NEXT[before]:
        raise RyzansteinError(f"the orchestrator can't go from {before} to {after}")
