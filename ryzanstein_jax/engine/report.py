"""What starting an executor cost, and what its devices use. No JAX here: another process may have found out."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from ryzanstein_jax.budget import MemoryPlan


@dataclass(frozen=True)
class RankUsage:
    """What one rank uses; without processes, what one device does.

    Attributes:
        rank: its number.
        memory_bytes: in use on its device; of CPU devices, the resident memory of their process. None where the device
            does not tell.
        collective_bytes: results of collectives that it received, since it began.
    """

    rank: int
    memory_bytes: int | None
    collective_bytes: int


@dataclass(frozen=True)
class SetupReport:
    """What starting cost and how memory was divided.

    Attributes:
        device: platform and kind of the devices.
        dtype: of weights, activations and cache.
        memory: the sum for one device.
        load: what loading the weights cost, as the fields of `checkpoint.assemble.LoadReport`; empty for dummy weights.
        load_seconds, compile_seconds: wall time; the two overlap.
        num_programs: how many programs were compiled or found in the cache.
        num_loaded: how many of them, and of the few that only starting needs, were found as executables.
    """

    device: str
    dtype: str
    memory: MemoryPlan
    load: dict[str, float]
    load_seconds: float
    compile_seconds: float
    num_programs: int
    num_loaded: int

    def __str__(self) -> str:
        return (
            f"{self.device}, {self.dtype}; weights in {self.load_seconds:.1f} s, "
            f"{self.num_programs} programs in {self.compile_seconds:.1f} s\n{self.memory}"
        )

    def to_json(self) -> dict[str, Any]:
        """Plain values, for `from_json`."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> SetupReport:
        """Raises TypeError or KeyError where the value is no report."""
        return cls(**{**value, "memory": MemoryPlan(**value["memory"])})
