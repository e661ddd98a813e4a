"""What devices say to each other. No JAX here: another process may have found out."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Collective:
    """A kind of communication in a compiled program.

    Attributes:
        kind: "all-reduce", "all-gather", "reduce-scatter", "all-to-all" or "collective-permute".
        bytes: of one result on one device.
        group: devices that take part together.
        count: how many of these a run of the program performs.
    """

    kind: str
    bytes: int
    group: int
    count: int
