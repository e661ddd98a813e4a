"""Faults made on purpose, for tests and drills: what can't be done to a rank from outside.

`RYZANSTEIN_FAULT` in the leader's environment holds them: `kind:rank:generation:step`, several with commas between.
Kinds are `exception` and `oom` (in that step), `stuck` (the rank stops taking steps, while its heartbeat goes on),
`probe` (the device fails its probe), `start` (an exception while it loads), `poison` (an exception in each step that
takes a token, whose id stands in the step's place, three times in a row), `lazy` (it loads no program before a step
wants it). A generation of -1 means every one.
Real deaths need none of this: kill the process.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ryzanstein_jax.errors import ConfigError, RyzansteinError
from ryzanstein_jax.orchestrator.status import FAULT_VARIABLE

KINDS = ("exception", "oom", "stuck", "probe", "start", "poison", "lazy")


class InjectedFault(RyzansteinError):
    """A fault that was asked for."""


@dataclass(frozen=True)
class FaultPlan:
    """The faults of one rank in one generation: (kind, step) each."""

    faults: tuple[tuple[str, int], ...] = ()

    @classmethod
    def parse(cls, text: str, rank: int, generation: int) -> FaultPlan:
        """The faults of `text` that are meant for this rank and generation.

        Raises:
            ConfigError: the text is no such list.
        """
        found = []
        for entry in filter(None, text.split(",")):
            try:
                kind, *numbers = entry.split(":")
                its_rank, its_generation, step = map(int, numbers)
                if kind not in KINDS:
                    raise ValueError(kind)
            except ValueError as error:
                remedy = f"write kind:rank:generation:step, with one of {', '.join(KINDS)}"
                raise ConfigError(FAULT_VARIABLE, text, remedy) from error
            if its_rank == rank and its_generation in (generation, -1):
                found.append((kind, step))
        return cls(tuple(found))

    def has(self, kind: str) -> bool:
        return any(found == kind for found, _ in self.faults)

    def strike(self, step: int, token_ids: Sequence[int] | np.ndarray = ()) -> None:
        """Does what is planned for a step, which takes these tokens."""
        for kind, when in self.faults:
            if kind == "poison" and any(list(token_ids[i : i + 3]) == 3 * [when] for i in range(len(token_ids))):
                raise InjectedFault(f"an exception for token {when}, as asked for")
            if when != step:
                continue
            if kind == "exception":
                raise InjectedFault(f"an exception in step {step}, as asked for")
            if kind == "stuck":
                time.sleep(1e6)
            if kind == "oom":
                import jax.numpy as jnp

                # More than any device has: the runtime's own error, not one that looks like it.
                jnp.zeros((1 << 44,), jnp.float32).block_until_ready()
