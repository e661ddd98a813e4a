"""`AsyncLLM`: the same engine for asyncio. One thread steps it; coroutines wait for their own chunks."""

from __future__ import annotations

import asyncio
import itertools
import queue
import threading
import time
from collections.abc import AsyncIterator, Callable, Mapping
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from ryzanstein_jax.config import OrchestratorConfig
from ryzanstein_jax.engine.report import RankUsage, SetupReport
from ryzanstein_jax.engine.tokens import Tokenizer
from ryzanstein_jax.errors import EngineClosedError
from ryzanstein_jax.llm import (
    Messages,
    Prompt,
    StreamChunk,
    StreamCursor,
    default_sampling_params,
    encode_input,
)
from ryzanstein_jax.request import PoolingParams, RequestOutput, SamplingParams
from ryzanstein_jax.start import as_orchestrator, make_config, start_engine

if TYPE_CHECKING:
    from ryzanstein_jax.engine.scheduler import SchedulerStats
    from ryzanstein_jax.metrics import Metrics
    from ryzanstein_jax.orchestrator.orchestrator import MultiGPUOrchestrator


class _Listener:
    """Brings one request's chunks from the engine's thread to its event loop."""

    def __init__(self) -> None:
        self.loop = asyncio.get_running_loop()
        self.chunks: asyncio.Queue[StreamChunk | Exception | None] = asyncio.Queue()
        self.cursor = StreamCursor()

    def put(self, item: StreamChunk | Exception | None) -> None:
        """Hands over a chunk, an error, or None for the end; a loop that is gone wants none."""
        try:
            self.loop.call_soon_threadsafe(self.chunks.put_nowait, item)
        except RuntimeError:
            pass  # the loop was closed while its request ran


class AsyncLLM:
    """A model for asyncio programs, such as servers and notebooks.

    Use it as an async context manager, or call `close`. Made outside of any event loop or inside of one; several
    loops may use it at a time.

    Args:
        model: Hugging Face id, folder, `.gguf` file, snapshot, or "smollm2" for the default model.
        progress: show bars while it starts, and the memory sum.
        executor, orchestrator: as `LLM` takes them.
        settings: the other fields of `EngineConfig`.

    Raises:
        ConfigError, UnsupportedModelError, WeightsError, MemoryBudgetError: before anything is held.
    """

    def __init__(
        self,
        model: str = "smollm2",
        *,
        progress: bool = True,
        executor: str = "local",
        orchestrator: OrchestratorConfig | Mapping[str, Any] | None = None,
        **settings: Any,
    ):
        self.config = make_config(model, settings)
        self._opened, self._executor, self._engine = start_engine(self.config, progress, executor, orchestrator)
        self._ids = itertools.count()
        self._listeners: dict[str, _Listener] = {}
        #: What the engine's thread shall do between steps; None ends it.
        self._inbox: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._closed = False
        self._lock = threading.Lock()  # nothing is put into the inbox after it was emptied for the last time
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    @property
    def tokenizer(self) -> Tokenizer | None:
        return self._opened.tokenizer

    @property
    def orchestrator(self) -> MultiGPUOrchestrator | None:
        """What watches the worker processes; None where the devices are in this process."""
        return as_orchestrator(self._executor)

    @property
    def metrics(self) -> Metrics:
        """Counters and histograms of the engine."""
        return self._executor.metrics

    @property
    def report(self) -> SetupReport:
        """What the last start of the devices cost, and how their memory is divided."""
        return self._executor.report

    @property
    def is_alive(self) -> bool:
        """Whether the engine's thread runs: false after `close`, and after the engine failed."""
        return not self._closed and self._thread.is_alive()

    @property
    def max_length(self) -> int:
        """Most tokens that a prompt and its completion may have together."""
        return self._engine.max_length

    def stats(self) -> SchedulerStats:
        """Where the scheduler stands. Read while it works: numbers of one call may be a step apart."""
        return self._engine.stats()

    def usage(self) -> list[RankUsage]:
        """Memory and communication of each rank, or of each device of this process."""
        return self._executor.usage()

    def cpu_seconds(self) -> float:
        """Processor time of the thread that schedules, and hands steps to the devices; 0 once it has ended."""
        ident = self._thread.ident
        if ident is None or not self._thread.is_alive():
            return 0.0
        return time.clock_gettime(time.pthread_getcpuclockid(ident))

    def get_default_sampling_params(self) -> SamplingParams:
        """What the model's `generation_config.json` recommends."""
        return default_sampling_params(self._opened)

    def compile_grammar(self, params: SamplingParams) -> None:
        """Compiles the grammar that the parameters ask for, which is then kept; may take a second.

        Raises:
            RequestError: it can't be compiled.
        """
        self._engine.compile_grammar(params)

    def get_pooling_params(self, dimensions: int | None = None) -> PoolingParams:
        """How embeddings are made: as the setting `embedding_pooling` says, or else the model's folder.

        Raises:
            RequestError: the folder asks for what is not there, or embeddings have fewer dimensions.
        """
        return self._opened.pooling_params(self.config.embedding_pooling, dimensions)

    async def stream(
        self,
        prompt: Prompt | Messages,
        sampling_params: SamplingParams | PoolingParams | None = None,
        *,
        priority: int = 0,
    ) -> AsyncIterator[StreamChunk]:
        """Completes one prompt, or answers one conversation, piece by piece.

        With `PoolingParams` there is one chunk, whose output holds the embedding.

        Closing the iterator, or cancelling its task, aborts the request.

        Raises:
            RequestError: the prompt or the parameters are invalid.
            EngineClosedError: the engine was closed, or failed, before the request ended.
        """
        params = sampling_params or self.get_default_sampling_params()
        # Tokenizing and templates take their time: not on the event loop.
        text, ids = await asyncio.to_thread(encode_input, prompt, self.tokenizer)
        grammar = None
        if isinstance(params, SamplingParams) and params.structured_outputs is not None:
            grammar = await asyncio.to_thread(self._engine.compile_grammar, params)
        request_id, listener = str(next(self._ids)), _Listener()

        def add() -> None:
            try:
                self._engine.add(request_id, ids, params, prompt=text, priority=priority, grammar=grammar)
                self._listeners[request_id] = listener
            except Exception as error:  # noqa: BLE001 - the caller gets it, whatever it is
                listener.put(error)

        self._send(add)
        try:
            while (item := await listener.chunks.get()) is not None:
                if isinstance(item, Exception):
                    raise item
                yield item
        finally:
            self._inbox.put(lambda: self._forget(request_id))

    async def embed(
        self, prompt: Prompt, pooling_params: PoolingParams | None = None, *, priority: int = 0
    ) -> RequestOutput:
        """Embeds one prompt: `embedding` of the output is float32 [hidden], of length 1; raises as `stream` does."""
        return await self._last(self.stream(prompt, pooling_params or self.get_pooling_params(), priority=priority))

    async def generate(
        self, prompt: Prompt | Messages, sampling_params: SamplingParams | None = None, *, priority: int = 0
    ) -> RequestOutput:
        """The whole output of one prompt or conversation; raises as `stream` does."""
        return await self._last(self.stream(prompt, sampling_params, priority=priority))

    async def _last(self, stream: AsyncIterator[StreamChunk]) -> RequestOutput:
        output: RequestOutput | None = None
        async for chunk in stream:
            output = chunk.output
        if output is None:
            raise EngineClosedError("the request ended without an answer")
        return output

    def close(self) -> None:
        """Ends what is under way with a typed error, and frees the devices. May be called again."""
        self._inbox.put(None)
        self._thread.join()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await asyncio.to_thread(self.close)

    # --- within

    def _send(self, what: Callable[[], None]) -> None:
        with self._lock:
            if self._closed:
                raise EngineClosedError("the engine is closed")
            self._inbox.put(what)

    def _forget(self, request_id: str) -> None:
        """The caller has gone, or has its answer: what is left of the request is ended."""
        if self._listeners.pop(request_id, None) is not None:
            self._engine.abort(request_id)

    def _run(self) -> None:
        """The engine's thread: what was asked for, then a step, as long as there is something to do."""
        error: Exception = EngineClosedError("the engine was closed before the request ended")
        try:
            while self._take_inbox():
                if self._engine.has_unfinished():
                    for output in self._engine.step():
                        self._deliver(output)
        except Exception as failure:  # noqa: BLE001 - every waiting caller learns of it
            error = EngineClosedError(f"the engine failed: {failure!r}")
            error.__cause__ = failure
        finally:
            with self._lock:
                self._closed = True
            self._drain(error)
            self._engine.close()
            self._executor.close()

    def _take_inbox(self) -> bool:
        """Does what was sent; waits for it while there is nothing to step. False ends the thread."""
        block = not self._engine.has_unfinished()
        while True:
            try:
                what = self._inbox.get(block=block)
            except queue.Empty:
                return True
            if what is None:
                return False
            what()
            block = False

    def _deliver(self, output: RequestOutput) -> None:
        listener = self._listeners.get(output.request_id)
        if listener is None:
            return
        for chunk in listener.cursor.advance(output):
            listener.put(chunk)
        if output.finished:
            del self._listeners[output.request_id]
            listener.put(output.error)

    def _drain(self, error: Exception) -> None:
        """Nobody waits for ever: those listening, and those whose request was never added, get the error."""
        while True:
            try:
                what = self._inbox.get_nowait()
            except queue.Empty:
                break
            if what is not None:
                what()
        for listener in self._listeners.values():
            listener.put(error)
        self._listeners.clear()
