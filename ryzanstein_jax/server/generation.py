"""One request on its way through the engine: its prompts' streams, joined, timed, counted and bounded in time."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

from ryzanstein_jax.errors import DeadlineError, EngineClosedError
from ryzanstein_jax.request import PoolingParams, SamplingParams
from ryzanstein_jax.server.backend import Backend, Chunk
from ryzanstein_jax.server.encode import Prompt
from ryzanstein_jax.server.health import Health
from ryzanstein_jax.server.instruments import Instruments
from ryzanstein_jax.server.tracing import current_trace


@dataclass(frozen=True, slots=True)
class Piece:
    """What the stream of one of the request's prompts adds."""

    prompt: int
    chunk: Chunk


class Generation:
    """Runs a request's prompts as long as its block lasts; leaving the block aborts what still runs.

    Args:
        deadline: on the event loop's clock.
        arrived: when the request was let in, on the same clock.
        at_once: how many of the prompts run at a time.
    """

    def __init__(
        self,
        backend: Backend,
        prompts: Sequence[Prompt],
        params: SamplingParams | PoolingParams,
        *,
        priority: int,
        at_once: int,
        deadline: float,
        arrived: float,
        instruments: Instruments,
        health: Health,
    ):
        self.prompts = prompts
        self._backend, self._params, self._priority = backend, params, priority
        self._deadline, self._arrived = deadline, arrived
        self._instruments, self._health = instruments, health
        self._loop = asyncio.get_running_loop()
        self._queue: asyncio.Queue[Piece | BaseException | None] = asyncio.Queue()
        self._tasks: list[asyncio.Task[None]] = []
        self._places = asyncio.Semaphore(at_once)
        self._running = 0  # prompts whose streams have not ended
        self._unfinished = len(prompts) * params.n
        self._state = "waiting"
        self._token_times: dict[tuple[int, int], float] = {}
        self._trace = current_trace()

    async def __aenter__(self) -> Self:
        self._running = len(self.prompts)
        self._instruments.requests.labels(self._state).inc()
        self._instruments.prompt_tokens.inc(sum(len(prompt.token_ids) for prompt in self.prompts))
        for number, prompt in enumerate(self.prompts):
            self._tasks.append(asyncio.create_task(self._pump(number, prompt.token_ids)))
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._instruments.requests.labels(self._state).dec()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self._unfinished:
            ended_by_us = error is None or isinstance(error, asyncio.CancelledError | DeadlineError | GeneratorExit)
            self._instruments.finished.labels("abort" if ended_by_us else "error").inc(self._unfinished)
        elif self._token_times:
            self._instruments.request_seconds.observe(max(self._token_times.values()) - self._arrived)

    @property
    def ended(self) -> bool:
        """Whether nothing more comes."""
        return not self._running and self._queue.empty()

    def fail(self, error: Exception) -> None:
        """Ends the request with an error, from outside."""
        self._queue.put_nowait(error)

    async def next(self, timeout: float | None = None) -> Piece | None:
        """The next piece; None after so many silent seconds, or at the end: see `ended`.

        Raises:
            DeadlineError: the request's time is up.
            Exception: what the engine ended it with.
        """
        if self.ended:
            return None
        left = self._deadline - self._loop.time()
        wait = left if timeout is None else min(left, timeout)
        item: Piece | BaseException | None = None
        try:
            # Not waiting is much cheaper than a wait with a time limit, which makes a task of its own.
            item = self._queue.get_nowait() if not self._queue.empty() else await self._get(wait)
        except TimeoutError:
            if self._loop.time() >= self._deadline:
                raise DeadlineError("The request did not end within its time; it was ended.") from None
            return None
        if isinstance(item, BaseException):
            raise item
        if item is None:
            self._running -= 1
            return None if not self._running else await self.next(timeout)
        return item

    async def _get(self, wait: float) -> Piece | BaseException | None:
        async with asyncio.timeout(max(0.0, wait)):
            return await self._queue.get()

    async def _pump(self, number: int, token_ids: list[int]) -> None:
        aborted = False
        try:
            stream: Any = self._backend.stream(token_ids, self._params, priority=self._priority)
            async with self._places, contextlib.aclosing(stream) as chunks:
                async for chunk in chunks:
                    self._note(number, chunk)
                    if chunk.finish_reason in ("abort", "error"):
                        aborted = True  # the error itself follows; nothing of this is an answer
                    else:
                        self._queue.put_nowait(Piece(number, chunk))
            if aborted:
                raise EngineClosedError("the engine ended the request")
            self._queue.put_nowait(None)
        except Exception as error:  # noqa: BLE001 - whoever waits for the answer gets it
            self._queue.put_nowait(error)

    def _note(self, number: int, chunk: Chunk) -> None:
        now, instruments = self._loop.time(), self._instruments
        if self._trace is not None:
            self._trace.note_output(number, chunk.output.timings)
        if chunk.token_ids:
            self._health.note_token()
            instruments.generation_tokens.inc(len(chunk.token_ids))
            if self._state == "waiting":
                instruments.requests.labels("waiting").dec()
                self._state = "running"
                instruments.requests.labels("running").inc()
                instruments.first_token.observe(now - self._arrived)
                timings = chunk.output.timings
                if timings.first_scheduled is not None:
                    instruments.queue_seconds.observe(max(0.0, timings.first_scheduled - timings.arrived))
            before = self._token_times.get((number, chunk.index))
            if before is not None:
                each = (now - before) / len(chunk.token_ids)
                for _ in chunk.token_ids:
                    instruments.inter_token.observe(each)
            self._token_times[number, chunk.index] = now
        if chunk.finish_reason is not None:
            self._token_times.setdefault((number, chunk.index), now)  # an embedding has no tokens
            instruments.finished.labels(chunk.finish_reason).inc()
            self._unfinished -= 1
