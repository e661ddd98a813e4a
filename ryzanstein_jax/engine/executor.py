"""The seam between the scheduler and the devices. No JAX here."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from ryzanstein_jax.plan import StepPlan, StepResult


@dataclass(frozen=True)
class ExecutorLimits:
    """What fits one step of an executor, and its cache.

    Attributes:
        num_pages: pages of KV cache; page 0 is scratch that padding writes to, never owned by a sequence.
        page_size: tokens per page.
        max_model_len: longest sequence, in tokens.
        max_num_seqs: most decode tokens (sequences with one token) in a step.
        max_prefill_tokens: most prompt tokens in a step.
        max_prefills: most prompt chunks in a step.
        max_rows: most rows in a step that has a prompt chunk; without one it is max_num_seqs.
        vocab_size: of the model, without padding.
    """

    num_pages: int
    page_size: int
    max_model_len: int
    max_num_seqs: int
    max_prefill_tokens: int
    max_prefills: int
    max_rows: int
    vocab_size: int

    @property
    def max_pages_per_seq(self) -> int:
        return -(-self.max_model_len // self.page_size)


class Executor(Protocol):
    """Runs steps in order. `submit` returns at once; `collect` waits for the oldest step not yet collected.

    A plan may be submitted while the one before it still runs, and may name its sampled tokens. Where `submit` or
    `collect` raises DeviceStateLostError, the executor is a `RestartableExecutor`.
    """

    @property
    def limits(self) -> ExecutorLimits: ...

    def submit(self, plan: StepPlan) -> None: ...

    def collect(self) -> StepResult: ...

    def close(self) -> None: ...


class RestartableExecutor(Executor, Protocol):
    """An executor that gets new devices, or processes, when it loses those that it had."""

    @property
    def blames_requests(self) -> bool:
        """Whether what ran may be the reason of the last loss; not where somebody outside killed a process."""
        ...

    @property
    def is_serving(self) -> bool:
        """Whether steps would run now; false from a loss on, as soon as `await_verdict` has returned."""
        ...

    def await_verdict(self, timeout: float) -> None:
        """After a loss, waits up to `timeout` seconds until `blames_requests` and `is_serving` take it into account."""
        ...

    def restart(self, timeout: float, num_requests: int) -> bool:
        """Waits up to `timeout` seconds for new ones; True once steps run again, numbered from 0.

        Args:
            timeout: after which the caller looks after other things and asks again.
            num_requests: how many requests will be replayed.

        Raises:
            RecoveryExhaustedError: there will be none.
        """
        ...
