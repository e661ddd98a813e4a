"""What a rank tells of itself in each heartbeat, and what it was told to be."""

from __future__ import annotations

import struct
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any

from ryzanstein_jax.orchestrator.frames import FrameError

#: Holds the faults to make on purpose; see `faults`.
FAULT_VARIABLE = "RYZANSTEIN_FAULT"

_HEARTBEAT = struct.Struct("<BBqqqqq")
#: No number of a rank's description comes near it.
_MOST = 1 << 32


class Phase(IntEnum):
    """What a rank is doing."""

    JOINING = 0
    WAITING = 1
    LOADING = 2
    SERVING = 3
    PREPARED = 4  # a standby: its programs are there, weights and cache are not


@dataclass(slots=True)
class Heartbeat:
    """Counts since the rank began: steps received, handed to the device, and done by it; and what it uses.

    Attributes:
        memory: bytes in use on its device; 0 where that is not known.
        communicated: bytes that collectives brought it.
        has_loaded: whether it has all programs, those too that wait for a calm moment.
    """

    phase: Phase = Phase.JOINING
    received: int = 0
    dispatched: int = 0
    done: int = 0
    memory: int = 0
    communicated: int = 0
    has_loaded: bool = False

    def to_bytes(self) -> bytes:
        counts = (self.received, self.dispatched, self.done, self.memory, self.communicated)
        return _HEARTBEAT.pack(self.phase, self.has_loaded, *counts)

    @classmethod
    def from_bytes(cls, data: bytes) -> Heartbeat:
        """Raises FrameError where the bytes are no heartbeat."""
        try:
            phase, has_loaded, received, dispatched, done, memory, communicated = _HEARTBEAT.unpack(data)
            if min(received, dispatched, done, memory, communicated) < 0 or has_loaded > 1:
                raise ValueError("a count below 0, or a flag above 1")
            return cls(Phase(phase), received, dispatched, done, memory, communicated, bool(has_loaded))
        except (struct.error, ValueError) as error:
            raise FrameError(f"not a heartbeat: {data[:40]!r}") from error


@dataclass(frozen=True)
class RankSpec:
    """What an agent needs to know to make a rank.

    Attributes:
        rank, num_processes: its number in the group, and how many there are.
        generation: how often the group was started before.
        slot: the device of its machine that it takes; -1 takes all.
        local_index, local_count: which of how many ranks of its machine it is.
        width: devices of the mesh.
        address, hosted: the coordination service; see `runtime.Coordinator`.
        heartbeat_interval_sec: how often it tells that it lives.
        environment: variables to set before anything of JAX starts.
        fault: a fault to make on purpose; see `faults`.
        ticket: what a rank of another machine shows when it dials the leader; "" for one that inherits its sockets.
    """

    rank: int
    num_processes: int
    generation: int
    slot: int
    local_index: int
    local_count: int
    width: int
    address: str
    hosted: bool
    heartbeat_interval_sec: float
    environment: dict[str, str] = field(default_factory=dict)
    fault: str = ""
    ticket: str = field(default="", repr=False)

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> RankSpec:
        """Raises FrameError where a field is missing, unknown or of another type."""
        try:
            spec = cls(**value)
        except TypeError as error:
            raise FrameError(f"not a rank's description: {str(error)[:200]}") from error
        numbers = (spec.rank, spec.generation, spec.local_index, spec.num_processes, spec.local_count, spec.width)
        interval, environment = spec.heartbeat_interval_sec, spec.environment
        if not (
            all(type(number) is int and 0 <= number < _MOST for number in numbers)
            and type(spec.slot) is int
            and -1 <= spec.slot < _MOST
            and spec.rank < spec.num_processes
            and spec.local_index < spec.local_count
            and spec.width > 0
            and type(spec.hosted) is bool
            and type(interval) in (int, float)
            and 0 < interval < _MOST
            and isinstance(spec.address, str)
            and isinstance(spec.fault, str)
            and isinstance(spec.ticket, str)
            and isinstance(environment, dict)
            and all(_is_variable(name, text) for name, text in environment.items())
        ):
            raise FrameError(f"not a rank's description: {str(value)[:200]}")
        return spec


def _is_variable(name: object, text: object) -> bool:
    """Whether an environment takes it."""
    if not (isinstance(name, str) and isinstance(text, str) and name) or "=" in name or "\0" in name + text:
        return False
    return not any("\ud800" <= letter <= "\udfff" for letter in name + text)  # half a character
