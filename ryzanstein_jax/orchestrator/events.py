"""What happened to the ranks, as structured events: a bounded history, and one JSON line each through `logging`."""

from __future__ import annotations

import json
import logging
import math
import threading
import time
from collections import deque
from dataclasses import dataclass, field
from datetime import UTC, datetime
from enum import StrEnum

from ryzanstein_jax.errors import ConfigError

logger = logging.getLogger("ryzanstein_jax.orchestrator")

MAX_MESSAGE = 4096  # characters; what a rank wrote may be quoted, and is as long as the rank likes
MAX_EXTRA = 32  # fields


class EventKind(StrEnum):
    """What happened."""

    STARTED = "started"  # a group of ranks was started
    READY = "ready"  # it serves
    FAULT = "fault"  # a rank died, hung or reported an error
    KILLED = "killed"  # the leader killed a group
    RESPAWNED = "respawned"  # a new group takes its place
    REPLAYED = "replayed"  # unfinished requests were added again
    RECOVERED = "recovered"  # they go on
    MOVED = "moved"  # unfinished requests go on on other replicas
    DEGRADED = "degraded"  # with fewer devices than configured
    RESTORED = "restored"  # with all devices again
    EXHAUSTED = "exhausted"  # no restart is left
    POISON = "poison"  # a request that kills ranks was given up
    DRAINING = "draining"  # no new requests
    CLOSED = "closed"
    PROBE_FAILED = "probe_failed"  # a device or the serving path did not answer
    TELEMETRY = "telemetry"  # a finding about a GPU
    STANDBY = "standby"  # a second group, to take the place of the one that serves, is prepared or was lost
    HOST_JOINED = "host_joined"  # another machine offers its devices
    HOST_LOST = "host_lost"  # it is gone, and its ranks with it


SEVERITIES = {"info": logging.INFO, "warning": logging.WARNING, "error": logging.ERROR}

_DEFAULT_SEVERITY = {
    EventKind.FAULT: "error",
    EventKind.EXHAUSTED: "error",
    EventKind.POISON: "error",
    EventKind.KILLED: "warning",
    EventKind.DEGRADED: "warning",
    EventKind.PROBE_FAILED: "warning",
    EventKind.TELEMETRY: "warning",
    EventKind.HOST_LOST: "warning",
}


@dataclass(frozen=True)
class Event:
    """One thing that happened.

    Attributes:
        time: wall clock, ISO 8601 in UTC with milliseconds.
        monotonic: seconds of `time.monotonic`, for differences: the wall clock may jump.
        kind: what happened.
        severity: "info", "warning" or "error".
        generation: of the group of ranks, counted from 1; 0 before there is one.
        rank: which of them, or None if it concerns all.
        message: a sentence for people.
        extra: further fields, plain JSON values.
    """

    time: str
    monotonic: float
    kind: EventKind
    severity: str
    generation: int
    rank: int | None
    message: str
    extra: dict[str, object] = field(default_factory=dict)

    def to_json(self) -> str:
        """One line of JSON, extra fields beside the others."""
        own = {
            "time": self.time,
            "monotonic": round(self.monotonic, 6),
            "kind": self.kind.value,
            "severity": self.severity,
            "generation": self.generation,
            "rank": self.rank,
            "message": self.message,
        }
        return json.dumps(self.extra | own, default=str, allow_nan=False)


class EventLog:
    """The last events, in order; each is also logged by "ryzanstein_jax.orchestrator" as a line of JSON.

    Thread-safe.

    Args:
        limit: how many events are kept.
        replica: whose events these are, which each of them tells; None where there is one replica only.

    Raises:
        ConfigError: the limit is below 1.
    """

    def __init__(self, limit: int = 1000, replica: int | None = None):
        if limit < 1:
            raise ConfigError("limit", limit, "keep at least 1 event")
        self._common: dict[str, object] = {} if replica is None else {"replica": replica}
        self._lock = threading.Lock()
        self._events: deque[Event] = deque(maxlen=limit)

    def record(
        self,
        kind: EventKind,
        message: str,
        *,
        severity: str | None = None,
        generation: int = 0,
        rank: int | None = None,
        **extra: object,
    ) -> Event:
        """Adds an event and logs it.

        Args:
            kind: what happened.
            message: a sentence for people, cut to `MAX_MESSAGE` characters.
            severity: "info", "warning" or "error"; None takes the usual one of the kind.
            generation: of the group of ranks.
            rank: which of them, or None if it concerns all.
            extra: further fields; what JSON can't hold is kept as text.

        Raises:
            ConfigError: the kind or severity is unknown, there are too many extra fields, or one is named like
                a field of `Event`.
        """
        try:
            kind = EventKind(kind)
        except ValueError as error:
            raise ConfigError("kind", kind, f"use one of {', '.join(EventKind)}") from error
        severity = severity or _DEFAULT_SEVERITY.get(kind, "info")
        if severity not in SEVERITIES:
            raise ConfigError("severity", severity, f"use one of {', '.join(SEVERITIES)}")
        if len(extra) > MAX_EXTRA or {"time", "monotonic"} & extra.keys():
            raise ConfigError("extra", sorted(extra), f"give at most {MAX_EXTRA} fields, none named like one of Event")
        plain = self._common | {name: _plain(value) for name, value in extra.items()}
        # Times are taken under the lock, so that the history is in their order.
        with self._lock:
            now = datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
            event = Event(now, time.monotonic(), kind, severity, generation, rank, _cut(str(message)), plain)
            self._events.append(event)
        # Outside of it: a handler may be slow, and may even ask for the history.
        logger.log(SEVERITIES[severity], "%s", event.to_json())
        return event

    def list(self, *, kind: EventKind | None = None, last: int | None = None) -> tuple[Event, ...]:
        """The events that are kept, oldest first; of one kind, or the last few, if asked for."""
        with self._lock:
            events = tuple(self._events)
        if kind is not None:
            events = tuple(event for event in events if event.kind == kind)
        return events if last is None else events[max(0, len(events) - last) :]


def _cut(text: str) -> str:
    return text if len(text) <= MAX_MESSAGE else text[: MAX_MESSAGE - 3] + "..."


def _plain(value: object) -> object:
    """A JSON value of bounded size: numbers, flags and short texts and lists of them stay, the rest becomes text."""
    if value is None or isinstance(value, bool | int):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    if isinstance(value, list | tuple) and len(value) <= 64:
        return [item if isinstance(item, bool | int) or item is None else _plain_text(item) for item in value]
    return _plain_text(value)


def _plain_text(value: object) -> object:
    if isinstance(value, float) and math.isfinite(value):
        return value
    return _cut(str(value))
