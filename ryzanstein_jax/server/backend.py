"""What the server needs of an engine. `AsyncLLM` has it; tests bring others."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from typing import Any, Protocol

from ryzanstein_jax.engine.report import RankUsage, SchedulerStats, SetupReport
from ryzanstein_jax.engine.tokens import Tokenizer
from ryzanstein_jax.metrics import Metrics
from ryzanstein_jax.request import PoolingParams, RequestOutput, SamplingParams


class Chunk(Protocol):
    """What a stream adds; `streams.StreamChunk`."""

    @property
    def index(self) -> int: ...

    @property
    def text(self) -> str: ...

    @property
    def token_ids(self) -> list[int]: ...

    @property
    def finish_reason(self) -> str | None: ...

    @property
    def output(self) -> RequestOutput: ...


class ReplicaView(Protocol):
    """What there is to tell of one of a backend's replicas; where there is one only, of the backend."""

    @property
    def metrics(self) -> Metrics: ...

    @property
    def orchestrator(self) -> Any: ...

    @property
    def report(self) -> SetupReport: ...

    def stats(self) -> SchedulerStats: ...

    def cpu_seconds(self) -> float: ...

    def usage(self) -> list[RankUsage]: ...


class Backend(Protocol):
    """An engine that streams. All but `stream` is called from the event loop and must not wait."""

    @property
    def tokenizer(self) -> Tokenizer | None: ...

    @property
    def max_length(self) -> int: ...

    @property
    def replicas(self) -> Sequence[ReplicaView]: ...

    @property
    def is_alive(self) -> bool: ...

    @property
    def orchestrator(self) -> Any: ...

    @property
    def report(self) -> SetupReport: ...

    def stats(self) -> SchedulerStats: ...

    def get_default_sampling_params(self) -> SamplingParams: ...

    def get_pooling_params(self, dimensions: int | None = None) -> PoolingParams: ...

    def stream(
        self,
        prompt: Sequence[int],
        sampling_params: SamplingParams | PoolingParams | None = None,
        *,
        priority: int = 0,
    ) -> AsyncIterator[Any]: ...

    def compile_grammar(self, params: SamplingParams) -> None:
        """Called from a thread, and may take its time: what it finds is kept for `stream`."""
        ...

    def close(self) -> None: ...
