"""What starting an executor cost, what its devices use, and where its scheduler stands. No JAX here."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ryzanstein_jax.budget import MemoryPlan
from ryzanstein_jax.errors import counted


@dataclass(frozen=True, slots=True)
class SchedulerStats:
    """Where things stand, and counts since the start.

    Attributes:
        num_running, num_waiting: sequences.
        num_pages, num_pages_used, num_pages_idle: pages of the cache in all, owned, and kept for their content only.
        num_steps: steps scheduled.
        num_preemptions: times a sequence lost its pages to another one.
        num_prefix_queries, num_prefix_hits: tokens looked for in the prefix cache, and found there.
    """

    num_running: int
    num_waiting: int
    num_pages: int
    num_pages_used: int
    num_pages_idle: int
    num_steps: int
    num_preemptions: int
    num_prefix_queries: int
    num_prefix_hits: int

    @classmethod
    def total(cls, several: Sequence[SchedulerStats]) -> SchedulerStats:
        """Of several schedulers together."""
        names = [field.name for field in dataclasses.fields(cls)]
        return cls(*(sum(getattr(stats, name) for stats in several) for name in names))


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
        dtype: of activations, and of weights that are not quantized.
        memory: the sum for one device.
        load: what loading the weights cost, as the fields of `checkpoint.assemble.LoadReport`; empty for dummy weights.
        load_seconds, compile_seconds: wall time; the two overlap.
        num_programs: how many programs were compiled or found in the cache.
        num_loaded: how many of them, and of the few that only starting needs, were found as executables.
        kv_cache_dtype: of `config.KV_CACHE_DTYPES`; "auto" is `dtype`.
    """

    device: str
    dtype: str
    memory: MemoryPlan
    load: dict[str, float]
    load_seconds: float
    compile_seconds: float
    num_programs: int
    num_loaded: int
    kv_cache_dtype: str = "auto"

    def __str__(self) -> str:
        cache = "" if self.kv_cache_dtype == "auto" else f", KV cache in {self.kv_cache_dtype}"
        return (
            f"{self.device}, {self.dtype}{cache}; weights in {self.load_seconds:.1f} s, "
            f"{counted(self.num_programs, 'program')} in {self.compile_seconds:.1f} s\n{self.memory}"
        )

    def to_json(self) -> dict[str, Any]:
        """Plain values, for `from_json`."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> SetupReport:
        """Raises TypeError or KeyError where the value is no report."""
        return cls(**{**value, "memory": MemoryPlan(**value["memory"])})
