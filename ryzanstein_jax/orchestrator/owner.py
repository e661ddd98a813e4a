"""`Owner`: the orchestrator, as its supervisor sees it."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Protocol

from ryzanstein_jax.config import OrchestratorConfig
from ryzanstein_jax.errors import RyzansteinError
from ryzanstein_jax.metrics import Metrics
from ryzanstein_jax.orchestrator.events import EventLog
from ryzanstein_jax.orchestrator.process_group import ProcessGroup


class Owner(Protocol):
    """What a supervisor tells and asks the orchestrator."""

    options: OrchestratorConfig
    events: EventLog
    metrics: Metrics

    @property
    def is_serving(self) -> bool: ...

    def tell_joined(self) -> None: ...

    def serve(self, group: ProcessGroup, *, degraded: bool) -> None: ...

    def lose(self) -> None: ...

    def fail(self, error: RyzansteinError) -> None: ...

    def sockets_at_rest(self) -> AbstractContextManager[None]: ...
