"""What can go wrong with a group of ranks."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from enum import StrEnum


class FaultKind(StrEnum):
    """Kinds of failure; each has a policy in `recovery`."""

    PROCESS_DEATH = "process_death"
    HANG = "hang"
    OUT_OF_MEMORY = "out_of_memory"
    DEVICE = "device"
    COLLECTIVE = "collective"
    EXCEPTION = "exception"
    START = "start"
    REFUSED = "refused"


@dataclass(frozen=True)
class Fault:
    """One failure.

    Attributes:
        kind: what kind.
        message: what was seen, for people.
        ranks: whose fault it is, as far as that is known.
        serving: whether the group had a model loaded and was running steps.
        seen: monotonic seconds at which the leader noticed.
        error_type: name of the exception that a rank raised; "" where it raised none.
        log: last lines that the first of `ranks` wrote.
        is_effect: it may well follow from another fault, of a rank that is not named here: a collective fails on the
            ranks that live, and often they tell before the death of the one that did not is seen.
        is_external: what ran can't be the reason: somebody killed or stopped a process, a machine or a device went.
    """

    kind: FaultKind
    message: str
    ranks: tuple[int, ...] = ()
    serving: bool = False
    seen: float = field(default_factory=time.monotonic)
    error_type: str = ""
    log: tuple[str, ...] = ()
    is_effect: bool = False
    is_external: bool = False

    def __str__(self) -> str:
        who = f"rank {', '.join(map(str, self.ranks))}: " if self.ranks else ""
        tail = "\n  last lines of its log:\n    " + "\n    ".join(self.log) if self.log else ""
        return f"{self.kind}: {who}{self.message}{tail}"


class GroupFault(Exception):
    """Unwinds what the leader was doing with a group that has failed."""

    def __init__(self, fault: Fault):
        super().__init__(str(fault))
        self.fault = fault
