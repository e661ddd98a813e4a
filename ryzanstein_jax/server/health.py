"""Alive, ready and progressing are three things; this tells them apart."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable
from enum import StrEnum

from ryzanstein_jax.request import SamplingParams
from ryzanstein_jax.server.backend import Backend
from ryzanstein_jax.server.logs import log
from ryzanstein_jax.server.settings import ServerConfig

_POLL_SECONDS = 0.25
#: Before whatever waits: a probe tells whether the path works, not how long the queue is.
_PROBE_PRIORITY = -(1 << 30)


class Status(StrEnum):
    """What the server can do now."""

    STARTING = "starting"  # the model loads
    READY = "ready"
    DEGRADED = "degraded"  # serves, on less than was configured
    RECOVERING = "recovering"  # devices were lost; requests wait
    STALLED = "stalled"  # requests run and no step was made for too long
    DRAINING = "draining"  # ends; no new requests
    FAILED = "failed"  # for good


#: In these a request that comes in will end with an answer.
OPEN = frozenset({Status.READY, Status.DEGRADED, Status.RECOVERING})
ALIVE = OPEN | {Status.STARTING, Status.DRAINING}

_OF_ORCHESTRATOR = {
    "created": Status.STARTING,
    "starting": Status.STARTING,
    "ready": Status.READY,
    "recovering": Status.RECOVERING,
    "degraded": Status.DEGRADED,
}


class Health:
    """Watches an engine from outside.

    Attributes:
        draining: set by whoever ends the server.
        failure: why the engine could not be started.
        on_change: called with each new status that `watch` sees.
    """

    def __init__(self, config: ServerConfig, clock: Callable[[], float] = time.monotonic):
        self._config, self._clock = config, clock
        self.backend: Backend | None = None
        self.draining = False
        self.failure: Exception | None = None
        self.on_change: Callable[[Status], None] = lambda status: None
        self._last_token: float | None = None
        self._num_steps, self._last_step = -1, clock()
        self._probe: asyncio.Task[bool] | None = None

    # --- what is noticed

    def note_token(self) -> None:
        """A token came out of the serving path."""
        self._last_token = self._clock()

    async def watch(self) -> None:
        """Looks at the engine until cancelled, and logs when the status changes."""
        before = None
        while True:
            self.poll()
            if (now := self.status) is not before:
                before = now
                log("status", status=now.value)
                self.on_change(now)
            await asyncio.sleep(_POLL_SECONDS)

    def poll(self) -> None:
        """Notes whether steps were made, or none had to be."""
        if self.backend is None:
            return
        stats = self.backend.stats()
        if stats.num_steps != self._num_steps or not (stats.num_running or stats.num_waiting):
            self._num_steps, self._last_step = stats.num_steps, self._clock()

    # --- what follows

    @property
    def progress_age(self) -> float:
        """Seconds since the last step; near 0 while nothing has to run."""
        return self._clock() - self._last_step

    @property
    def engine_status(self) -> Status:
        """Of the engine, whatever the server does."""
        if self.failure is not None:
            return Status.FAILED
        if self.backend is None:
            return Status.STARTING
        if not self.backend.is_alive:
            return Status.FAILED
        status = Status.READY
        orchestrator = self.backend.orchestrator
        if orchestrator is not None:
            status = _OF_ORCHESTRATOR.get(str(orchestrator.state), Status.FAILED)
            if not orchestrator.is_watched:
                return Status.FAILED
        if status in (Status.READY, Status.DEGRADED) and self.progress_age > self._config.stall_seconds:
            return Status.STALLED
        return status

    @property
    def status(self) -> Status:
        """Of the server."""
        status = self.engine_status
        return Status.DRAINING if self.draining and status in ALIVE else status

    async def is_ready(self) -> bool:
        """Whether a token came lately, or steps are made for a request, or a probe brings a token now."""
        if self.status not in (Status.READY, Status.DEGRADED) or self.backend is None:
            return False
        fresh = self._config.fresh_seconds
        if self._last_token is not None and self._clock() - self._last_token <= fresh:
            return True
        self.poll()
        stats = self.backend.stats()
        if (stats.num_running or stats.num_waiting) and self._num_steps > 0:
            return self.progress_age <= fresh
        # All who ask at once share one probe; a client that leaves does not end it for the others.
        if self._probe is None or self._probe.done():
            self._probe = asyncio.create_task(self._run_probe(self.backend))
        return await asyncio.shield(self._probe)

    async def _run_probe(self, backend: Backend) -> bool:
        # A seed of its own, so that it draws none of those that requests without one get.
        params = SamplingParams(max_tokens=1, temperature=0, seed=0, ignore_eos=True, detokenize=False)
        try:
            async with asyncio.timeout(self._config.probe_seconds):
                stream = backend.stream([0], params, priority=_PROBE_PRIORITY)
                async with contextlib.aclosing(stream) as chunks:  # type: ignore[type-var]
                    async for chunk in chunks:
                        if chunk.token_ids:
                            self.note_token()
                            return True
        except Exception:  # noqa: BLE001 - whatever it is, no token came
            return False
        return False
